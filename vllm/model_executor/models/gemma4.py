"""Gemma 4 as it is published, with towers for images and sounds: its dense language model."""

from __future__ import annotations

from transformers import PretrainedConfig

from vllm.model_executor.models import gemma4_text
from vllm.model_executor.models.spec import DecoderSpec
from vllm.model_executor.models.text_part import text_part


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    """`config` is that of the language model."""
    return text_part(gemma4_text.decoder(config, max_positions))

"""Mistral Small 3.1 and 3.2 and Ministral 3 as they are published, with a vision tower: their language model."""

from __future__ import annotations

from transformers import PretrainedConfig

from vllm.model_executor.models import ministral3, mistral
from vllm.model_executor.models.spec import DecoderSpec
from vllm.model_executor.models.text_part import text_part


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    """`config` is that of the language model, of model type `mistral` or `ministral3`."""
    family = ministral3 if config.model_type == "ministral3" else mistral
    return text_part(family.decoder(config, max_positions))

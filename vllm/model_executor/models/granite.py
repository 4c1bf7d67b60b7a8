"""Granite 3 (Granite Team, 2024): Llama with multipliers of embeddings, residual stream, scores and logits."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import llama
from vllm.model_executor.models.spec import DecoderSpec


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    spec = llama.decoder(config, max_positions)
    layer = replace(
        spec.layers[0],
        mixer=replace(spec.layers[0].mixer, scale=float(config.attention_multiplier)),
        residual_multiplier=float(config.residual_multiplier),
    )
    return replace(
        spec,
        layers=(layer,) * len(spec.layers),
        embedding_multiplier=float(config.embedding_multiplier),
        logits_multiplier=1.0 / float(config.logits_scaling),
    )

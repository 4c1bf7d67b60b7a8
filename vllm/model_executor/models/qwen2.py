"""Qwen2 and Qwen2.5 (Yang et al., 2024): Llama with biases of q, k and v; upper layers may read a window."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, llama
from vllm.model_executor.models.spec import DecoderSpec


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    config_values.refuse(config, mlp_bias=False)
    spec = llama.decoder(config, max_positions)
    mixer = replace(spec.layers[0].mixer, biases=frozenset("qkv"))
    layers = [
        replace(spec.layers[0], mixer=replace(mixer, window=w)) for w in config_values.windows(config, max_positions)
    ]
    return replace(spec, layers=tuple(layers))

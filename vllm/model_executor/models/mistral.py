"""Mistral (Jiang et al., 2023): Llama, whose first release reads a window of keys in every layer."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, llama
from vllm.model_executor.models.spec import DecoderSpec


def decoder(config: PretrainedConfig, max_positions: int, rope_keys: frozenset[str] = frozenset()) -> DecoderSpec:
    """`rope_keys` are those of the rotary parameters that the caller reads."""
    config_values.refuse(config, attention_bias=False, mlp_bias=False)
    spec = llama.decoder(config, max_positions, rope_keys=rope_keys)
    window = config_values.window(config, max_positions)
    layer = replace(spec.layers[0], mixer=replace(spec.layers[0].mixer, window=window))
    return replace(spec, layers=(layer,) * len(spec.layers))

"""Seed-OSS (ByteDance Seed, 2025): Llama with biases of q, k and v, and one of o by a switch of its own."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, llama
from vllm.model_executor.models.spec import DecoderSpec


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    spec = llama.decoder(config, max_positions)
    biases = config_values.biases(config, "attention_bias", "q k v")
    biases |= config_values.biases(config, "attention_out_bias", "o")
    layer = replace(spec.layers[0], mixer=replace(spec.layers[0].mixer, biases=biases))
    return replace(spec, layers=(layer,) * len(spec.layers))

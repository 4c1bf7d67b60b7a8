"""Qwen1.5-MoE and Qwen2-57B-A14B (Qwen Team, 2024): Qwen2 with experts, and a shared MLP with a gate of its own."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, qwen2, qwen3_moe
from vllm.model_executor.models.spec import MLP, DecoderSpec


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    spec = qwen2.decoder(config, max_positions)
    biases = config_values.biases(config, "qkv_bias", "q k v")
    layers = (replace(layer, mixer=replace(layer.mixer, biases=biases)) for layer in spec.layers)
    moe = qwen3_moe.experts(config)
    shared = MLP(config.shared_expert_intermediate_size, config_values.activation(config))
    moe = replace(moe, shared=shared, shared_gate=True)
    return qwen3_moe.with_experts(replace(spec, layers=tuple(layers)), config, moe)

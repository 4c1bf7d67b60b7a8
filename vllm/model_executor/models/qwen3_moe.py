"""Qwen3 with experts (Yang et al., 2025; 30B-A3B, 235B-A22B): Qwen3 whose MLPs are mixtures, except in layers that the
configuration names.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, qwen3
from vllm.model_executor.models.spec import MLP, DecoderSpec, MoE
from vllm.ops.moe import Routing


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    spec = qwen3.decoder(config, max_positions)
    window = config_values.window(config, max_positions)
    layers = (replace(layer, mixer=replace(layer.mixer, window=window)) for layer in spec.layers)
    return with_experts(replace(spec, layers=tuple(layers)), config, experts(config))


def experts(config: PretrainedConfig) -> MoE:
    """The mixture by the keys of Qwen's configurations."""
    return MoE(
        config.num_experts,
        config.moe_intermediate_size,
        config_values.activation(config),
        Routing(config.num_experts_per_tok, renormalise=bool(config.norm_topk_prob)),
    )


def with_experts(spec: DecoderSpec, config: PretrainedConfig, moe: MoE) -> DecoderSpec:
    """The same network with `moe` in the layers that have one: every `decoder_sparse_step`-th, less those of
    `mlp_only_layers`."""

    def ffn(index: int, dense: MLP | MoE) -> MLP | MoE:
        sparse = config.num_experts > 0 and (index + 1) % config.decoder_sparse_step == 0
        return moe if sparse and index not in (config.mlp_only_layers or ()) else dense

    layers = (replace(layer, ffn=ffn(i, layer.ffn)) for i, layer in enumerate(spec.layers))
    return replace(spec, layers=tuple(layers))

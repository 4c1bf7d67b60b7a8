"""Mixtral (Jiang et al., 2024): Mistral whose every MLP is a mixture of experts."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, mistral
from vllm.model_executor.models.spec import CheckpointNames, DecoderSpec, MoE
from vllm.ops.moe import Routing

SPELLINGS = {
    ".block_sparse_moe.": ".mlp.",
    ".w1.": ".gate_proj.",
    ".w2.": ".down_proj.",
    ".w3.": ".up_proj.",
}
"""What published checkpoints call the parts that transformers saves by other names."""


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    spec = mistral.decoder(config, max_positions)
    ffn = MoE(
        config.num_local_experts,
        config.intermediate_size,
        config_values.activation(config),
        Routing(config.num_experts_per_tok, renormalise=True),
    )
    layer = replace(spec.layers[0], ffn=ffn)
    return replace(spec, layers=(layer,) * len(spec.layers), names=CheckpointNames(spellings=SPELLINGS))

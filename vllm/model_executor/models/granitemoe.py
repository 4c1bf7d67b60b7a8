"""Granite 3 with experts (Granite Team, 2024; 1B-A400M, 3B-A800M): Granite 3 with a mixture in every layer."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, granite
from vllm.model_executor.models.spec import LAYER_NAMES, CheckpointNames, DecoderSpec, MoE
from vllm.ops.moe import Routing

NAMES = CheckpointNames(
    parts={
        **{part: name for part, name in LAYER_NAMES.items() if not part.startswith("expert.")},
        "router": "block_sparse_moe.router",
        "experts.gate_up": "block_sparse_moe.experts.gate_up_proj",
        "experts.down": "block_sparse_moe.experts.down_proj",
    },
    spellings={
        "block_sparse_moe.input_linear.weight": "block_sparse_moe.experts.gate_up_proj",
        "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj",
        "block_sparse_moe.router.layer.": "block_sparse_moe.router.",
    },
)


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    config_values.refuse(config, mlp_bias=False)
    spec = granite.decoder(config, max_positions)
    ffn = MoE(
        config.num_local_experts,
        config.intermediate_size,
        config_values.activation(config),
        Routing(config.num_experts_per_tok, scoring="chosen"),
    )
    layer = replace(spec.layers[0], ffn=ffn)
    return replace(spec, layers=(layer,) * len(spec.layers), names=NAMES)

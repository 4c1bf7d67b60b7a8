"""Granite 3 with experts and a shared MLP beside them."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, granitemoe
from vllm.model_executor.models.spec import MLP, CheckpointNames, DecoderSpec, MoE

NAMES = CheckpointNames(
    parts={
        **granitemoe.NAMES.parts,
        "shared.gate_up": "shared_mlp.input_linear",
        "shared.down": "shared_mlp.output_linear",
    },
    spellings=granitemoe.NAMES.spellings,
)


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    spec = granitemoe.decoder(config, max_positions)
    ffn, size = spec.layers[0].ffn, int(config.shared_intermediate_size)
    if isinstance(ffn, MoE) and size:
        ffn = replace(ffn, shared=MLP(size, config_values.activation(config)))
    layer = replace(spec.layers[0], ffn=ffn)
    return replace(spec, layers=(layer,) * len(spec.layers), names=NAMES)

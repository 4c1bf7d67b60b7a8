"""GLM-4-0414 (9B and 32B; Z.ai, 2025): GLM with norms on both sides of each block."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import glm
from vllm.model_executor.models.spec import CheckpointNames, DecoderSpec

NAMES = CheckpointNames(
    parts={**glm.NAMES.parts, "post_mixer": "post_self_attn_layernorm", "post_ffn": "post_mlp_layernorm"}
)


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    spec = glm.decoder(config, max_positions)
    layer = spec.layers[0]
    layer = replace(layer, norms=replace(layer.norms, post_mixer=True, post_ffn=True))
    return replace(spec, layers=(layer,) * len(spec.layers), names=NAMES)

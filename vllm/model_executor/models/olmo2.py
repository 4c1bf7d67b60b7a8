"""OLMo 2 (OLMo Team, 2024): norms behind each block instead of ahead of it, and one over all heads of q and of k."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, llama
from vllm.model_executor.models.spec import LAYER_NAMES, CheckpointNames, DecoderSpec, LayerNorms
from vllm.ops.norm import Norm

NAMES = CheckpointNames(
    parts={**LAYER_NAMES, "post_mixer": "post_attention_layernorm", "post_ffn": "post_feedforward_layernorm"}
)


def decoder(config: PretrainedConfig, max_positions: int, rope_of: str | None = None) -> DecoderSpec:
    """`rope_of` names the kind of layer whose rotary parameters all get, where a configuration has several."""
    config_values.refuse(config, clip_qkv=None, mlp_bias=False)
    spec = llama.decoder(config, max_positions, rope_of)
    norm = Norm(config.rms_norm_eps, rounds_first=False)
    layer = replace(
        spec.layers[0],
        mixer=replace(spec.layers[0].mixer, qk_norm=norm, qk_norm_over_all=True),
        norms=LayerNorms(norm, pre_mixer=False, post_mixer=True, pre_ffn=False, post_ffn=True),
    )
    return replace(spec, layers=(layer,) * len(spec.layers), final_norm=norm, names=NAMES)

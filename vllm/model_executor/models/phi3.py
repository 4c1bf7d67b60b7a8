"""Phi-3 (Abdin et al., 2024), Phi-4 and Phi-4-mini: Llama whose checkpoints hold q, k and v, and gate and up, in one
tensor each; heads may be turned in part, by frequencies for long sequences (LongRoPE: Ding et al., 2024).
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, llama
from vllm.model_executor.models.spec import LAYER_NAMES, CheckpointNames, DecoderSpec

NAMES = CheckpointNames(parts={**LAYER_NAMES, "qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"})


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    config_values.refuse(config, attention_bias=False, mlp_bias=False)
    spec = llama.decoder(config, max_positions)
    window = config_values.window(config, max_positions)
    layer = replace(spec.layers[0], mixer=replace(spec.layers[0].mixer, window=window))
    return replace(spec, layers=(layer,) * len(spec.layers), names=NAMES)

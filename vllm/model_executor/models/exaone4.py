"""EXAONE 4 (LG AI Research, 2025): norms behind each block, one of each query and key head; where some layers have a
window, the others do not encode positions.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, llama, olmo2
from vllm.model_executor.models.spec import DecoderSpec, LayerNorms, LayerSpec


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    config_values.refuse(config, attention_bias=False, mlp_bias=False)
    spec = llama.decoder(config, max_positions)
    norms = LayerNorms(spec.final_norm, pre_mixer=False, post_mixer=True, pre_ffn=False, post_ffn=True)
    all_turned = config.sliding_window is None

    def changed(layer: LayerSpec, kind: str, window: int | None) -> LayerSpec:
        rope = layer.mixer.rope if all_turned or kind == "sliding_attention" else None
        mixer = replace(layer.mixer, qk_norm=spec.final_norm, rope=rope, window=window)
        return replace(layer, mixer=mixer, norms=norms)

    kinds, windows = config_values.layer_types(config), config_values.windows(config, max_positions)
    return replace(spec, layers=tuple(map(changed, spec.layers, kinds, windows)), names=olmo2.NAMES)

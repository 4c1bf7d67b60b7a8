"""Gemma 3's language model (Gemma Team, 2025): Gemma 2 with a norm of each query and key head instead of capped scores,
five layers with a window and rotary positions of a short base to each one without.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, gemma2
from vllm.model_executor.models.spec import DecoderSpec, LayerSpec


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    config_values.refuse(config, attn_logit_softcapping=None)
    spec = gemma2.decoder(config, max_positions, rope_of="full_attention")

    def changed(layer: LayerSpec, kind: str) -> LayerSpec:
        rope = config_values.rope(config, max_positions, layer_type=kind)
        return replace(layer, mixer=replace(layer.mixer, rope=rope, qk_norm=spec.final_norm))

    return replace(spec, layers=tuple(map(changed, spec.layers, config.layer_types)))

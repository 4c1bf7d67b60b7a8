"""OLMo 3 (OLMo Team, 2025): OLMo 2 with a window in three of four layers; only the others' positions are scaled."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, olmo2
from vllm.model_executor.models.spec import DecoderSpec, LayerSpec


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    spec = olmo2.decoder(config, max_positions, rope_of="full_attention")

    def changed(layer: LayerSpec, kind: str, window: int | None) -> LayerSpec:
        rope = config_values.rope(config, max_positions, layer_type=kind)
        return replace(layer, mixer=replace(layer.mixer, rope=rope, window=window))

    kinds, windows = config_values.layer_types(config), config_values.windows(config, max_positions)
    return replace(spec, layers=tuple(map(changed, spec.layers, kinds, windows)))

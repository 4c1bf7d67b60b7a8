"""SmolLM3 (Hugging Face, 2025): Llama of which some layers do not encode positions (NoPE: Kazemnejad et al., 2023)."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, llama
from vllm.model_executor.models.spec import DecoderSpec, LayerSpec


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    spec = llama.decoder(config, max_positions)
    turned = config.no_rope_layers
    if len(turned) < config.num_hidden_layers or not set(turned) <= {0, 1}:
        raise config_values.refused(config, f"no_rope_layers {turned!r}", "1 (turned) or 0 for each layer")

    def changed(layer: LayerSpec, window: int | None, is_turned: int) -> LayerSpec:
        mixer = replace(layer.mixer, window=window, rope=layer.mixer.rope if is_turned else None)
        return replace(layer, mixer=mixer)

    windows = config_values.windows(config, max_positions)
    return replace(spec, layers=tuple(map(changed, spec.layers, windows, turned)))

"""Command R7B and Command A (Cohere, 2024): Command R with a window in three of four layers; the others do not encode
positions.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import cohere, config_values
from vllm.model_executor.models.spec import DecoderSpec, LayerSpec


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    # Switches that checkpoints on the hub hold, all of one value.
    config_values.refuse(
        config,
        use_qk_norm=False,
        use_parallel_block=True,
        use_gated_activation=True,
        rotary_pct=1.0,
        position_embedding_type="rope_gptj",
        order_of_interleaved_layers="local_attn_first",
    )
    spec = cohere.decoder(config, max_positions)

    def changed(layer: LayerSpec, kind: str, window: int | None) -> LayerSpec:
        rope = layer.mixer.rope if kind == "sliding_attention" else None
        return replace(layer, mixer=replace(layer.mixer, rope=rope, window=window))

    kinds, windows = config_values.layer_types(config), config_values.windows(config, max_positions)
    return replace(spec, layers=tuple(map(changed, spec.layers, kinds, windows)))

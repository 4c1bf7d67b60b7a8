"""Granite 4 without experts and without recurrent layers: Granite 3 with other names, and positions only where the
configuration wants them.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, granite
from vllm.model_executor.models.spec import LAYER_NAMES, MLP, CheckpointNames, DecoderSpec

NAMES = CheckpointNames(parts={**LAYER_NAMES, "gate_up": "shared_mlp.input_linear", "down": "shared_mlp.output_linear"})


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    config_values.refuse(config, num_local_experts=0)
    if set(config_values.layer_types(config)) != {"full_attention"}:
        raise config_values.refused(config, f"layer_types {config.layer_types!r}", "'full_attention' alone")
    positions = config.position_embedding_type
    if positions not in ("rope", "nope", None):
        raise config_values.refused(config, f"position_embedding_type {positions!r}", "'rope', 'nope', None")
    spec = granite.decoder(config, max_positions)
    layer = spec.layers[0]
    if positions != "rope":
        layer = replace(layer, mixer=replace(layer.mixer, rope=None))
    layer = replace(layer, ffn=MLP(int(config.shared_intermediate_size), config_values.activation(config)))
    return replace(spec, layers=(layer,) * len(spec.layers), names=NAMES)

"""GLM-4-9B (GLM Team, 2024): Llama with biases of q, k and v, the first half of each head turned, interleaved, and gate
and up in one tensor.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, llama
from vllm.model_executor.models.spec import LAYER_NAMES, CheckpointNames, DecoderSpec

NAMES = CheckpointNames(parts={**LAYER_NAMES, "gate_up": "mlp.gate_up_proj"})


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    config_values.refuse(config, mlp_bias=False)
    spec = llama.decoder(config, max_positions)
    mixer = replace(
        spec.layers[0].mixer,
        rope=config_values.rope(config, max_positions, interleaved=True),
        biases=config_values.biases(config, "attention_bias", "q k v"),
    )
    layer = replace(spec.layers[0], mixer=mixer)
    return replace(spec, layers=(layer,) * len(spec.layers), names=NAMES)

"""Ministral 3 (Mistral AI, 2025): Mistral whose queries grow with their position."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, mistral
from vllm.model_executor.models.spec import DecoderSpec, QueryGrowth

_BETA = "llama_4_scaling_beta"


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    parameters = config_values.rope_parameters(config)
    spec = mistral.decoder(config, max_positions, rope_keys=frozenset({_BETA}))
    if not parameters.get(_BETA):
        return spec
    growth = QueryGrowth(float(parameters[_BETA]), int(parameters["original_max_position_embeddings"]))
    layer = replace(spec.layers[0], mixer=replace(spec.layers[0].mixer, query_growth=growth))
    return replace(spec, layers=(layer,) * len(spec.layers))

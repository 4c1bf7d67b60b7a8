"""MiniMax-M2 (MiniMax, 2025): part of each head turned, norms over all heads of q and of k, experts chosen by corrected
sigmoids.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, llama, mixtral
from vllm.model_executor.models.spec import LAYER_NAMES, CheckpointNames, DecoderSpec, MoE
from vllm.ops.moe import Routing

NAMES = CheckpointNames(parts={**LAYER_NAMES, "correction": "mlp.e_score_correction_bias"}, spellings=mixtral.SPELLINGS)


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    config_values.refuse(config, mlp_bias=False, attention_bias=False)
    spec = llama.decoder(config, max_positions)
    ffn = MoE(
        config.num_local_experts,
        config.intermediate_size,
        config_values.activation(config),
        Routing(config.num_experts_per_tok, scoring="sigmoid", renormalise=True),
        correction=True,
    )
    mixer = replace(spec.layers[0].mixer, qk_norm=spec.final_norm, qk_norm_over_all=True)
    layer = replace(spec.layers[0], mixer=mixer, ffn=ffn)
    return replace(spec, layers=(layer,) * len(spec.layers), names=NAMES)

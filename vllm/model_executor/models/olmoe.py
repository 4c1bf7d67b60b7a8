"""OLMoE (Muennighoff et al., 2024): Llama with experts, and a norm over all heads of q and of k."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, llama
from vllm.model_executor.models.spec import DecoderSpec, MoE
from vllm.ops.moe import Routing


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    config_values.refuse(config, clip_qkv=None, mlp_bias=False)
    spec = llama.decoder(config, max_positions)
    ffn = MoE(
        config.num_experts,
        config.intermediate_size,
        config_values.activation(config),
        Routing(config.num_experts_per_tok, renormalise=bool(config.norm_topk_prob)),
    )
    mixer = replace(spec.layers[0].mixer, qk_norm=spec.final_norm, qk_norm_over_all=True)
    layer = replace(spec.layers[0], mixer=mixer, ffn=ffn)
    return replace(spec, layers=(layer,) * len(spec.layers))

"""GLM-4.5 and GLM-4.6 (GLM Team, 2025): half of each head turned, dense layers first, then experts chosen by corrected
sigmoids beside a shared MLP.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, llama
from vllm.model_executor.models.spec import LAYER_NAMES, MLP, CheckpointNames, DecoderSpec, MoE
from vllm.ops.moe import Routing

PARTS = {
    **LAYER_NAMES,
    "shared.gate": "mlp.shared_experts.gate_proj",
    "shared.up": "mlp.shared_experts.up_proj",
    "shared.down": "mlp.shared_experts.down_proj",
}


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    config_values.refuse(config, mlp_bias=False)
    spec = llama.decoder(config, max_positions)
    mixer = replace(
        spec.layers[0].mixer,
        qk_norm=spec.final_norm if config.use_qk_norm else None,
        biases=config_values.biases(config, "attention_bias", "q k v"),
    )
    activation = config_values.activation(config)
    moe = MoE(
        config.n_routed_experts,
        config.moe_intermediate_size,
        activation,
        Routing(
            config.num_experts_per_tok,
            scoring="sigmoid",
            renormalise=bool(config.norm_topk_prob),
            scale=float(config.routed_scaling_factor),
            num_groups=config.n_group,
            top_groups=config.topk_group,
            epsilon=1e-20,
        ),
        router_float32=True,
        correction=True,
        shared=MLP(config.moe_intermediate_size * config.n_shared_experts, activation),
    )
    dense = replace(spec.layers[0], mixer=mixer)
    count, first = config.num_hidden_layers, min(config.num_hidden_layers, config.first_k_dense_replace)
    layers = (dense,) * first + (replace(dense, ffn=moe),) * (count - first)
    # Layers behind the last one predict several tokens at once, and are not used.
    spare = getattr(config, "num_nextn_predict_layers", None) or 0
    others = tuple(f"model.layers.{i}." for i in range(count, count + int(spare)))
    return replace(spec, layers=layers, names=CheckpointNames(parts=PARTS, others=others))

"""Gemma 4's language model (Gemma Team, 2026; 31B, 26B-A4B): Gemma 3 whose layers without a window have heads of
another size, make values of the matrix of the keys, and turn a quarter of each head; values are normalised, scores not
scaled, and each layer's output is multiplied by a learned number. With experts, these stand beside each layer's MLP.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, gemma2
from vllm.model_executor.models.spec import (
    MLP,
    AttentionMixer,
    CheckpointNames,
    DecoderSpec,
    LayerNorms,
    LayerSpec,
    MoE,
)
from vllm.ops.moe import Routing
from vllm.ops.norm import Norm

NAMES = CheckpointNames(
    parts={
        **{part: name for part, name in gemma2.NAMES.parts.items() if not part.startswith("expert.")},
        "router": "router.proj",
        "router_scale": "router.scale",
        "expert_factors": "router.per_expert_scale",
        "experts.gate_up": "experts.gate_up_proj",
        "experts.down": "experts.down_proj",
        "post_shared": "post_feedforward_layernorm_1",
        "pre_experts": "pre_feedforward_layernorm_2",
        "post_experts": "post_feedforward_layernorm_2",
    }
)


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    if config.use_bidirectional_attention == "all":
        raise config_values.refused(config, "use_bidirectional_attention 'all'", "None, 'vision'")
    config_values.refuse(config, hidden_size_per_layer_input=0, num_kv_shared_layers=0)
    norm = Norm(config.rms_norm_eps, rounds_first=False)
    mlp = MLP(config.intermediate_size, config_values.activation(config, "hidden_activation"))
    ffn: MLP | MoE = mlp
    if config.enable_moe_block:
        ffn = MoE(
            config.num_experts,
            config.moe_intermediate_size,
            mlp.activation,
            Routing(config.top_k_experts, renormalise=True),
            expert_factors=True,
            shared=mlp,
            beside=norm,
        )

    def layer(index: int, kind: str, window: int | None) -> LayerSpec:
        num_heads, num_kv_heads, head_dim = config_values.heads(config.per_layer_config[index])
        return LayerSpec(
            mixer=AttentionMixer(
                num_heads,
                num_kv_heads,
                head_dim,
                scale=1.0,
                rope=config_values.rope(config, max_positions, layer_type=kind, head_dim=head_dim),
                window=window,
                qk_norm=norm,
                v_norm=norm,
                v_is_k=bool(config.attention_k_eq_v) and kind == "full_attention",
                biases=config_values.biases(config, "attention_bias", "q k v o"),
            ),
            ffn=ffn,
            norms=LayerNorms(norm, post_mixer=True, post_ffn=True),
            has_scalar=True,
        )

    kinds, windows = config_values.layer_types(config), config_values.windows(config, max_positions)
    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=tuple(map(layer, range(len(kinds)), kinds, windows)),
        final_norm=norm,
        tied=bool(config.tie_word_embeddings),
        embedding_multiplier=float(config.hidden_size**0.5),
        logits_softcap=config.final_logit_softcapping,
        names=NAMES if config.enable_moe_block else gemma2.NAMES,
    )

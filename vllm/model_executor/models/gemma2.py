"""Gemma 2 (Gemma Team, 2024): norms on both sides of each block, a window in every other layer, capped scores and
logits, GeGLU, scaled embeddings.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values
from vllm.model_executor.models.spec import (
    LAYER_NAMES,
    MLP,
    AttentionMixer,
    CheckpointNames,
    DecoderSpec,
    LayerNorms,
    LayerSpec,
)
from vllm.ops.norm import Norm

NAMES = CheckpointNames(
    parts={
        **LAYER_NAMES,
        "post_mixer": "post_attention_layernorm",
        "pre_ffn": "pre_feedforward_layernorm",
        "post_ffn": "post_feedforward_layernorm",
    }
)


def decoder(config: PretrainedConfig, max_positions: int, rope_of: str | None = None) -> DecoderSpec:
    """`rope_of` names the kind of layer whose rotary parameters all get, where a configuration has several."""
    config_values.refuse(config, use_bidirectional_attention=False)
    num_heads, num_kv_heads, head_dim = config_values.heads(config)
    norm = Norm(config.rms_norm_eps, offset=1.0, rounds_first=False)

    def layer(window: int | None) -> LayerSpec:
        return LayerSpec(
            mixer=AttentionMixer(
                num_heads,
                num_kv_heads,
                head_dim,
                scale=float(config.query_pre_attn_scalar) ** -0.5,
                rope=config_values.rope(config, max_positions, layer_type=rope_of),
                window=window,
                softcap=config.attn_logit_softcapping,
                biases=config_values.biases(config, "attention_bias", "q k v o"),
            ),
            ffn=MLP(config.intermediate_size, config_values.activation(config, "hidden_activation")),
            norms=LayerNorms(norm, post_mixer=True, post_ffn=True),
        )

    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=tuple(map(layer, config_values.windows(config, max_positions))),
        final_norm=norm,
        tied=bool(config.tie_word_embeddings),
        embedding_multiplier=float(config.hidden_size**0.5),
        logits_softcap=config.final_logit_softcapping,
        names=NAMES,
    )

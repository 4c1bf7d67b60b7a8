"""Llama (Touvron et al., 2023): norms ahead of each block, grouped-query attention, SwiGLU."""

from __future__ import annotations

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values
from vllm.model_executor.models.spec import MLP, AttentionMixer, DecoderSpec, LayerNorms, LayerSpec
from vllm.ops.norm import Norm


def decoder(
    config: PretrainedConfig,
    max_positions: int,
    rope_of: str | None = None,
    rope_keys: frozenset[str] = frozenset(),
) -> DecoderSpec:
    """`rope_of` names the kind of layer whose rotary parameters all get, where a configuration has several;
    `rope_keys` are those of their keys that the caller reads."""
    num_heads, num_kv_heads, head_dim = config_values.heads(config)
    norm = Norm(config.rms_norm_eps)
    layer = LayerSpec(
        mixer=AttentionMixer(
            num_heads,
            num_kv_heads,
            head_dim,
            scale=head_dim**-0.5,
            rope=config_values.rope(config, max_positions, layer_type=rope_of, also_read=rope_keys),
            biases=config_values.biases(config, "attention_bias", "q k v o"),
        ),
        ffn=MLP(
            config.intermediate_size,
            config_values.activation(config),
            biases=config_values.biases(config, "mlp_bias", "gate up down"),
        ),
        norms=LayerNorms(norm),
    )
    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=(layer,) * config.num_hidden_layers,
        final_norm=norm,
        tied=bool(config.tie_word_embeddings),
    )

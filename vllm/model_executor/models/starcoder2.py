"""StarCoder 2 (Lozhkov et al., 2024): layer norms with biases, an MLP of two matrices without a gate, biases in all
projections, a window in every layer.
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

NAMES = CheckpointNames(parts={**LAYER_NAMES, "up": "mlp.c_fc", "down": "mlp.c_proj"})


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    config_values.refuse(config, norm_type="layer_norm", mlp_type="default")
    num_heads, num_kv_heads, head_dim = config_values.heads(config)
    norm = Norm(config.norm_epsilon, kind="layer", rounds_first=False)
    layer = LayerSpec(
        mixer=AttentionMixer(
            num_heads,
            num_kv_heads,
            head_dim,
            scale=head_dim**-0.5,
            rope=config_values.rope(config, max_positions),
            window=config_values.window(config, max_positions),
            biases=config_values.biases(config, "use_bias", "q k v o"),
        ),
        ffn=MLP(
            config.intermediate_size,
            config_values.activation(config),
            gated=False,
            biases=config_values.biases(config, "use_bias", "up down"),
        ),
        norms=LayerNorms(norm, has_bias=True),
    )
    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=(layer,) * config.num_hidden_layers,
        final_norm=norm,
        tied=bool(config.tie_word_embeddings),
        final_norm_bias=True,
        names=NAMES,
    )

"""Command R (Cohere, 2024): one layer norm ahead of attention and MLP side by side, interleaved positions, scaled
logits; Command R+ also has a layer norm of each query and key head, with weights of its own.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values
from vllm.model_executor.models.spec import MLP, AttentionMixer, DecoderSpec, LayerNorms, LayerSpec
from vllm.ops.norm import Norm


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    num_heads, num_kv_heads, head_dim = config_values.heads(config)
    norm = Norm(config.layer_norm_eps, kind="layer", rounds_first=False)
    normalises = bool(getattr(config, "use_qk_norm", False))
    layer = LayerSpec(
        mixer=AttentionMixer(
            num_heads,
            num_kv_heads,
            head_dim,
            scale=head_dim**-0.5,
            rope=config_values.rope(config, max_positions, interleaved=True),
            qk_norm=norm if normalises else None,
            qk_norm_of_each=normalises,
            biases=config_values.biases(config, "attention_bias", "q k v o"),
        ),
        ffn=MLP(config.intermediate_size, config_values.activation(config)),
        norms=LayerNorms(norm, pre_ffn=False),
        parallel=True,
    )
    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=(layer,) * config.num_hidden_layers,
        final_norm=norm,
        tied=bool(config.tie_word_embeddings),
        logits_multiplier=float(config.logit_scale),
    )

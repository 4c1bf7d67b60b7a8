"""Phi-3.5-MoE (Abdin et al., 2024): layer norms with biases, LongRoPE, a bias of the output projection, and two experts
a token, chosen by SparseMixer.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from vllm.model_executor.models import config_values, llama, mixtral
from vllm.model_executor.models.spec import LAYER_NAMES, CheckpointNames, DecoderSpec, LayerNorms, MoE, RopeSpec
from vllm.ops.moe import Routing
from vllm.ops.norm import Norm

NAMES = CheckpointNames(
    parts={**LAYER_NAMES, "router": "mlp.router"},
    spellings={**mixtral.SPELLINGS, ".mlp.gate.": ".mlp.router."},
)
_FACTORS = ("short_mscale", "long_mscale")


def decoder(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    config_values.refuse(config, mlp_bias=False, num_experts_per_tok=2)
    spec = llama.decoder(config, max_positions, rope_keys=frozenset(_FACTORS))
    norm = Norm(config.rms_norm_eps, kind="layer", rounds_first=False)
    mixer = replace(
        spec.layers[0].mixer,
        rope=_rope(config, max_positions, spec.layers[0].mixer.rope),
        window=config_values.window(config, max_positions),
    )
    ffn = MoE(
        config.num_local_experts,
        config.intermediate_size,
        config_values.activation(config),
        Routing(config.num_experts_per_tok, scoring="sparsemixer", jitter=float(config.router_jitter_noise)),
    )
    layer = replace(spec.layers[0], mixer=mixer, ffn=ffn, norms=LayerNorms(norm, has_bias=True))
    return replace(
        spec,
        layers=(layer,) * len(spec.layers),
        final_norm=norm,
        final_norm_bias=True,
        head_bias=bool(config.lm_head_bias),
        names=NAMES,
    )


def _rope(config: PretrainedConfig, max_positions: int, rope: RopeSpec | None) -> RopeSpec | None:
    """LongRoPE whose factor is a number of the configuration, one for each of its two sets of frequencies.

    The longest sequence that is served picks the set, as for Phi-3; transformers 5 turns by the short one always.
    """
    parameters = config_values.rope_parameters(config)
    short, long = (parameters.get(key) for key in _FACTORS)
    if rope is None or parameters["rope_type"] == "default" or short is None or long is None:
        return rope
    trained = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    return replace(rope, factor=float(long if max_positions > trained else short))

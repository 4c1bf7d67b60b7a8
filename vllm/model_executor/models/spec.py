"""A decoder as data: what `decoder.py` builds, the CPU program is lowered from, and trials take one layer of each kind
of.

A layer computes, with m its residual multiplier and missing norms left out:

    sequential   x += m · post_mixer(mixer(pre_mixer(x)));  x += m · post_ffn(ffn(pre_ffn(x)))
    parallel     n = pre_mixer(x);  x += m · (mixer(n) + ffn(n))

and ends with x *= s where the checkpoint has a number s for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm.ops.activation import Activation
from vllm.ops.moe import ClampedSwiGLU, Routing
from vllm.ops.norm import Norm


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions (Su et al., 2021).

    Attributes:
        frequencies: Angular frequency of each pair of dimensions, in radians a token; R/2 of them turn the first R
            dimensions of a head.
        factor: Of cosines and sines ("attention factor" of YaRN and LongRoPE).
        interleaved: Dimension 2i turns with 2i + 1; otherwise i with i + R/2.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True)
class QueryGrowth:
    """Queries grow with their position p, after they are turned: `q · (1 + beta · ln(1 + floor(p / length)))`, so that
    attention over many keys stays as sharp as over few ("attention temperature" of Llama 4).

    Attributes:
        length: Positions, in tokens, in which the factor stays the same.
    """

    beta: float
    length: int


@dataclass(frozen=True)
class AttentionMixer:
    """Attention over the KV cache.

    Attributes:
        num_heads, num_kv_heads, head_dim: Over all ranks.
        scale: Factor of the scores.
        rope: None: positions are not encoded.
        window, softcap, sinks: As of `AttentionSpec`.
        qk_norm: Norm of queries and keys, ahead of their positions.
        qk_norm_over_all: It is over all heads as one row, not over each.
        qk_norm_of_each: It is over each head, and each has weights of its own: [heads, head_dim].
        v_norm: Norm of each value head, without weights.
        v_is_k: Values are made by the matrix of the keys (and are neither turned nor normalised with them).
        query_growth: None: queries do not grow.
        biases: Which of `q`, `k`, `v`, `o` have one.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec | None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    qk_norm: Norm | None = None
    qk_norm_over_all: bool = False
    qk_norm_of_each: bool = False
    v_norm: Norm | None = None
    v_is_k: bool = False
    query_growth: QueryGrowth | None = None
    biases: frozenset[str] = frozenset()


@dataclass(frozen=True)
class MLP:
    """Two or three matrices: `down(activation(gate(x)) · up(x))`, or `down(activation(up(x)))` without a gate.

    Attributes:
        size: Of the middle, over all ranks.
        biases: Which of `gate`, `up`, `down` have one.
    """

    size: int
    activation: Activation
    gated: bool = True
    biases: frozenset[str] = frozenset()


@dataclass(frozen=True)
class MoE:
    """A mixture of experts instead of one MLP; each token goes to a few of them (see `vllm.ops.moe`).

    With a norm `beside`, the shared MLP is as large as a dense layer's, and each has norms of its own (Gemma 4):

        post_shared(shared(pre_ffn(x))) + post_experts(experts(pre_experts(x)))

    and the router reads x normalised, times a learned vector and `hidden_size ** -0.5`.

    Attributes:
        num_experts: Over all ranks.
        size: Of the middle of each, over all ranks.
        activation: Of each; all have a gate.
        routing: How experts are chosen.
        biases: Each expert has them, of all its matrices.
        router_bias: The router has one.
        router_float32: Its weights and its product are float32, whatever the dtype of the network.
        correction: Scores have a learned correction, for the choice alone.
        expert_factors: The checkpoint has a number for each expert that its output is multiplied by.
        shared: An MLP that every token takes besides.
        shared_gate: It is multiplied by `sigmoid(w · x)`.
        beside: See above.
        columns: The checkpoint has the matrices of all experts as [experts, in, out], gate and up alternating.
        mxfp4: The checkpoint has them in MXFP4, gate and up alternating if `columns`.
    """

    num_experts: int
    size: int
    activation: Activation | ClampedSwiGLU
    routing: Routing
    biases: bool = False
    router_bias: bool = False
    router_float32: bool = False
    correction: bool = False
    expert_factors: bool = False
    shared: MLP | None = None
    shared_gate: bool = False
    beside: Norm | None = None
    columns: bool = False
    mxfp4: bool = False


@dataclass(frozen=True)
class LayerNorms:
    """Norms of a layer; see the formulas above. All are of one kind.

    Attributes:
        norm: Kind and numbers.
        has_bias: Each has a bias beside its weight.
    """

    norm: Norm
    pre_mixer: bool = True
    post_mixer: bool = False
    pre_ffn: bool = True
    post_ffn: bool = False
    has_bias: bool = False


@dataclass(frozen=True)
class LayerSpec:
    """One layer; equal ones are of one kind.

    Attributes:
        parallel, residual_multiplier: See the formulas above.
        has_scalar: The checkpoint has a number that the stream is multiplied by at the end.
    """

    mixer: AttentionMixer
    ffn: MLP | MoE
    norms: LayerNorms
    parallel: bool = False
    residual_multiplier: float = 1.0
    has_scalar: bool = False


LAYER_NAMES: Mapping[str, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "sinks": "self_attn.sinks",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "pre_mixer": "input_layernorm",
    "pre_ffn": "post_attention_layernorm",
    "scalar": "layer_scalar",
    "router": "mlp.gate",
    "correction": "mlp.gate.e_score_correction_bias",
    "experts.gate_up": "mlp.experts.gate_up_proj",
    "experts.down": "mlp.experts.down_proj",
    "expert.gate": "mlp.experts.{}.gate_proj",
    "expert.up": "mlp.experts.{}.up_proj",
    "expert.down": "mlp.experts.{}.down_proj",
    "shared.gate": "mlp.shared_expert.gate_proj",
    "shared.up": "mlp.shared_expert.up_proj",
    "shared.down": "mlp.shared_expert.down_proj",
    "shared_gate": "mlp.shared_expert_gate",
}
"""Part of a layer → its name in most checkpoints, behind `layers.<i>.`. `qkv` and `gate_up`, where a checkpoint has
them, stand for all of their parts in one tensor. Experts are there all in one tensor (`experts.…`), or one by one
(`expert.…`, with the place of their number)."""


@dataclass(frozen=True)
class CheckpointNames:
    """What a checkpoint calls its tensors, without `.weight` and `.bias`.

    Attributes:
        layers: Ahead of a layer's index.
        parts: As `LAYER_NAMES`.
        ignored: Ends of names of tensors that follow from the configuration.
        prefixes: Beginning of a name → what stands for it above, for checkpoints that have a language model among
            other things.
        others: Beginnings of names of those other things.
        spellings: Piece of a name → what stands for it above, for checkpoints that spell it otherwise; in order.
    """

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    parts: Mapping[str, str] = field(default_factory=lambda: LAYER_NAMES)
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    prefixes: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    spellings: Mapping[str, str] = field(default_factory=dict)

    def layer(self, index: int, part: str) -> tuple[str, ...]:
        """All that a checkpoint may call a part of a layer, its plain name first."""
        plain = f"{self.layers}.{index}.{self.parts[part]}"
        others = [prefix + plain.removeprefix(p) for prefix, p in self.prefixes.items() if plain.startswith(p)]
        return (plain, *others)

    def plain(self, name: str) -> str | None:
        """Name of a tensor as it is without `prefixes` and `spellings`; None for one that is not read."""
        if name.endswith(self.ignored) or name.startswith(self.others):
            return None
        for other, piece in self.spellings.items():
            name = name.replace(other, piece)
        for prefix, plain in self.prefixes.items():
            if name.startswith(prefix):
                return plain + name.removeprefix(prefix)
        return name


@dataclass(frozen=True)
class DecoderSpec:
    """A whole network.

    Attributes:
        tied: The output projection is the embedding table.
        head_bias: It has a bias.
        embedding_multiplier: Of the embeddings, rounded to their dtype.
        logits_multiplier: Of the logits.
        logits_softcap: Logits l become `softcap · tanh(l / softcap)`, after the multiplier.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: Norm
    tied: bool
    final_norm_bias: bool = False
    head_bias: bool = False
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None
    names: CheckpointNames = field(default_factory=CheckpointNames)

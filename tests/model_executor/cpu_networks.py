"""Small decoder networks as data, computed twice: by torch in float64 and as a program of the compiled CPU kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.nn import functional

from vllm.ops.cpu.kernels import (
    AttentionOptions,
    DecoderLayer,
    DecoderProgram,
    Norm,
    PackedHead,
    PackedMatrix,
    Rope,
)

ACTIVATE = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
    "relu2": lambda x: functional.relu(x).square(),
}
POSITIONS = 160


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class LayerOptions:
    """What a test asks of a layer; by default it is Llama's."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    inner: int = 112
    norms: tuple[str, ...] = ("before_attention", "before_mlp")
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    biases: tuple[str, ...] = ()
    qk_norm: Literal["head", "each", "all"] | None = None  # each: every head has weights of its own
    v_norm: bool = False
    rotary_dim: int | None = None  # None: all of the head; 0: not turned
    interleaved: bool = False
    rope_base: float = 1e4
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    query_factors: bool = False
    activation: str = "silu"
    gated: bool = True
    parallel: bool = False
    residual_factor: float = 1.0
    layer_factor: float = 1.0


@dataclass
class NetworkOptions:
    layers: list[LayerOptions]
    hidden: int = 96
    vocab: int = 107
    embedding_factor: float = 1.0
    logits_factor: float = 1.0
    logits_softcap: float | None = None


@dataclass
class Layer:
    options: LayerOptions
    attention: AttentionOptions
    norms: dict[str, Norm]
    weights: dict[str, torch.Tensor]  # as they are held, in float32
    biases: dict[str, torch.Tensor] = field(default_factory=dict)


class Network:
    """Random weights, always the same.

    Args:
        dtype: Of the weights: float32 or bfloat16.
        int8: Quantise them.
    """

    def __init__(self, options: NetworkOptions, dtype: torch.dtype, int8: bool) -> None:
        self.options, self.dtype, self.int8 = options, dtype, int8
        self._seed = 0
        hidden = options.hidden
        self.embeddings = self._random(options.vocab, hidden).to(dtype)
        self.layers = [self._layer(layer) for layer in options.layers]
        self.final_norm = Norm(hidden, 1e-5, 1 + 0.3 * self._random(hidden))
        self.head_weight = self._weight(options.vocab, hidden)

    def _random(self, *shape: int) -> torch.Tensor:
        self._seed += 1
        return randn(*shape, seed=self._seed)

    def _weight(self, n: int, k: int) -> torch.Tensor:
        return (self._random(n, k) * 1.5 / k**0.5).to(self.dtype)

    def _norm(self, size: int, options: LayerOptions, heads: int = 1) -> Norm:
        bias = 0.3 * self._random(heads * size) if options.norm_bias else None
        return Norm(size, 1e-5, 1 + 0.3 * self._random(heads * size), bias, options.norm_kind, heads)

    def _layer(self, o: LayerOptions) -> Layer:
        hidden, d = self.options.hidden, o.head_dim
        sizes = {
            "q": (o.heads * d, hidden),
            "k": (o.kv_heads * d, hidden),
            "v": (o.kv_heads * d, hidden),
            "o": (hidden, o.heads * d),
            "gate": (o.inner, hidden),
            "up": (o.inner, hidden),
            "down": (hidden, o.inner),
        }
        weights = {name: self._weight(*size) for name, size in sizes.items() if o.gated or name != "gate"}
        q_norm = k_norm = None
        if o.qk_norm is not None:
            q_norm, k_norm = (
                self._norm(count * d if o.qk_norm == "all" else d, o, count if o.qk_norm == "each" else 1)
                for count in (o.heads, o.kv_heads)
            )
        attention = AttentionOptions(
            o.heads,
            o.kv_heads,
            d,
            d**-0.5 if o.scale is None else o.scale,
            o.window,
            o.softcap,
            self._random(o.heads) if o.sinks else None,
            q_norm,
            k_norm,
            Norm(d, 1e-5) if o.v_norm else None,
            None if o.rotary_dim == 0 else Rope(rotary_table(o.rotary_dim or d, o.rope_base), o.interleaved),
            1 + 0.02 * torch.arange(POSITIONS).float() if o.query_factors else None,
        )
        norms = {name: self._norm(hidden, o) for name in o.norms}
        biases = {name: self._random(sizes[name][0]).to(self.dtype) for name in o.biases}
        return Layer(o, attention, norms, weights, biases)

    # As a program -----------------------------------------------------------------------------------------------------

    def program(self) -> DecoderProgram:
        layers = []
        for layer in self.layers:
            o, b = layer.options, layer.biases

            def pack(*names: str, layer: Layer = layer, interleave: bool = False) -> PackedMatrix:
                weights = [layer.weights[name] for name in names]
                return PackedMatrix.of_parts(weights, [layer.biases.get(name) for name in names], interleave, self.int8)

            layers.append(
                DecoderLayer(
                    layer.attention,
                    pack("q", "k", "v"),
                    pack("o"),
                    pack("gate", "up", interleave=True) if o.gated else pack("up"),
                    pack("down"),
                    activation=o.activation,
                    gated=o.gated,
                    parallel=o.parallel,
                    residual_factor=o.residual_factor,
                    layer_factor=o.layer_factor,
                    **layer.norms,
                )
            )
            assert set(b) <= set(layer.weights)
        return DecoderProgram(layers, self.final_norm, self.options.embedding_factor)

    def head(self) -> PackedHead:
        matrix = PackedMatrix(self.head_weight, int8=self.int8)
        return PackedHead(matrix, self.options.logits_factor, self.options.logits_softcap)

    # In torch ---------------------------------------------------------------------------------------------------------

    def states(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Of every token of one sequence, from the first: int64 [T] → float64 [T, hidden_size]."""
        hidden = self.embeddings[token_ids].double() * self.options.embedding_factor
        for layer in self.layers:
            o = layer.options
            x = normed(layer.norms.get("before_attention"), hidden)
            added = normed(layer.norms.get("after_attention"), self._linear(layer, "o", self._attend(layer, x)))
            hidden = hidden + o.residual_factor * added
            if not o.parallel:
                x = normed(layer.norms.get("before_mlp"), hidden)
            up = self._linear(layer, "up", x)
            inner = (
                ACTIVATE[o.activation](self._linear(layer, "gate", x)) * up if o.gated else ACTIVATE[o.activation](up)
            )
            added = normed(layer.norms.get("after_mlp"), self._linear(layer, "down", inner))
            hidden = (hidden + o.residual_factor * added) * o.layer_factor
        return normed(self.final_norm, hidden)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        logits = states @ self._held(self.head_weight).T * self.options.logits_factor
        cap = self.options.logits_softcap
        return logits if cap is None else cap * (logits / cap).tanh()

    def _held(self, weight: torch.Tensor) -> torch.Tensor:
        if not self.int8:
            return weight.double()
        factor = weight.float().abs().amax(dim=1, keepdim=True) / 127
        return (weight.float() / factor).round().double() * factor.double()

    def _linear(self, layer: Layer, name: str, x: torch.Tensor) -> torch.Tensor:
        out = x @ self._held(layer.weights[name]).T
        return out + layer.biases[name].double() if name in layer.biases else out

    def _attend(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        a, d, count = layer.attention, layer.attention.head_dim, len(x)
        positions = torch.arange(count)
        heads = {"q": a.num_heads, "k": a.num_kv_heads, "v": a.num_kv_heads}
        parts = {}
        for name, norm in (("q", a.q_norm), ("k", a.k_norm), ("v", a.v_norm)):
            part = self._linear(layer, name, x)
            part = normed(norm, part.view(count, -1, norm.size) if norm is not None else part)
            parts[name] = part.reshape(count, heads[name], d)
            if name != "v" and a.rope is not None:
                parts[name] = turned(a.rope, positions, parts[name])
        q = parts["q"] if a.query_factors is None else parts["q"] * a.query_factors[:count, None, None].double()
        share = a.num_heads // a.num_kv_heads
        k, v = (parts[name].repeat_interleave(share, dim=1) for name in ("k", "v"))
        scores = capped(torch.einsum("mhd,nhd->hmn", q, k) * a.scale, a.softcap)
        return softmax_of(scores, positions, positions, a.window, a.sinks, v).flatten(1)


def softmax_of(
    scores: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    window: int | None,
    sinks: torch.Tensor | None,
    v: torch.Tensor,
) -> torch.Tensor:
    """Scores [H, M, N] of queries and keys at these positions, values [N, H, D] → [M, H, D]."""
    distance = queries[:, None] - keys
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores)[:, None, None].expand(-1, scores.shape[1], 1)), dim=2)
    weights = scores.softmax(dim=2)[:, :, : len(keys)]
    return torch.einsum("hmn,nhd->mhd", weights, v)


def capped(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    return scores if cap is None else cap * (scores / cap).tanh()


def normed(norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, in float64."""
    if norm is None:
        return x
    x = x.double()
    if norm.kind == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    x = x * (x.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt()
    weight, bias = (
        w if w is None or norm.heads == 1 else w.view(norm.heads, norm.size) for w in (norm.weight, norm.bias)
    )
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def rotary_table(dim: int, base: float) -> torch.Tensor:
    angles = torch.outer(torch.arange(float(POSITIONS)), base ** -(torch.arange(0, dim, 2) / dim))
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def turned(rope: Rope, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[T, H, D], as complex numbers."""
    dim = rope.cos_sin.shape[1]
    cos, sin = rope.cos_sin[positions].double()[:, None].chunk(2, dim=2)
    head = x[..., :dim]
    a, b = (head[..., ::2], head[..., 1::2]) if rope.interleaved else head.chunk(2, dim=-1)
    pairs = torch.complex(a, b) * torch.complex(cos, sin)
    new = torch.view_as_real(pairs).flatten(-2) if rope.interleaved else torch.cat((pairs.real, pairs.imag), dim=-1)
    return torch.cat((new, x[..., dim:]), dim=-1)

"""One network for every decoder that `DecoderSpec` can say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from vllm.attention.layer import Attention, ForwardContext
from vllm.attention.spec import AttentionSpec
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.exceptions import StartupError
from vllm.kv_cache.spec import LayerCache
from vllm.logger import init_logger
from vllm.model_executor.cpu_program import CpuProgram
from vllm.model_executor.layers.embedding import OutputProjection, VocabParallelEmbedding
from vllm.model_executor.layers.layernorm import HeadNorms, RowNorm, SplitRowNorm
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    RowParallelLinear,
    copy_checked,
    shard,
)
from vllm.model_executor.layers.moe import ExpertsBesideMLP, MixtureOfExperts, StackedExperts
from vllm.model_executor.layers.quantization.base import LinearMethod
from vllm.model_executor.layers.quantization.cpu_packed import CpuPacked
from vllm.model_executor.layers.quantization.select import linear_method
from vllm.model_executor.layers.rotary_embedding import QueryFactors, RotaryEmbedding
from vllm.model_executor.models.base import CausalLM
from vllm.model_executor.models.spec import MLP, AttentionMixer, CheckpointNames, DecoderSpec, LayerSpec, MoE
from vllm.model_executor.models.weight_map import Weight, layer_formats, linears, weight_map
from vllm.ops.cpu.kernels import CompiledSteps, SequenceRows
from vllm.ops.packed8 import Rows8
from vllm.ops.rope import QkNorm, Rope
from vllm.transformers_utils.quantization_config import GGUFFormat, QuantizationConfig

logger = init_logger(__name__)

# Scales of attention's own tensors, which are not quantised here.
_SCALES_OF_ATTENTION = (".k_scale", ".v_scale", ".q_scale", ".prob_scale", ".output_scale")


@dataclass(frozen=True)
class Build:
    """How a network is made on this rank.

    Attributes:
        tp: Its place among the tensor-parallel ranks.
        method: How linear layers hold weights that are whole.
        quantization: Which weights of the checkpoint are not; None: all are whole.
        kernels: The device has kernels for these; otherwise they are dequantised as they are loaded.
        max_positions: Longest sequence.
        dtype: Of weights and activations.
        compiled: `finish` hands the layers over to the compiled CPU program; `method` packs for it, and
            `CpuProgram.misfit` has nothing against it.
    """

    tp: TensorParallelGroup
    method: LinearMethod
    max_positions: int
    dtype: torch.dtype
    compiled: bool = False
    quantization: QuantizationConfig | None = None
    kernels: bool = False


def attention_spec(mixer: AttentionMixer, tp: TensorParallelGroup, dtype: torch.dtype) -> AttentionSpec:
    """What a mixer asks of attention on one rank.

    Raises:
        ValueError: its heads cannot be split over the ranks.
    """
    return AttentionSpec(
        num_heads=tp.divide(mixer.num_heads, "attention heads"),
        num_kv_heads=tp.share_kv_heads(mixer.num_kv_heads)[0],
        head_dim=mixer.head_dim,
        v_dim=mixer.head_dim,
        scale=mixer.scale,
        dtype=dtype,
        window=mixer.window,
        softcap=mixer.softcap,
        sinks=mixer.sinks,
    )


def attention_specs(spec: DecoderSpec, tp: TensorParallelGroup, dtype: torch.dtype) -> list[AttentionSpec]:
    """What the layers of a network ask of attention, each different wish once."""
    return list(dict.fromkeys(attention_spec(layer.mixer, tp, dtype) for layer in spec.layers))


Methods = Mapping[str, LinearMethod]
"""How the linear layers of a decoder layer (`mixer.qkv`, …) hold their weights."""


def head_norm(
    mixer: AttentionMixer, num_heads: int, copies: int, tp: TensorParallelGroup
) -> RowNorm | HeadNorms | SplitRowNorm | None:
    """The norm of queries or of keys.

    Args:
        num_heads: Of this rank.
        copies: How many neighbouring ranks have the same ones.
    """
    norm = mixer.qk_norm
    if norm is None:
        return None
    if mixer.qk_norm_of_each:
        return HeadNorms(num_heads, mixer.head_dim, norm, first=tp.rank // copies * num_heads)
    if not mixer.qk_norm_over_all:
        return RowNorm(mixer.head_dim, norm)
    size = num_heads * mixer.head_dim
    return RowNorm(size, norm) if tp.world_size == 1 else SplitRowNorm(size, norm, tp, copies)


class AttentionBlock(nn.Module):
    """Projections around attention.

    Args:
        spec: What it computes.
        layer_index: Which K/V tensors are its own.
        wish: Its spec of attention on this rank.
        plan: Place of `wish` among the network's different ones.
        rotary: Its table, which other layers use too.
        growth: Factors of its queries, which other layers use too.
    """

    def __init__(
        self,
        spec: AttentionMixer,
        hidden_size: int,
        layer_index: int,
        wish: AttentionSpec,
        plan: int,
        rotary: RotaryEmbedding | None,
        growth: QueryFactors | None,
        build: Build,
        methods: Methods,
    ) -> None:
        super().__init__()
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        parts = {"q": q_size, "k": kv_size, "v": kv_size}
        copies = dict.fromkeys("kv", build.tp.share_kv_heads(spec.num_kv_heads)[1])
        self.qkv = MergedColumnParallelLinear(hidden_size, parts, spec.biases, build.tp, methods["mixer.qkv"], copies)
        self.o = RowParallelLinear(q_size, hidden_size, "o" in spec.biases, build.tp, methods["mixer.o"])
        self.attention = Attention(layer_index, wish, plan)
        self.q_norm = head_norm(spec, wish.num_heads, 1, build.tp)
        self.k_norm = head_norm(spec, wish.num_kv_heads, copies["k"], build.tp)
        self.v_norm = None
        if spec.v_norm is not None:
            self.v_norm = HeadNorms(wish.num_kv_heads, wish.v_dim, spec.v_norm, has_weights=False)
        # The norms that backends do not fuse with the turn of q and k, and where their rows lie in `qkv`.
        ends = [wish.num_heads * wish.head_dim, wish.num_kv_heads * wish.head_dim, wish.num_kv_heads * wish.v_dim]
        ends = [sum(ends[: i + 1]) for i in range(3)]
        norms = zip((self.q_norm, self.k_norm, self.v_norm), [0, *ends], ends, strict=False)
        self._head_norms = [
            (norm, first, end) for norm, first, end in norms if isinstance(norm, HeadNorms | SplitRowNorm)
        ]
        # In a tuple, so that the tables are no part of each layer that uses them.
        self._tables = (rotary, growth)
        self._tp = build.tp

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads this rank's `sinks` (`kind`); it has no parts."""
        sinks = self.attention.sinks
        if sinks is None:
            raise ValueError(f"{kind} are of no use to this attention")
        copy_checked(sinks, shard(tensor, 0, len(sinks), self._tp, kind), kind)

    def attend(self, qkv: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """The packed output of `qkv` → what `o` takes; writes K and V."""
        self._normalise(qkv)
        return self.attention(qkv, self.rope(), self._qk_norm(), context, self.query_factors())

    def write(self, qkv: torch.Tensor, context: ForwardContext) -> None:
        """Only writes K and V."""
        self._normalise(qkv)
        self.attention.write(qkv, self.rope(), self._qk_norm(), context)

    def rope(self) -> Rope | None:
        rotary = self._tables[0]
        return None if rotary is None else rotary.rope()

    def query_factors(self) -> torch.Tensor | None:
        growth = self._tables[1]
        return None if growth is None else growth.factors

    def _qk_norm(self) -> QkNorm | None:
        """The norms that backends fuse with the turn of q and k."""
        if not isinstance(self.q_norm, RowNorm) or not isinstance(self.k_norm, RowNorm):
            return None
        return QkNorm(self.q_norm.norm, self.q_norm.weight, self.k_norm.weight)

    def _normalise(self, qkv: torch.Tensor) -> None:
        """The norms that they do not, in place."""
        for norm, first, end in self._head_norms:
            part = qkv[:, first:end]
            part.copy_(norm(part))


class FeedForward(nn.Module):
    def __init__(self, spec: MLP, hidden_size: int, build: Build, methods: Methods) -> None:
        super().__init__()
        self.activation, self.gated = spec.activation, spec.gated
        parts = {"gate": spec.size, "up": spec.size} if spec.gated else {"up": spec.size}
        self.gate_up = MergedColumnParallelLinear(hidden_size, parts, spec.biases, build.tp, methods["ffn.gate_up"])
        self.down = RowParallelLinear(spec.size, hidden_size, "down" in spec.biases, build.tp, methods["ffn.down"])

    def middle(self, x: torch.Tensor | Rows8) -> torch.Tensor | Rows8:
        """What `down` takes."""
        return self.down.method.activated(self.down, self.gate_up(x), self.activation, self.gated)

    def forward(self, x: torch.Tensor | Rows8, residual: torch.Tensor, join: Join) -> torch.Tensor:
        """The stream [T, hidden_size] after the block; the one before it may be overwritten."""
        out: torch.Tensor = join(self.down, self.middle(x), residual)
        return out


class Join(nn.Module):
    """Adds what a block makes to the residual stream: `residual + multiplier · norm(block(x))`.

    Attributes:
        is_sum: There is neither a norm nor a multiplier, so that a block may add the stream itself.
    """

    def __init__(self, norm: RowNorm | None, multiplier: float) -> None:
        super().__init__()
        self.norm = norm
        self.multiplier = multiplier
        self.is_sum = norm is None and multiplier == 1.0

    def forward(self, linear: RowParallelLinear, x: torch.Tensor | Rows8, residual: torch.Tensor) -> torch.Tensor:
        """The stream [T, hidden_size] after a block that ends with `linear`; the one before it may be overwritten."""
        return linear(x, residual) if self.is_sum else self.add(linear(x), residual)

    def add(self, out: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The stream after a block that has made `out`."""
        return torch.add(residual, out if self.norm is None else self.norm(out), alpha=self.multiplier)


def _feed_forward(spec: MLP | MoE, hidden_size: int, build: Build, methods: Methods) -> FeedForward | MixtureOfExperts:
    if isinstance(spec, MLP):
        return FeedForward(spec, hidden_size, build, methods)
    shared = None
    if spec.shared is not None:
        of_shared = {f"ffn.{name}": methods[f"ffn.shared.{name}"] for name in ("gate_up", "down")}
        shared = FeedForward(spec.shared, hidden_size, build, of_shared)
    kind = MixtureOfExperts if spec.beside is None else ExpertsBesideMLP
    return kind(spec, hidden_size, shared, build.tp)


class DecoderLayer(nn.Module):
    """One layer; see `spec` for what it computes."""

    def __init__(
        self, spec: LayerSpec, hidden_size: int, mixer: AttentionBlock, build: Build, methods: Methods
    ) -> None:
        super().__init__()
        norms = spec.norms

        def norm(wanted: bool) -> RowNorm | None:
            return RowNorm(hidden_size, norms.norm, norms.has_bias) if wanted else None

        self.parallel = spec.parallel
        self.mixer = mixer
        self.ffn = _feed_forward(spec.ffn, hidden_size, build, methods)
        self.pre_mixer = norm(norms.pre_mixer) or nn.Identity()
        self.after_mixer = Join(norm(norms.post_mixer), spec.residual_multiplier)
        self.pre_ffn = norm(norms.pre_ffn and not spec.parallel) or nn.Identity()
        self.after_ffn = Join(norm(norms.post_ffn), spec.residual_multiplier)
        self.scalar = nn.Parameter(torch.empty(1), requires_grad=False) if spec.has_scalar else None

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads the `scalar` (`kind`); it has no parts."""
        copy_checked(getattr(self, kind), tensor, kind)

    def forward(self, residual: torch.Tensor, context: ForwardContext, wanted: torch.Tensor | None) -> torch.Tensor:
        """Returns the residual stream of the wanted tokens or (None) of all; the one before it may be overwritten."""
        mixer, ffn = self.mixer, self.ffn
        # Side by side, both halves take one norm's result.
        normed = self.pre_mixer(residual) if self.parallel else _normalised(self.pre_mixer, residual, mixer.qkv)
        qkv = mixer.qkv(normed)
        if wanted is not None and not len(wanted):
            mixer.write(qkv, context)
            return residual[:0]
        x = mixer.attend(qkv, context)
        if wanted is not None:
            x, residual = x[wanted], residual[wanted]
            normed = normed[wanted] if self.parallel else normed
        residual = self.after_mixer(mixer.o, x, residual)
        # Experts and their router all take what is normalised.
        first = ffn.gate_up if isinstance(ffn, FeedForward) else None
        before_ffn = normed if self.parallel else _normalised(self.pre_ffn, residual, first)
        out: torch.Tensor = ffn(before_ffn, residual, self.after_ffn)
        return out if self.scalar is None else out.mul_(self.scalar)


def _normalised(norm: nn.Module, x: torch.Tensor, linear: LinearBase | None) -> torch.Tensor | Rows8:
    """What a linear layer, or (None) several, take of the residual stream."""
    if isinstance(norm, RowNorm):
        return norm(x) if linear is None else linear.method.normalised(linear, x, norm)
    return x


class Decoder(CausalLM):
    """Token ids → hidden states → logits.

    Args:
        spec: What it computes.
        build: How it is made on this rank.

    Attributes:
        embedding_multiplier: Rounded to the dtype of the embeddings.
        program: Computes all layers in one call, once `finish` has made it; None: torch computes them one by one.

    Raises:
        ValueError: it cannot be split over the ranks.
    """

    def __init__(self, spec: DecoderSpec, build: Build) -> None:
        super().__init__()
        tp = build.tp
        self.spec = spec
        self.build = build
        self.hidden_size = spec.hidden_size
        self.dtype = build.dtype
        self.attention_specs = attention_specs(spec, tp, build.dtype)
        ropes = list(dict.fromkeys(layer.mixer.rope for layer in spec.layers if layer.mixer.rope is not None))
        tables = {
            rope: RotaryEmbedding(rope.frequencies, rope.factor, rope.interleaved, build.max_positions)
            for rope in ropes
        }
        self.rotaries: Sequence[RotaryEmbedding] = nn.ModuleList(tables.values())  # type: ignore[assignment]
        growths = list(dict.fromkeys(layer.mixer.query_growth for layer in spec.layers if layer.mixer.query_growth))
        factors = {growth: QueryFactors(growth.beta, growth.length, build.max_positions) for growth in growths}
        self.query_factors = nn.ModuleList(factors.values())
        self.embedding = self._table(spec.names.embedding)
        layers = []
        for i, layer in enumerate(spec.layers):
            wish = attention_spec(layer.mixer, tp, build.dtype)
            rotary = None if layer.mixer.rope is None else tables[layer.mixer.rope]
            plan = self.attention_specs.index(wish)
            growth = None if layer.mixer.query_growth is None else factors[layer.mixer.query_growth]
            methods = self._methods(i)
            try:
                mixer = AttentionBlock(layer.mixer, spec.hidden_size, i, wish, plan, rotary, growth, build, methods)
                layers.append(DecoderLayer(layer, spec.hidden_size, mixer, build, methods))
            except ValueError as error:
                raise ValueError(f"layer {i}: {error}") from None
        self.layers: Sequence[DecoderLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = RowNorm(spec.hidden_size, spec.final_norm, spec.final_norm_bias)
        table = self.embedding if spec.tied else self._table(spec.names.head)
        self.head = OutputProjection(table, spec.logits_multiplier, spec.logits_softcap, spec.head_bias)
        self.program: CpuProgram | None = None
        self.embedding_multiplier = float(torch.tensor(spec.embedding_multiplier, dtype=build.dtype, device="cpu"))

    def _table(self, name: str) -> VocabParallelEmbedding:
        quantization = self.build.quantization
        format = None if quantization is None else quantization.format_of((name,))
        block_type = format.types[0][1] if isinstance(format, GGUFFormat) else None
        if block_type is not None and self.spec.head_bias:
            raise ValueError("its output layer has a bias, which weights in blocks are multiplied without")
        return VocabParallelEmbedding(self.spec.vocab_size, self.spec.hidden_size, self.build.tp, block_type)

    def _methods(self, index: int) -> Methods:
        formats = layer_formats(self.spec, index, self.build.quantization)
        method, kernels = self.build.method, self.build.kernels
        return {name: linear_method(formats.get(name), method, kernels) for name in linears(self.spec.layers[index])}

    def caches(self) -> list[LayerCache]:
        return [layer.mixer.attention.cache for layer in self.layers]

    def layer_kinds(self) -> list[int]:
        first = {layer: i for i, layer in reversed(list(enumerate(self.spec.layers)))}
        return sorted(first.values())

    @contextmanager
    def only_layers(self, indexes: Sequence[int]) -> Iterator[None]:
        layers = self.layers
        self.layers = nn.ModuleList(layers[i] for i in indexes)  # type: ignore[assignment]
        try:
            yield
        finally:
            self.layers = layers

    def forward(self, token_ids: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        residual = self.embedding(token_ids)
        if self.program is not None:
            return self.program.forward(residual, context)
        residual = residual.to(self.dtype)
        if self.embedding_multiplier != 1.0:
            residual.mul_(self.embedding_multiplier)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            residual = layer(residual, context, context.wanted if i == last else None)
        return self.norm(residual)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.head.logits(hidden, out)

    def most_likely(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head.most_likely(hidden)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        rows = weight_map(self.spec, self.build.quantization)
        names: CheckpointNames = self.spec.names
        missing = {name for name, row in rows.items() if row.whole is None}
        pieces: dict[str, set[str]] = {}
        for piece, row in rows.items():
            if row.whole is not None:
                pieces.setdefault(row.whole, set()).add(piece)
        left = set(rows)
        head: torch.Tensor | None = None
        useless = 0
        for stored, tensor in weights:
            name = names.plain(stored)
            if name is None:
                continue
            if self.spec.tied and name == f"{names.head}.weight":
                head = tensor
                continue
            if name not in rows and self._is_of_no_use(name, tensor):
                useless += 1
                continue
            if name not in left:
                what = "twice" if name in rows else "that this architecture does not know"
                raise StartupError(f"The checkpoint has a tensor {stored!r} {what}.")
            try:
                self._load(rows[name], tensor)
            except ValueError as error:
                raise StartupError(f"The checkpoint's {stored} does not fit its configuration: {error}.") from None
            left.discard(name)
            whole = rows[name].whole
            if whole is None:
                left -= pieces.get(name, set())
            else:
                left.discard(whole)
                pieces[whole].discard(name)
            missing.discard(name if whole is None or pieces[whole] else whole)
        if useless:
            logger.info("%d tensors of the checkpoint are not used: scales of K and V, or biases of 0.", useless)
        missing -= {name for name, weight in rows.items() if weight.optional}
        if missing:
            some = ", ".join(sorted(missing)[:3])
            raise StartupError(f"The checkpoint lacks {len(missing)} tensors, among them {some}.")
        if head is not None and not self.embedding.holds(head):
            raise StartupError(
                f"The checkpoint's {names.head}.weight is not its embedding table, though its configuration says "
                "tie_word_embeddings; start with --hf-overrides '{\"tie_word_embeddings\": false}'."
            )

    def _is_of_no_use(self, name: str, tensor: torch.Tensor) -> bool:
        """Of quantised checkpoints: factors of attention's own tensors, and biases that a packer has added."""
        if self.build.quantization is None:
            return False
        if name.endswith(_SCALES_OF_ATTENTION):
            return True
        return name.endswith(".bias") and not bool(tensor.any())

    def _load(self, weight: Weight, tensor: torch.Tensor) -> None:
        module = self.get_submodule(weight.module)
        module.load(weight.parts, weight.kind, tensor)  # type: ignore[operator]
        if weight.twin is not None:
            module.load((weight.twin,), weight.kind, tensor)  # type: ignore[operator]

    def finish(self) -> None:
        device = self.embedding.weight.device
        if any(isinstance(module, StackedExperts) and module.unpacks_on(device) for module in self.modules()):
            name = str(self.dtype).removeprefix("torch.")
            logger.info("The experts' MXFP4 weights become %s: only a GPU multiplies by them packed, bfloat16.", name)
        if self.build.compiled:
            self.program = CpuProgram(self)
        else:
            for name, module in self.named_modules():
                if isinstance(module, LinearBase | StackedExperts):
                    try:
                        module.finish()
                    except ValueError as error:
                        raise StartupError(f"The weights of {name} cannot be used: {error}.") from None
        method = self.build.method
        if isinstance(method, CpuPacked) and self.build.tp.world_size == 1:
            self.head.pack(method.int8, keep=self.spec.tied)

    def compiled_steps(
        self, rows: SequenceRows, k_caches: list[torch.Tensor], v_caches: list[torch.Tensor]
    ) -> CompiledSteps | None:
        if self.program is None or self.head.packed is None:
            return None
        table = self.embedding.weight if self.embedding.blocks is None else self.embedding.blocks
        return self.program.steps(self.head.packed, table, rows, k_caches, v_caches)

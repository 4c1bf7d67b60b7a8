"""Whole networks as programs of the compiled CPU kernels, one call a step; the structs mirror `csrc/cpu/api.h`.

A layer is data: `DecoderLayer` says which norms, matrices and options it has, and the kernels do the rest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch

from vllm.ops.attention.metadata import PrefixGroup
from vllm.ops.cpu.attention import (
    AttentionOptions,
    AttentionStruct,
    Norm,
    NormStruct,
    PreparedBatch,
    norm_struct,
)
from vllm.ops.cpu.blocks import BLOCKS, BlockMatrix
from vllm.ops.cpu.library import address, kernels, threads
from vllm.ops.cpu.matrix import (
    ACTIVATIONS,
    Matrix,
    MatrixStruct,
    PackedHead,
    ProjectionStruct,
    arithmetic,
    format_of,
)
from vllm.ops.cpu.sampling import SamplingStruct, TablesStruct, check_logits
from vllm.ops.sampling import SamplingTables


class _Layer(ctypes.Structure):
    _fields_ = [
        ("attention", AttentionStruct),
        ("before_attention", NormStruct),
        ("after_attention", NormStruct),
        ("before_mlp", NormStruct),
        ("after_mlp", NormStruct),
        ("qkv", MatrixStruct),
        ("o", MatrixStruct),
        ("up", MatrixStruct),
        ("down", MatrixStruct),
        ("activation", c_int32),
        ("gated", c_int32),
        ("parallel", c_int32),
        ("residual_factor", c_float),
        ("layer_factor", c_float),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
    ]


class _Stack(ctypes.Structure):
    _fields_ = [
        ("num_layers", c_int64),
        ("hidden_size", c_int64),
        ("embedding_factor", c_float),
        ("final_norm", NormStruct),
        ("layers", POINTER(_Layer)),
        ("cache_format", c_int32),
        ("arithmetic", c_int32),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("token_ids", c_void_p),
        ("token_stride", c_int64),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("prefix_lens", c_void_p),
        ("block_size", c_int64),
        ("window_tables", c_void_p),
        ("window_stride", c_int64),
    ]


class _Network(ctypes.Structure):
    _fields_ = [
        ("stack", _Stack),
        ("head", ProjectionStruct),
        ("embeddings", c_void_p),
        ("embedding_format", c_int32),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        ("num_entries", c_int64),
        ("rows", POINTER(c_int64)),
        ("starts", POINTER(c_int64)),
        ("counts", POINTER(c_int64)),
        ("samples", POINTER(c_int64)),
        ("num_groups", c_int64),
        ("groups", POINTER(c_int64)),
        ("num_window_groups", c_int64),
        ("window_groups", POINTER(c_int64)),
        ("hidden", c_void_p),
        ("sampling", SamplingStruct),
    ]


@dataclass(frozen=True)
class DecoderLayer:
    """One layer: attention and an MLP that add to a residual stream.

        x = before_attention(hidden)
        hidden += residual_factor * after_attention(o(attention(qkv(x))))
        x = before_mlp(hidden), or the x above where `parallel`
        hidden += residual_factor * after_mlp(down(activation(gate(x)) * up(x)))
        hidden *= layer_factor

    Every norm may be None. Each matrix may have a bias, also for some of its rows alone; see `PackedMatrix.of_parts`.

    Attributes:
        attention: Heads and what happens between `qkv` and `o`.
        qkv: [(num_heads + 2 num_kv_heads) * head_dim, hidden_size]: all of q, then k, then v. A layer whose values are
            its keys has the rows of k twice.
        o: [hidden_size, num_heads * head_dim].
        up: [intermediate_size, hidden_size], or with a gate the gate's rows and then as many, packed with `interleave`.
        down: [hidden_size, intermediate_size].
        activation: One of `ACTIVATIONS`.
        gated: Whether `up` holds a gate.
        parallel: Whether the MLP reads what attention reads; there is no `before_mlp` then.
    """

    attention: AttentionOptions
    qkv: Matrix
    o: Matrix
    up: Matrix
    down: Matrix
    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None
    activation: str = "silu"
    gated: bool = True
    parallel: bool = False
    residual_factor: float = 1.0
    layer_factor: float = 1.0

    def __post_init__(self) -> None:
        options = self.attention
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r}: the CPU kernels have {', '.join(ACTIVATIONS)}")
        if self.parallel and self.before_mlp is not None:
            raise ValueError("an MLP beside attention reads the norm of attention; before_mlp must be None")
        hidden, heads = self.qkv.k, options.num_heads * options.head_dim
        inner = self.up.n // 2 if self.gated else self.up.n
        shapes = {
            "qkv": (self.qkv, heads + 2 * options.num_kv_heads * options.head_dim, hidden),
            "o": (self.o, hidden, heads),
            "up": (self.up, self.up.n, hidden),
            "down": (self.down, hidden, inner),
        }
        for name, (matrix, n, k) in shapes.items():
            if (matrix.n, matrix.k) != (n, k):
                raise ValueError(f"{name} is {matrix.n} x {matrix.k} where {n} x {k} fits the other matrices")
            if matrix.interleaved != (name == "up" and self.gated):
                raise ValueError(
                    f"{name} must {'' if name == 'up' and self.gated else 'not '}be packed with interleave"
                )
        for name in ("before_attention", "after_attention", "before_mlp", "after_mlp"):
            norm: Norm | None = getattr(self, name)
            if norm is not None and (norm.size, norm.heads) != (hidden, 1):
                raise ValueError(f"{name} has {norm.size} elements, hidden_size is {hidden}")

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return self.qkv, self.o, self.up, self.down

    def fill(self, struct: _Layer) -> None:
        struct.attention = self.attention.struct()
        for name in ("before_attention", "after_attention", "before_mlp", "after_mlp"):
            setattr(struct, name, norm_struct(getattr(self, name)))
        struct.qkv, struct.o, struct.up, struct.down = (m.struct for m in self.matrices)
        struct.activation = ACTIVATIONS.index(self.activation)
        struct.gated, struct.parallel = self.gated, self.parallel
        struct.residual_factor, struct.layer_factor = self.residual_factor, self.layer_factor


class DecoderProgram:
    """All layers of a network in one call. Between its matrix products everything is float32.

    Args:
        layers: From the first to the last; their attention, MLPs and options may differ.
        final_norm: Of the states that leave the last layer.
        embedding_factor: By what embeddings are multiplied first.
    """

    def __init__(self, layers: Sequence[DecoderLayer], final_norm: Norm | None, embedding_factor: float = 1.0) -> None:
        hidden_size = layers[0].qkv.k
        sizes = {layer.qkv.k for layer in layers} | {hidden_size if final_norm is None else final_norm.size}
        if len(sizes) > 1:
            raise ValueError(f"layers and final norm differ in hidden_size: {', '.join(map(str, sorted(sizes)))}")
        self.layers = tuple(layers)
        self._kept = final_norm
        # int8 and blocks go with any.
        self._formats = {m.data.dtype for layer in layers for m in layer.matrices} - {torch.int8, torch.uint8}
        self._layers = (_Layer * len(layers))()
        for struct, layer in zip(self._layers, layers, strict=True):
            layer.fill(struct)
        self.struct = _Stack(
            len(layers),
            hidden_size,
            embedding_factor,
            norm_struct(final_norm),
            self._layers,
            arithmetic=arithmetic(),
        )
        self._caches: list[torch.Tensor] = []

    def use_caches(self, k_caches: list[torch.Tensor], v_caches: list[torch.Tensor]) -> None:
        """K/V tensors of every layer [num_slots, num_kv_heads, head_dim], all of the dtype of the matrices; beside
        matrices of int8 or in blocks, of any."""
        if self._caches is k_caches:
            return
        if self._formats - {k_caches[0].dtype}:
            raise ValueError(f"K and V of {k_caches[0].dtype} do not go with matrices of another dtype")
        for struct, cache in zip(self._layers, k_caches, strict=True):
            shape = (struct.attention.num_kv_heads, struct.attention.head_dim)
            if cache.shape[1:] != shape or cache.dtype != k_caches[0].dtype:
                raise ValueError(
                    f"a K/V tensor {list(cache.shape)} of {cache.dtype} for KV heads x head_dim of {shape}"
                )
        self._caches = k_caches
        self.struct.cache_format = format_of(k_caches[0].dtype)
        for struct, k, v in zip(self._layers, k_caches, v_caches, strict=True):
            struct.k_cache, struct.v_cache = address(k), address(v)

    def forward(
        self,
        embeddings: torch.Tensor,
        positions: torch.Tensor,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
        batch: PreparedBatch,
        wanted: torch.Tensor | None = None,
        within: PreparedBatch | None = None,
    ) -> torch.Tensor:
        """[T, hidden_size], rows of the table of embeddings → the normalised states after the last layer of the tokens
        `wanted` (int64 [R], ascending) or of all, float32 [R, hidden_size]; writes K and V of every token.

        `within`: the batch as layers with a window see it, where they have blocks of their own."""
        self.use_caches(k_caches, v_caches)
        hidden = embeddings.to(torch.float32, copy=True)
        if self.struct.embedding_factor != 1.0:
            hidden *= self.struct.embedding_factor
        batch.struct.positions = address(positions)
        batch.struct.within = None
        if within is not None:
            within.struct.positions = address(positions)
            batch.struct.within = ctypes.addressof(within.struct)
        picked = [] if wanted is None else wanted.tolist()
        rows = (c_int64 * max(1, len(picked)))(*picked)  # an empty list has a place too: none is not all
        batch.struct.num_wanted = len(picked)
        batch.struct.wanted = None if wanted is None else ctypes.addressof(rows)
        kernels().vsp_run_stack(byref(self.struct), byref(batch.struct), address(hidden), threads())
        return hidden if wanted is None else hidden[: len(wanted)]


class SequenceRows:
    """The sequences of a model runner, a row each, in tensors that the compiled steps read where they are.

    Args:
        token_ids: int64 [rows, columns]; drawn tokens are written into it.
        block_tables: int64 [rows, columns].
        prefix_lens: Tokens in pinned extents; int64 [rows]. The blocks of a row hold those after them.
        block_size: Slots in a block.
        window_tables: Block tables of the layers with a window, where they have blocks of their own; int64 [rows,
            columns].
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        block_tables: torch.Tensor,
        prefix_lens: torch.Tensor,
        block_size: int,
        window_tables: torch.Tensor | None = None,
    ) -> None:
        self._tensors = (token_ids, block_tables, prefix_lens, window_tables)
        self.struct = _Rows(
            address(token_ids),
            token_ids.stride(0),
            address(block_tables),
            block_tables.stride(0),
            address(prefix_lens),
            block_size,
            address(window_tables),
            0 if window_tables is None else window_tables.stride(0),
        )


class CompiledSteps:
    """Whole steps in one call each, from the rows' token ids to hidden states or to new tokens: with the weights of a
    network having passed through the caches, every further call from Python costs tens of microseconds.

    Args:
        program: The layers, their K/V tensors given.
        head: Output projection.
        embeddings: float32 or bfloat16 [vocab_size, hidden_size], or such a table in blocks.
        rows: The sequences.
    """

    def __init__(
        self,
        program: DecoderProgram,
        head: PackedHead,
        embeddings: torch.Tensor | BlockMatrix,
        rows: SequenceRows,
    ) -> None:
        self._kept = (program, head, embeddings, rows)
        if isinstance(embeddings, BlockMatrix):
            table, kind = c_void_p(ctypes.addressof(embeddings.struct)), BLOCKS
        else:
            table, kind = address(embeddings), format_of(embeddings.dtype)
        self._network = _Network(program.struct, head.struct, table, kind)
        self._rows = rows
        self._tables: SamplingTables | None = None
        self._tables_struct = TablesStruct()
        self._run = kernels().vsp_run_step

    def draw(
        self,
        rows: list[int],
        starts: list[int],
        counts: list[int],
        samples: list[bool],
        groups: list[PrefixGroup],
        tables: SamplingTables,
        masks: torch.Tensor | None = None,
        mask_rows: torch.Tensor | None = None,
        logits_out: torch.Tensor | None = None,
        window_groups: list[PrefixGroup] | None = None,
    ) -> list[int]:
        """Computes the tokens `starts[i] … starts[i] + counts[i]` of each row, draws the next token of those that
        sample, writes it into their rows and counts it where they have penalties.

        Args:
            groups: Reads of pinned extents.
            tables: What the rows ask for; of rows that do not sample it is not read.
            masks, mask_rows: As `cpu_sampling.sample` takes them; `mask_rows` has an entry for each row that samples.
            logits_out: float32 [rows that sample, vocab_size]; becomes what the network made of them.
            window_groups: Reads of the layers with a window, where they have blocks of their own.

        Returns the tokens of the rows that sample, in order.
        """
        drawn = torch.empty(sum(samples), dtype=torch.int64)
        step = self._step(rows, starts, counts, samples, groups, window_groups)
        step.sampling = self._sampling(drawn, tables, masks, mask_rows, logits_out)
        self._run(byref(self._network), byref(self._rows.struct), byref(step), threads())
        return drawn.tolist()

    def draw_after(
        self,
        states: torch.Tensor,
        rows: torch.Tensor,
        num_tokens: torch.Tensor,
        tables: SamplingTables,
        masks: torch.Tensor | None = None,
        mask_rows: torch.Tensor | None = None,
        logits_out: torch.Tensor | None = None,
    ) -> list[int]:
        """The draw alone, where `hidden` has computed the states.

        Args:
            states: Of the last token of each row that samples; float32 [R, hidden_size].
            rows, num_tokens: Which rows these are, and how many tokens each has so far; int64 [R].
            tables, masks, mask_rows, logits_out: As `draw` takes them.
        """
        drawn = torch.empty(len(rows), dtype=torch.int64)
        sampling = self._sampling(drawn, tables, masks, mask_rows, logits_out)
        states = states.contiguous()
        kernels().vsp_draw(
            byref(self._network),
            byref(self._rows.struct),
            address(states),
            c_int64(len(rows)),
            address(rows),
            address(num_tokens),
            byref(sampling),
            threads(),
        )
        return drawn.tolist()

    def hidden(
        self,
        rows: list[int],
        starts: list[int],
        counts: list[int],
        samples: list[bool] | None,
        groups: list[PrefixGroup],
        window_groups: list[PrefixGroup] | None = None,
    ) -> torch.Tensor:
        """Computes as `draw` does; returns the normalised states of the last token of those that sample, or of every
        token where `samples` is None; float32 [R, hidden_size]."""
        size = sum(counts if samples is None else samples)
        out = torch.empty((size, self._network.stack.hidden_size))
        step = self._step(rows, starts, counts, samples, groups, window_groups)
        step.hidden = address(out)
        self._run(byref(self._network), byref(self._rows.struct), byref(step), threads())
        return out

    def _sampling(
        self,
        drawn: torch.Tensor,
        tables: SamplingTables,
        masks: torch.Tensor | None,
        mask_rows: torch.Tensor | None,
        logits_out: torch.Tensor | None,
    ) -> SamplingStruct:
        if self._tables is not tables:
            self._tables, self._tables_struct = tables, TablesStruct.of(tables)
        if logits_out is not None:
            check_logits(logits_out, (len(drawn), self._network.head.w.n))
        return SamplingStruct.of(self._tables_struct, drawn, masks, mask_rows, logits_out)

    def _step(
        self,
        rows: list[int],
        starts: list[int],
        counts: list[int],
        samples: list[bool] | None,
        groups: list[PrefixGroup],
        window_groups: list[PrefixGroup] | None,
    ) -> _Step:
        ints = c_int64 * len(rows)
        return _Step(
            len(rows),
            ints(*rows),
            ints(*starts),
            ints(*counts),
            None if samples is None else ints(*samples),
            len(groups),
            _group_array(groups),
            len(window_groups or ()),
            _group_array(window_groups) if window_groups else None,
        )


def _group_array(groups: list[PrefixGroup]) -> ctypes.Array[c_int64]:
    flat = [n for g in groups for n in (g.first_token, g.num_tokens, g.first_slot, g.length)]
    return (c_int64 * len(flat))(*flat)

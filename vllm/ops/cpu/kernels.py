"""The compiled CPU kernels of `csrc/cpu`, called by ctypes; the structs mirror `csrc/cpu/api.h`."""

from __future__ import annotations

import ctypes
import time
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from vllm.ops.attention.metadata import AttentionMetadata, PrefixGroup
from vllm.ops.cpu.library import INSTRUCTIONS as INSTRUCTIONS
from vllm.ops.cpu.library import address, kernels, threads
from vllm.ops.cpu.library import library as library
from vllm.ops.cpu.sampling import SamplingStruct, TablesStruct, check_logits
from vllm.ops.cpu.sampling import logprobs as logprobs
from vllm.ops.cpu.sampling import sample as sample
from vllm.ops.sampling import SamplingTables

TILE = 16
"""Columns of a packed tile; slots of a tile of KV memory."""

MAX_HEAD_DIM = 512
MAX_HEADS_PER_KV = 128
WIDEN, DOT, TILES = 0, 1, 2
"""How bfloat16 operands are multiplied: widened to float32, by dot products of pairs, or in tile registers; each as the
one before it where the instructions for it are not there."""
ARITHMETICS = ("widened to float32", "in dot products", "in tile registers")

_FORMATS = {torch.float32: 0, torch.bfloat16: 1}
_INT8 = 2


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("format", c_int32),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", c_void_p),
        ("post_attention_norm", c_void_p),
        ("qkv", _Matrix),
        ("o", _Matrix),
        ("gate_up", _Matrix),
        ("down", _Matrix),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
    ]


class _Stack(ctypes.Structure):
    _fields_ = [
        ("num_layers", c_int64),
        ("hidden_size", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("intermediate_size", c_int64),
        ("norm_eps", c_float),
        ("scale", c_float),
        ("cos_sin", c_void_p),
        ("final_norm", c_void_p),
        ("layers", POINTER(_Layer)),
        ("cache_format", c_int32),
        ("arithmetic", c_int32),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("num_tokens", c_int64),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("num_seqs", c_int64),
        ("query_lens", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("table_rows", c_void_p),
        ("block_size", c_int64),
        ("num_groups", c_int64),
        ("groups", c_void_p),
        ("num_wanted", c_int64),
        ("wanted", c_void_p),
    ]


class _Rows(ctypes.Structure):
    _fields_ = [
        ("token_ids", c_void_p),
        ("token_stride", c_int64),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("prefix_lens", c_void_p),
        ("block_size", c_int64),
    ]


class _Network(ctypes.Structure):
    _fields_ = [("stack", _Stack), ("head", _Matrix), ("embeddings", c_void_p), ("embedding_format", c_int32)]


class _Step(ctypes.Structure):
    _fields_ = [
        ("num_entries", c_int64),
        ("rows", POINTER(c_int64)),
        ("starts", POINTER(c_int64)),
        ("counts", POINTER(c_int64)),
        ("samples", POINTER(c_int64)),
        ("num_groups", c_int64),
        ("groups", POINTER(c_int64)),
        ("hidden", c_void_p),
        ("sampling", SamplingStruct),
    ]


def misfit_of_attention(heads_per_kv: int, head_dim: int, block_size: int, dtype: torch.dtype) -> str | None:
    """Why the attention kernels cannot serve a model, or None."""
    if heads_per_kv > MAX_HEADS_PER_KV:
        return f"{heads_per_kv} query heads share a KV head, more than {MAX_HEADS_PER_KV}"
    if head_dim % TILE or head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is no multiple of {TILE} up to {MAX_HEAD_DIM}"
    if block_size % TILE:
        return f"--block-size {block_size} is no multiple of {TILE}"
    if dtype not in _FORMATS:
        return f"dtype {str(dtype).removeprefix('torch.')} is neither float32 nor bfloat16"
    return None


def _format(dtype: torch.dtype) -> int:
    if dtype not in _FORMATS:
        raise ValueError(f"the compiled CPU kernels take float32 and bfloat16, not {dtype}")
    return _FORMATS[dtype]


@lru_cache
def arithmetic() -> int:
    """How bfloat16 operands multiply fastest on this processor, measured: widened to float32, by dot products of pairs,
    or in tile registers, of what there is.

    Processors with the same instructions differ: AMD's Zen 4 does twice as much in dot products as in float32, some of
    Intel's do less.
    """
    weight = PackedMatrix(torch.zeros(512, 512, dtype=torch.bfloat16))
    x = torch.zeros(96, 512)
    times = {}
    for candidate in range(kernels().vsp_num_arithmetics()):
        linear(x, weight, candidate)
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            linear(x, weight, candidate)
            seconds.append(time.perf_counter() - started)
        times[candidate] = min(seconds)
    return min(times, key=times.__getitem__)


class PackedMatrix:
    """A weight [N, K] in the kernels' own order; see `csrc/cpu/api.h`.

    Args:
        weight: float32 or bfloat16; K is a multiple of 16.
        bias: [N], or None.
        interleave: The rows are a gate and an up projection, N/2 each (a multiple of 16), for SwiGLU.
        int8: Quantise: symmetric, one factor a row.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, interleave: bool = False, int8: bool = False
    ) -> None:
        self.n, self.k = weight.shape
        unit = 2 * TILE if interleave else 1
        if self.k % TILE or self.n % unit:
            raise ValueError(f"cannot pack a matrix of {self.n} x {self.k}: K must be a multiple of 16, N of {unit}")
        tiles = -(-self.n // TILE)
        self.scale = torch.empty(tiles * TILE) if int8 else None
        self.data = torch.empty(tiles * TILE * self.k, dtype=torch.int8 if int8 else weight.dtype)
        weight = (weight.float() if int8 else weight).contiguous()
        n, k, interleaved = c_int64(self.n), c_int64(self.k), c_int32(interleave)
        if int8:
            kernels().vsp_pack_int8(address(weight), n, k, interleaved, address(self.data), address(self.scale))
        else:
            kind = c_int32(_format(weight.dtype))
            kernels().vsp_pack(address(weight), n, k, kind, interleaved, address(self.data))
        self.bias = None if bias is None else bias.float()
        if self.bias is not None and interleave:
            self.bias = self.bias.view(2, -1, TILE).transpose(0, 1).flatten().contiguous()
        kind_of_data = _INT8 if int8 else _format(weight.dtype)
        self.struct = _Matrix(address(self.data), address(self.scale), address(self.bias), n, k, kind_of_data)


def linear(x: torch.Tensor, weight: PackedMatrix, arithmetic: int) -> torch.Tensor:
    """`x Wᵀ + b`: float32 [R, K] → float32 [R, N]."""
    out = torch.empty((x.shape[0], weight.n))
    kernels().vsp_linear(
        address(x), c_int64(x.shape[0]), byref(weight.struct), address(out), c_int32(arithmetic), threads()
    )
    return out


def swiglu(x: torch.Tensor, weight: PackedMatrix, arithmetic: int) -> torch.Tensor:
    """`silu(gate) * up` of x times an interleaved matrix: float32 [R, K] → float32 [R, N/2]."""
    out = torch.empty((x.shape[0], weight.n // 2))
    kernels().vsp_swiglu(
        address(x), c_int64(x.shape[0]), byref(weight.struct), address(out), c_int32(arithmetic), threads()
    )
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """float32 [R, N], float32 [N] → float32 [R, N]; N is a multiple of 16."""
    out = torch.empty_like(x)
    kernels().vsp_rms_norm(
        address(x), c_int64(x.shape[0]), c_int64(x.shape[1]), address(weight), c_float(eps), address(out), threads()
    )
    return out


def most_likely(x: torch.Tensor, weight: PackedMatrix, arithmetic: int) -> torch.Tensor:
    """`argmax(x Wᵀ + b)`, the first of equals, whose products never go through memory: float32 [R, K] → int64 [R]."""
    out = torch.empty(x.shape[0], dtype=torch.int64)
    kernels().vsp_most_likely(
        address(x), c_int64(x.shape[0]), byref(weight.struct), address(out), c_int32(arithmetic), threads()
    )
    return out


def copy_blocks(cache: torch.Tensor, pairs: torch.Tensor, block_size: int) -> None:
    """Copies blocks of `block_size` rows of `cache`: int64 `pairs` [P, 2] of (from, to); all are read before any is
    written."""
    size = block_size * cache.stride(0) * cache.element_size()
    kernels().vsp_copy_blocks(address(cache), address(pairs), c_int64(len(pairs)), c_int64(size))


class BlockCopier:
    """Copies blocks of several caches [num_slots, ...] at once."""

    def __init__(self, caches: list[torch.Tensor], block_size: int) -> None:
        self._caches = caches
        self._block_size = block_size

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """`pairs` of (source, destination) blocks; all sources are read before any destination is written."""
        moves = torch.tensor(pairs, dtype=torch.int64)
        for cache in self._caches:
            copy_blocks(cache, moves, self._block_size)


@dataclass(frozen=True)
class PreparedBatch:
    """A batch as the kernels read it, with the tensors that it points to."""

    struct: _Batch
    tensors: tuple[torch.Tensor, ...]


def prepare(metadata: AttentionMetadata) -> PreparedBatch:
    """Positions are given later, to what needs them."""
    lens = torch.tensor([metadata.query_lens, metadata.context_lens], dtype=torch.int64)
    groups = torch.tensor(
        [(g.first_token, g.num_tokens, g.first_slot, g.length) for g in metadata.groups], dtype=torch.int64
    )
    slots, tables = metadata.slot_mapping.contiguous(), metadata.block_tables.contiguous()
    struct = _Batch(
        len(slots),
        None,
        address(slots),
        lens.shape[1],
        address(lens[0]),
        address(lens[1]),
        address(tables),
        tables.stride(0),
        None,
        metadata.block_size,
        len(metadata.groups),
        address(groups),
    )
    return PreparedBatch(struct, (lens, groups, slots, tables))


def rope_and_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """As `AttentionBackend.rope_and_write`, for float32 `qkv` [T, (num_heads + 2 KVH) D]; q is float32 [T, H, D].

    Tokens whose slots are in one tile are neighbours, in the order of their slots. Values in the slots after them are
    cleared, unless tokens of an earlier call precede them in the tile: it was cleared then.
    """
    q = torch.empty(len(qkv), num_heads, k_cache.shape[2])
    slots = slot_mapping.contiguous()
    batch = _Batch(num_tokens=len(qkv), positions=address(positions), slots=address(slots))
    stack = _attention_of(num_heads, k_cache, 1.0, cos_sin)
    kernels().vsp_rope_and_write(
        byref(stack), byref(batch), address(qkv), address(k_cache), address(v_cache), address(q), threads()
    )
    return q


def attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float, batch: PreparedBatch, arithmetic: int
) -> torch.Tensor:
    """As `AttentionBackend.forward`, for float32 `q` [T, H, D]; returns float32."""
    out = torch.empty_like(q)
    stack = _attention_of(q.shape[1], k_cache, scale, None, arithmetic)
    kernels().vsp_attention(
        byref(stack), byref(batch.struct), address(q), address(k_cache), address(v_cache), address(out), threads()
    )
    return out


def _attention_of(
    num_heads: int, k_cache: torch.Tensor, scale: float, cos_sin: torch.Tensor | None, arithmetic: int = WIDEN
) -> _Stack:
    """A stack of which only what attention reads is filled in."""
    num_kv_heads, head_dim = k_cache.shape[1:]
    return _Stack(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=scale,
        cos_sin=address(cos_sin),
        cache_format=_format(k_cache.dtype),
        arithmetic=arithmetic,
    )


class LayerWeights(NamedTuple):
    """One pre-norm decoder layer: norms float32 [hidden_size], matrices packed (`gate_up` interleaved)."""

    input_norm: torch.Tensor
    post_attention_norm: torch.Tensor
    qkv: PackedMatrix
    o: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix


class DecoderStack:
    """All layers of a network in one call: pre-norm, rotary positions, grouped-query attention, SwiGLU.

    Between its matrix products everything is float32.

    Args:
        layers: From the first to the last.
        final_norm: float32 [hidden_size].
        cos_sin: Rotary table; float32 [positions, head_dim].
        num_heads, num_kv_heads, head_dim, norm_eps: Of every layer.
    """

    def __init__(
        self,
        layers: list[LayerWeights],
        final_norm: torch.Tensor,
        cos_sin: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        norm_eps: float,
    ) -> None:
        self._weights = (layers, final_norm, cos_sin)
        self._layers = (_Layer * len(layers))()
        for struct, layer in zip(self._layers, layers, strict=True):
            struct.input_norm = address(layer.input_norm)
            struct.post_attention_norm = address(layer.post_attention_norm)
            struct.qkv, struct.o = layer.qkv.struct, layer.o.struct
            struct.gate_up, struct.down = layer.gate_up.struct, layer.down.struct
        self.struct = _Stack(
            num_layers=len(layers),
            hidden_size=final_norm.shape[0],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=layers[0].down.k,
            norm_eps=norm_eps,
            scale=head_dim**-0.5,
            cos_sin=address(cos_sin),
            final_norm=address(final_norm),
            layers=self._layers,
            arithmetic=arithmetic(),
        )
        self._caches: list[torch.Tensor] = []

    def use_caches(self, k_caches: list[torch.Tensor], v_caches: list[torch.Tensor]) -> None:
        """K/V tensors of every layer."""
        if self._caches is k_caches:
            return
        self._caches = k_caches
        self.struct.cache_format = _format(k_caches[0].dtype)
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
    ) -> torch.Tensor:
        """[T, hidden_size] → the normalised states after the last layer of the tokens `wanted` (int64 [R], ascending)
        or of all, float32 [R, hidden_size]; writes K and V of every token."""
        self.use_caches(k_caches, v_caches)
        hidden = embeddings.to(torch.float32, copy=True)
        batch.struct.positions = address(positions)
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
    """

    def __init__(
        self, token_ids: torch.Tensor, block_tables: torch.Tensor, prefix_lens: torch.Tensor, block_size: int
    ) -> None:
        self._tensors = (token_ids, block_tables, prefix_lens)
        self.struct = _Rows(
            address(token_ids),
            token_ids.stride(0),
            address(block_tables),
            block_tables.stride(0),
            address(prefix_lens),
            block_size,
        )


class CompiledSteps:
    """Whole steps in one call each, from the rows' token ids to hidden states or to new tokens: with the weights of a
    network having passed through the caches, every further call from Python costs tens of microseconds.

    Args:
        stack: The layers, their K/V tensors given.
        head: Output projection.
        embeddings: float32 or bfloat16 [vocab_size, hidden_size].
        rows: The sequences.
    """

    def __init__(self, stack: DecoderStack, head: PackedMatrix, embeddings: torch.Tensor, rows: SequenceRows) -> None:
        self._kept = (stack, head, embeddings, rows)
        self._network = _Network(stack.struct, head.struct, address(embeddings), _format(embeddings.dtype))
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
    ) -> list[int]:
        """Computes the tokens `starts[i] … starts[i] + counts[i]` of each row, draws the next token of those that
        sample, writes it into their rows and counts it where they have penalties.

        Args:
            tables: What the rows ask for; of rows that do not sample it is not read.
            masks, mask_rows: As `cpu_sampling.sample` takes them; `mask_rows` has an entry for each row that samples.
            logits_out: float32 [rows that sample, vocab_size]; becomes what the network made of them.

        Returns the tokens of the rows that sample, in order.
        """
        drawn = torch.empty(sum(samples), dtype=torch.int64)
        step = self._step(rows, starts, counts, samples, groups)
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
    ) -> torch.Tensor:
        """Computes as `draw` does; returns the normalised states of the last token of those that sample, or of every
        token where `samples` is None; float32 [R, hidden_size]."""
        size = sum(counts if samples is None else samples)
        out = torch.empty((size, self._network.stack.hidden_size))
        step = self._step(rows, starts, counts, samples, groups)
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
            check_logits(logits_out, (len(drawn), self._network.head.n))
        return SamplingStruct.of(self._tables_struct, drawn, masks, mask_rows, logits_out)

    def _step(
        self,
        rows: list[int],
        starts: list[int],
        counts: list[int],
        samples: list[bool] | None,
        groups: list[PrefixGroup],
    ) -> _Step:
        ints = c_int64 * len(rows)
        flat = [n for g in groups for n in (g.first_token, g.num_tokens, g.first_slot, g.length)]
        return _Step(
            len(rows),
            ints(*rows),
            ints(*starts),
            ints(*counts),
            None if samples is None else ints(*samples),
            len(groups),
            (c_int64 * len(flat))(*flat),
        )

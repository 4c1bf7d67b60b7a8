"""Norms, rotary positions and attention of the compiled CPU kernels; the structs mirror `csrc/cpu/api.h`."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Literal

import torch

from vllm.ops.attention.metadata import AttentionMetadata
from vllm.ops.cpu.library import address, kernels, threads
from vllm.ops.cpu.matrix import TILE, format_of
from vllm.ops.norm import Norm as NormOfRows

MAX_HEAD_DIM = 512
MAX_HEADS_PER_KV = 128


class NormStruct(ctypes.Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("size", c_int64),
        ("eps", c_float),
        ("kind", c_int32),
        ("head_stride", c_int64),
    ]


class _RopeStruct(ctypes.Structure):
    _fields_ = [("cos_sin", c_void_p), ("dim", c_int64), ("interleaved", c_int32)]


class AttentionStruct(ctypes.Structure):
    _fields_ = [
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("query_factors", c_void_p),
        ("q_norm", NormStruct),
        ("k_norm", NormStruct),
        ("v_norm", NormStruct),
        ("rope", _RopeStruct),
    ]


class BatchStruct(ctypes.Structure):
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
        ("within", c_void_p),
    ]


@dataclass(frozen=True)
class Norm:
    """An RMS norm, `x / sqrt(mean(x²) + eps) * weight`, or a layer norm, which takes the mean away first.

    Attributes:
        size: Elements that are normalised together, a multiple of 16: `hidden_size`; of q and k `head_dim` (every head
            by itself) or the size of all heads.
        eps: Added to the mean of the squares.
        weight: float32 [size]; None: ones. A network whose weights are kept as w and used as 1 + w passes the sum.
        bias: As the weight, or None.
        kind: `rms` or `layer`.
        heads: Of q, k and v, where every head is normalised by itself: 1, or the heads, if each has weights of its own
            in float32 [heads * size].
    """

    size: int
    eps: float
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    kind: Literal["rms", "layer"] = "rms"
    heads: int = 1

    def __post_init__(self) -> None:
        if self.size % TILE:
            raise ValueError(f"a norm of {self.size} elements: the compiled CPU kernels take multiples of {TILE}")
        _check_floats("the weights of a norm", self.weight, self.heads * self.size)
        _check_floats("the biases of a norm", self.bias, self.heads * self.size)

    @classmethod
    def of(cls, norm: NormOfRows, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Norm:
        """`norm` with a weight [size] and a bias [size] of any dtype. Where `norm` rounds does not matter: all of it is
        computed in float32."""
        return cls(
            len(weight), norm.eps, weight.float() + norm.offset, None if bias is None else bias.float(), norm.kind
        )


@dataclass(frozen=True)
class Rope:
    """Rotary positions of the first `rotary_dim` elements of each head of q and k; the others stay as they are.

    Attributes:
        cos_sin: float32 [positions, rotary_dim]: rotary_dim/2 cosines, then as many sines, an attention factor of the
            scaling method multiplied in.
        interleaved: Element 2i turns with 2i + 1; else element i with i + rotary_dim/2.
    """

    cos_sin: torch.Tensor
    interleaved: bool = False


@dataclass(frozen=True)
class AttentionOptions:
    """Attention of one layer.

    Attributes:
        num_heads, num_kv_heads, head_dim: Heads and elements of each. `head_dim` is a multiple of 16 up to 512; only
            multiples of 32 are multiplied in tile registers.
        scale: Of the scores.
        window: A query at position p sees the keys p - window < key ≤ p; None: all up to p.
        softcap: Scores become `softcap * tanh(score / softcap)`; None: they stay.
        sinks: float32 [num_heads]: one more score in each softmax, which has no value.
        q_norm, k_norm, v_norm: Before q and k are turned, of each head or of all together; see `Norm.size`.
        rope: None: q and k are not turned.
        query_factors: float32 [positions]: by what the queries at a position are multiplied; None: by 1.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    v_norm: Norm | None = None
    rope: Rope | None = None
    query_factors: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads cannot share {self.num_kv_heads} KV heads evenly")
        misfit = misfit_of_attention(self.num_heads // self.num_kv_heads, self.head_dim, TILE, torch.float32)
        if misfit is not None:
            raise ValueError(f"the compiled CPU kernels cannot compute this attention: {misfit}")
        for name, value in (("window", self.window), ("softcap", self.softcap)):
            if value is not None and not value > 0:
                raise ValueError(f"{name} {value} must be above 0")
        heads = {"q_norm": self.num_heads, "k_norm": self.num_kv_heads, "v_norm": self.num_kv_heads}
        for name, count in heads.items():
            norm: Norm | None = getattr(self, name)
            sizes = (self.head_dim, count * self.head_dim)
            if norm is not None and norm.size not in sizes:
                raise ValueError(f"{name} of {norm.size} elements: one head has {sizes[0]}, all have {sizes[1]}")
            if norm is not None and norm.heads != 1 and (norm.heads, norm.size) != (count, self.head_dim):
                raise ValueError(f"{name} has weights for {norm.heads} heads of {norm.size}, there are {count}")
        _check_floats("sinks", self.sinks, self.num_heads)
        _check_floats("query_factors", self.query_factors)
        if self.rope is not None:
            dim = self.rope.cos_sin.shape[1]
            if dim % 2 or dim > self.head_dim:
                raise ValueError(f"rotary_dim {dim} must be even and at most head_dim {self.head_dim}")
            _check_floats("the rotary table", self.rope.cos_sin)

    @property
    def rotary_dim(self) -> int:
        return 0 if self.rope is None else self.rope.cos_sin.shape[1]

    def struct(self) -> AttentionStruct:
        """Points to the tensors, which must be kept."""
        rope = self.rope
        return AttentionStruct(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.window or 0,
            self.scale,
            self.softcap or 0.0,
            address(self.sinks),
            address(self.query_factors),
            norm_struct(self.q_norm),
            norm_struct(self.k_norm),
            norm_struct(self.v_norm),
            _RopeStruct() if rope is None else _RopeStruct(address(rope.cos_sin), self.rotary_dim, rope.interleaved),
        )


def norm_struct(norm: Norm | None) -> NormStruct:
    """Points to the tensors, which must be kept."""
    if norm is None:
        return NormStruct()
    kind = {"rms": 1, "layer": 2}[norm.kind]
    stride = norm.size if norm.heads > 1 else 0
    return NormStruct(address(norm.weight), address(norm.bias), norm.size, norm.eps, kind, stride)


def _check_floats(what: str, tensor: torch.Tensor | None, size: int | None = None) -> None:
    """The kernels read memory as it lies: another dtype or order would be read wrongly."""
    if tensor is None:
        return
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise ValueError(f"{what} must be contiguous float32, not {tensor.dtype}")
    if size is not None and tensor.shape != (size,):
        raise ValueError(f"{what} must be [{size}], not {list(tensor.shape)}")


def misfit_of_attention(heads_per_kv: int, head_dim: int, block_size: int, dtype: torch.dtype) -> str | None:
    """Why the attention kernels cannot serve a model, or None."""
    if heads_per_kv > MAX_HEADS_PER_KV:
        return f"{heads_per_kv} query heads share a KV head, more than {MAX_HEADS_PER_KV}"
    if head_dim % TILE or head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is no multiple of {TILE} up to {MAX_HEAD_DIM}"
    if block_size % TILE:
        return f"--block-size {block_size} is no multiple of {TILE}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {str(dtype).removeprefix('torch.')} is neither float32 nor bfloat16"
    return None


def norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """float32 [R, size] → float32 [R, size]."""
    out = torch.empty_like(x)
    struct = norm_struct(norm)
    kernels().vsp_norm(address(x), c_int64(x.shape[0]), byref(struct), address(out), threads())
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """float32 [R, N], float32 [N] → float32 [R, N]; N is a multiple of 16."""
    return norm(x, Norm(x.shape[1], eps, weight))


@dataclass(frozen=True)
class PreparedBatch:
    """A batch as the kernels read it, with the tensors that it points to."""

    struct: BatchStruct
    tensors: tuple[torch.Tensor, ...]


def prepare(metadata: AttentionMetadata) -> PreparedBatch:
    """Positions are given later, to what needs them."""
    lens = torch.tensor([metadata.query_lens, metadata.context_lens], dtype=torch.int64)
    groups = torch.tensor(
        [(g.first_token, g.num_tokens, g.first_slot, g.length) for g in metadata.groups], dtype=torch.int64
    )
    slots, tables = metadata.slot_mapping.contiguous(), metadata.block_tables.contiguous()
    struct = BatchStruct(
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
    num_kv_heads, head_dim = k_cache.shape[1:]
    options = AttentionOptions(num_heads, num_kv_heads, head_dim, 1.0, rope=Rope(cos_sin))
    return norm_rope_and_write(qkv, positions, slot_mapping, k_cache, v_cache, options)


def norm_rope_and_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    options: AttentionOptions,
) -> torch.Tensor:
    """`rope_and_write` with all that a layer may do to q, k and v before attention, but `query_factors`, which belong
    to the scores."""
    q = torch.empty(len(qkv), options.num_heads, options.head_dim)
    slots = slot_mapping.contiguous()
    batch = BatchStruct(num_tokens=len(qkv), positions=address(positions), slots=address(slots))
    struct = options.struct()
    kernels().vsp_rope_and_write(
        byref(struct),
        byref(batch),
        address(qkv),
        c_int32(format_of(k_cache.dtype)),
        address(k_cache),
        address(v_cache),
        address(q),
        threads(),
    )
    return q


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    batch: PreparedBatch,
    arithmetic: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `AttentionBackend.forward`, for float32 `q` [T, H, D]; returns float32. The last three are those of
    `AttentionOptions`."""
    out = torch.empty_like(q)
    num_kv_heads, head_dim = k_cache.shape[1:]
    options = AttentionOptions(q.shape[1], num_kv_heads, head_dim, scale, window, softcap, sinks)
    struct = options.struct()
    kernels().vsp_attention(
        byref(struct),
        byref(batch.struct),
        address(q),
        c_int32(format_of(k_cache.dtype)),
        c_int32(arithmetic),
        address(k_cache),
        address(v_cache),
        address(out),
        threads(),
    )
    return out

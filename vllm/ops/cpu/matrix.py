"""Packed matrices of the compiled CPU kernels and their products; the structs mirror `csrc/cpu/api.h`."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from ctypes import byref, c_float, c_int32, c_int64, c_void_p
from functools import lru_cache

import torch

from vllm.ops.cpu.library import address, kernels, threads

TILE = 16
"""Columns of a packed tile; slots of a tile of KV memory."""

WIDEN, DOT, TILES = 0, 1, 2
"""How bfloat16 operands are multiplied: widened to float32, by dot products of pairs, or in tile registers; each as the
one before it where the instructions for it are not there."""
ARITHMETICS = ("widened to float32", "in dot products", "in tile registers")

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu2")
"""Of an MLP, in the order of the kernels' numbers: `gelu` is exact, `gelu_tanh` its approximation by tanh, `relu2` the
square of max(x, 0)."""

_FORMATS = {torch.float32: 0, torch.bfloat16: 1}
_INT8 = 2


class MatrixStruct(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("format", c_int32),
    ]


class ProjectionStruct(ctypes.Structure):
    _fields_ = [("w", MatrixStruct), ("factor", c_float), ("softcap", c_float)]


def format_of(dtype: torch.dtype) -> int:
    """Its number in the kernels.

    Raises:
        ValueError: they do not take it.
    """
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


class Matrix:
    """A weight [N, K] in the kernels' own order; see `csrc/cpu/api.h`.

    Attributes:
        data: The weights.
        bias: float32 [N], or None.
        interleaved: Tiles of a gate and of an up projection take turns.
        struct: Points to all of it.
    """

    n: int
    k: int
    data: torch.Tensor
    bias: torch.Tensor | None
    interleaved: bool
    struct: MatrixStruct


def in_tiles(bias: torch.Tensor, interleave: bool) -> torch.Tensor:
    """A bias [N] in the order of the columns."""
    return bias.view(2, -1, TILE).transpose(0, 1).flatten().contiguous() if interleave else bias


class PackedMatrix(Matrix):
    """A weight that is packed as it is, or as int8.

    Args:
        weight: float32 or bfloat16; K is a multiple of 16.
        bias: [N], or None.
        interleave: The rows are a gate and an up projection, N/2 each (a multiple of 16), of a gated MLP.
        int8: Quantise: symmetric, one factor a row.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, interleave: bool = False, int8: bool = False
    ) -> None:
        self.n, self.k = weight.shape
        self.interleaved = interleave
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
            kind = c_int32(format_of(weight.dtype))
            kernels().vsp_pack(address(weight), n, k, kind, interleaved, address(self.data))
        self.bias = None if bias is None else in_tiles(bias.float(), interleave)
        kind_of_data = _INT8 if int8 else format_of(weight.dtype)
        self.struct = MatrixStruct(address(self.data), address(self.scale), address(self.bias), n, k, kind_of_data)

    @classmethod
    def of_parts(
        cls,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        interleave: bool = False,
        int8: bool = False,
    ) -> PackedMatrix:
        """One matrix of several over each other (q, k and v; gate and up), any of which may have a bias [N]."""
        bias = None
        if any(b is not None for b in biases):
            parts = zip(weights, biases, strict=True)
            bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in parts])
        return cls(torch.cat(list(weights)), bias, interleave, int8)


class PackedHead:
    """The output projection: `y = factor (x Wᵀ + b)`, then `softcap tanh(y / softcap)` where there is a cap.

    Args:
        matrix: [vocab_size, hidden_size].
        factor: Above 0.
        softcap: Above 0, or None.
    """

    def __init__(self, matrix: Matrix, factor: float = 1.0, softcap: float | None = None) -> None:
        if not factor > 0 or (softcap is not None and not softcap > 0):
            raise ValueError(f"factor {factor} and soft cap {softcap} of logits must be above 0")
        self.matrix = matrix
        self.struct = ProjectionStruct(matrix.struct, factor, softcap or 0.0)


def linear(x: torch.Tensor, weight: Matrix | PackedHead, arithmetic: int) -> torch.Tensor:
    """`x Wᵀ + b`, or the logits of a head: float32 [R, K] → float32 [R, N]."""
    struct = _projection(weight)
    out = torch.empty((x.shape[0], struct.w.n))
    kernels().vsp_linear(address(x), c_int64(x.shape[0]), byref(struct), address(out), c_int32(arithmetic), threads())
    return out


def most_likely(x: torch.Tensor, weight: Matrix | PackedHead, arithmetic: int) -> torch.Tensor:
    """The column of each row's highest of `linear`, the first of equals, whose products never go through memory:
    float32 [R, K] → int64 [R]."""
    out = torch.empty(x.shape[0], dtype=torch.int64)
    kernels().vsp_most_likely(
        address(x),
        c_int64(x.shape[0]),
        byref(_projection(weight)),
        address(out),
        c_int32(arithmetic),
        threads(),
    )
    return out


def activated(x: torch.Tensor, weight: Matrix, activation: str, arithmetic: int, gated: bool = True) -> torch.Tensor:
    """The first half of an MLP: `activation(gate) * up` of x times an interleaved matrix, float32 [R, K] →
    [R, N/2]; or `activation(x Wᵀ + b)`, [R, N] with N a multiple of 16."""
    if gated != weight.interleaved or weight.n % TILE:
        raise ValueError(f"{weight.n} rows, interleaved: {weight.interleaved}, are no MLP with gated={gated}")
    out = torch.empty((x.shape[0], weight.n // 2 if gated else weight.n))
    kernels().vsp_activated(
        address(x),
        c_int64(x.shape[0]),
        byref(weight.struct),
        c_int32(ACTIVATIONS.index(activation)),
        c_int32(gated),
        address(out),
        c_int32(arithmetic),
        threads(),
    )
    return out


def swiglu(x: torch.Tensor, weight: Matrix, arithmetic: int) -> torch.Tensor:
    """`activated` with SiLU and a gate."""
    return activated(x, weight, "silu", arithmetic)


def _projection(weight: Matrix | PackedHead) -> ProjectionStruct:
    return weight.struct if isinstance(weight, PackedHead) else ProjectionStruct(weight.struct, 1.0, 0.0)

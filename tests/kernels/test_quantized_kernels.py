"""Kernels of quantised weights against the dequantised matrices in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.kernel_inputs import DEVICE, TOLERANCE, assert_near, randn
from vllm.ops import activation, packed4, packed8
from vllm.ops.norm import Norm
from vllm.ops.packed4 import Packed4
from vllm.ops.packed8 import Packed8
from vllm.ops.triton import packed4 as kernels
from vllm.ops.triton import packed8 as kernels8
from vllm.ops.triton import rows8
from vllm.ops.triton.norm import row_norm_reference

# Every size and code. `test_quantized_layers.py` runs the same kernels each time.
pytestmark = pytest.mark.nightly


def make_packed(
    rows: int, features: int, group: int, code: packed4.Code, dtype: torch.dtype, factors: bool = False
) -> Packed4:
    generator = torch.Generator().manual_seed(rows + features)
    codes = torch.randint(0, 16, (rows, features), generator=generator).to(DEVICE, torch.uint8)
    scales = torch.rand((rows, -(-features // group)), generator=generator).add(0.1).to(DEVICE)
    zeros = None
    if code == "int4_zeros":
        zeros = torch.randint(0, 17, scales.shape, generator=generator).to(DEVICE).float()
    of_rows = torch.rand(rows, generator=generator).add(0.5).to(DEVICE) if factors else None
    given = "e2m1" if code == "e2m1" else "int4"
    return packed4.pack(codes, scales, group, zeros, of_rows, given, dtype)


CASES = [
    (40, 128, 128, "int4"),
    (70, 256, 128, "int4_zeros"),
    (33, 192, 64, "int4"),
    (24, 160, 32, "int4_zeros"),
    (24, 96, 96, "int4"),
    (72, 384, 384, "int4_zeros"),
    (40, 144, 16, "e2m1"),
    (40, 288, 32, "e2m1"),
    (17, 1160, 1160, "int4"),
]
TYPED = [(*case, torch.bfloat16) for case in CASES] + [(*CASES[i], torch.float16) for i in (1, 3, 6)]


@pytest.mark.parametrize(("rows", "features", "group", "code", "dtype"), TYPED)
def test_unpacked(rows: int, features: int, group: int, code: packed4.Code, dtype: torch.dtype) -> None:
    for factors in (False, True):
        weight = make_packed(rows, features, group, code, dtype, factors)
        assert_near(kernels.unpack(weight, dtype), packed4.unpack(weight, dtype), 1e-6)


@pytest.mark.parametrize(
    ("rows", "features", "group", "code", "dtype", "tokens"),
    [(*case, tokens) for case in TYPED for tokens in (1, 3)] + [(*TYPED[i], 70) for i in (1, 7)],
)
def test_packed4_linear(
    rows: int, features: int, group: int, code: packed4.Code, dtype: torch.dtype, tokens: int
) -> None:
    weight = make_packed(rows, features, group, code, dtype, factors=code == "e2m1")
    x = randn(tokens, features, dtype=dtype)
    want = x.double() @ packed4.unpack(weight, torch.float32).double().T
    assert_near(kernels.packed4_linear(x, weight, None), want, TOLERANCE[dtype])
    residual, bias = randn(tokens, rows, dtype=dtype, seed=1), randn(rows, dtype=dtype, seed=2)
    want = want + residual.double() + bias.double()
    assert kernels.packed4_linear(x, weight, bias, residual) is residual
    assert_near(residual, want, TOLERANCE[dtype])


def test_programs_share_features_where_tiles_are_few() -> None:
    how = kernels.tiles(3, 64, 16, 132)
    assert how.split > 1
    weight = make_packed(64, 2048, 128, "int4", torch.bfloat16)
    x = randn(3, 2048, dtype=torch.bfloat16)
    want = x.double() @ packed4.unpack(weight, torch.float32).double().T
    out = x.new_empty(3, 64)
    kernels._tile(x, weight, out, False, how)
    assert_near(out, want, TOLERANCE[torch.bfloat16])
    again = x.new_empty(3, 64)
    kernels._tile(x, weight, again, False, how)
    assert torch.equal(out, again)


def test_long_prompts_multiply_by_a_dequantised_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DEQUANTISE_FROM", 9)
    weight = make_packed(40, 256, 128, "int4", torch.bfloat16)
    x = randn(9, 256, dtype=torch.bfloat16)
    want = x.double() @ packed4.unpack(weight, torch.float32).double().T
    assert_near(kernels.packed4_linear(x, weight, None), want, TOLERANCE[torch.bfloat16])


def test_groups_that_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="groups of 48 of 96 input features cannot be packed"):
        make_packed(8, 96, 48, "int4", torch.bfloat16)


def make_packed8(rows: int, features: int, dtype: torch.dtype, by_block: bool) -> Packed8:
    weight = packed8.quantise_rows(randn(rows, features, seed=3), dtype, by_block)
    scales = weight.scales
    if by_block:
        # Of four rows each.
        scales = scales[::4].repeat_interleave(4, 0).contiguous()
    return Packed8(weight.data, scales)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize(("rows", "size"), [(3, 64), (5, 300), (2, 1536)])
def test_rows_are_quantised(rows: int, size: int, by_block: bool, dtype: torch.dtype) -> None:
    x = 3 * randn(rows, size, dtype=torch.bfloat16)
    found, want = rows8.quantise_rows(x, dtype, by_block), packed8.quantise_rows(x, dtype, by_block)
    torch.testing.assert_close(found.scales, want.scales)
    # A quotient on the middle between two codes may go to either.
    assert float((found.data.float() != want.data.float()).double().mean()) < 0.005
    bound = (1 / 16 if dtype == torch.float8_e4m3fn else 0.5 / 127) * float(x.abs().max())
    assert float((packed8.dequantise(*found) - x.float()).abs().max()) <= 1.01 * bound


@pytest.mark.parametrize("tokens", [1, 3, 70])
@pytest.mark.parametrize(
    ("rows", "features", "dtype", "by_block"),
    [
        (48, 256, torch.float8_e4m3fn, False),
        (80, 400, torch.float8_e4m3fn, True),
        (144, 640, torch.float8_e4m3fn, True),
        (48, 144, torch.int8, False),
    ],
)
def test_packed8_linear(rows: int, features: int, dtype: torch.dtype, by_block: bool, tokens: int) -> None:
    weight = make_packed8(rows, features, dtype, by_block)
    x = randn(tokens, features, dtype=torch.bfloat16)
    inputs = x if tokens == 1 else packed8.dequantise(*rows8.quantise_rows(x, dtype, by_block))
    want = inputs.double() @ packed8.dequantise(*weight).double().T
    assert_near(kernels8.packed8_linear(x, weight, None), want, TOLERANCE[torch.bfloat16])
    residual = randn(tokens, rows, dtype=torch.bfloat16, seed=1)
    bias = randn(rows, dtype=torch.bfloat16, seed=2)
    want = want + residual.double() + bias.double()
    assert kernels8.packed8_linear(x, weight, bias, residual) is residual
    assert_near(residual, want, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("by_block", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_and_activations_of_quantised_rows(kind: str, by_block: bool) -> None:
    x, weight = 3 * randn(3, 384, dtype=torch.bfloat16), randn(384, dtype=torch.bfloat16, seed=1)
    bias = randn(384, dtype=torch.bfloat16, seed=2) if kind == "layer" else None
    norm = Norm(1e-5, kind=kind)  # type: ignore[arg-type]
    found = rows8.norm_rows(x, weight, bias, norm, torch.float8_e4m3fn, by_block)
    # Three bits of mantissa; the rounding of the norm itself, too, may go another way.
    assert_near(packed8.dequantise(*found), row_norm_reference(x, weight, bias, norm), 0.04)
    for gated in (False, True):
        found = rows8.activate_rows(x, "silu", gated, torch.float8_e4m3fn, by_block)
        assert_near(packed8.dequantise(*found), activation.activate(x, "silu", gated), 0.04)

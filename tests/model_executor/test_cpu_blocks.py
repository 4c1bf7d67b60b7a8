"""Weights in blocks on the compiled CPU kernels: to the bit what the dequantised float32 weights give."""

from __future__ import annotations

import pytest
import torch

from tests.model_executor.block_rows import GGUF_TYPES, block_rows
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.ops.cpu.kernels import TILES, WIDEN, BlockMatrix, PackedHead, PackedMatrix, pack_int4_groups

pytestmark = pytest.mark.parametrize("cpu_instructions", cpu_kernels.INSTRUCTIONS, indirect=True)
every_type = pytest.mark.parametrize("name", GGUF_TYPES)
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 23, 200)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_type
@pytest.mark.parametrize(("n", "k"), [(1, 256), (37, 768), (112, 512)])
def test_products_are_those_of_the_dequantised_weights(cpu_instructions: str, name: str, n: int, k: int) -> None:
    rows, weight = block_rows(name, n, k)
    bias = randn(n, seed=1)
    blocks, whole = BlockMatrix([rows], bias), PackedMatrix(weight, bias)
    for count in ROWS:
        x = randn(count, k, seed=count)
        assert torch.equal(cpu_kernels.linear(x, blocks, WIDEN), cpu_kernels.linear(x, whole, WIDEN))
        assert torch.equal(cpu_kernels.most_likely(x, blocks, WIDEN), cpu_kernels.most_likely(x, whole, WIDEN))


@every_type
def test_rows_are_the_dequantised_ones(cpu_instructions: str, name: str) -> None:
    rows, weight = block_rows(name, 53, 512)
    ids = torch.tensor([52, 0, 17, 17, 31])
    assert torch.equal(BlockMatrix([rows]).rows(ids), weight[ids])


@every_type
def test_bfloat16_is_that_of_weights_that_were_rounded(cpu_instructions: str, name: str) -> None:
    """Where the processor multiplies it; elsewhere weights are not rounded."""
    rows, weight = block_rows(name, 72, 512)
    narrow = cpu_instructions in ("avx512_bf16", "amx")
    blocks = BlockMatrix([rows], narrow=True)
    whole = PackedMatrix(weight.bfloat16() if narrow else weight)
    for count in ROWS:
        x = randn(count, 512, seed=count)
        assert torch.equal(cpu_kernels.linear(x, blocks, TILES), cpu_kernels.linear(x, whole, TILES))


def test_parts_of_several_types(cpu_instructions: str) -> None:
    parts = [block_rows(name, n, 512, seed=n) for name, n in (("Q4_1", 64), ("Q5_0", 32), ("Q6_K", 48), ("Q8_0", 7))]
    bias = randn(151)
    blocks = BlockMatrix([rows for rows, _ in parts], bias)
    whole = PackedMatrix(torch.cat([weight for _, weight in parts]), bias)
    for count in ROWS:
        x = randn(count, 512, seed=count)
        assert torch.equal(cpu_kernels.linear(x, blocks, WIDEN), cpu_kernels.linear(x, whole, WIDEN))
    ids = torch.tensor([0, 63, 64, 95, 96, 143, 144, 150])
    assert torch.equal(blocks.rows(ids), torch.cat([weight for _, weight in parts])[ids])


@pytest.mark.parametrize("names", [("Q4_K", "Q4_K"), ("Q4_1", "Q8_0")], ids=["alike", "different"])
def test_a_gate_and_an_up_projection(cpu_instructions: str, names: tuple[str, str]) -> None:
    parts = [block_rows(name, 112, 256, seed=i) for i, name in enumerate(names)]
    bias = randn(224)
    blocks = BlockMatrix([rows for rows, _ in parts], bias, interleave=True)
    whole = PackedMatrix(torch.cat([weight for _, weight in parts]), bias, interleave=True)
    for count in ROWS:
        x = randn(count, 256, seed=count)
        assert torch.equal(cpu_kernels.swiglu(x, blocks, WIDEN), cpu_kernels.swiglu(x, whole, WIDEN))


@pytest.mark.parametrize("group", [32, 64, 128, 512])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_groups_of_4_bit_numbers(cpu_instructions: str, group: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(group)
    q = torch.randint(0, 16, (40, 512), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(40, 512 // group, generator=generator) * 0.1).to(dtype)
    zeros = torch.randint(0, 16, scales.shape, generator=generator)
    wide, less = (t.float().repeat_interleave(group, dim=1) for t in (scales, zeros))
    weight = wide * (q.float() - less)
    blocks, whole = BlockMatrix([pack_int4_groups(q, scales, zeros)]), PackedMatrix(weight)
    assert torch.equal(blocks.rows(torch.arange(40)), weight)
    for count in ROWS:
        x = randn(count, 512, seed=count)
        assert torch.equal(cpu_kernels.linear(x, blocks, WIDEN), cpu_kernels.linear(x, whole, WIDEN))


def test_a_head_in_blocks(cpu_instructions: str) -> None:
    rows, weight = block_rows("Q8_0", 100, 64)
    heads = [PackedHead(matrix, 0.5, 3.0) for matrix in (BlockMatrix([rows]), PackedMatrix(weight))]
    x = randn(5, 64)
    assert torch.equal(*(cpu_kernels.linear(x, head, WIDEN) for head in heads))


def test_what_cannot_be_packed(cpu_instructions: str) -> None:
    short, _ = block_rows("Q8_0", 20, 64)
    with pytest.raises(ValueError, match=r"parts of \[20, 20\] rows: all but the last must be multiples of 16"):
        BlockMatrix([short, short])
    with pytest.raises(ValueError, match="groups of a multiple of 32 columns"):
        pack_int4_groups(torch.zeros(4, 96, dtype=torch.uint8), torch.ones(4, 6), torch.zeros(4, 6))


def test_infinite_and_tiny_scales(cpu_instructions: str) -> None:
    """Half-precision numbers of every kind come through as the `gguf` library reads them."""
    rows, _ = block_rows("Q8_0", 16, 32)
    scales = torch.tensor([0, 1, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0x8000, 0x8001, *range(1, 7)])
    rows.data[:, :2] = scales.to(torch.int16).unsqueeze(1).view(torch.uint8)
    wide = scales.to(torch.int16).view(torch.float16).float()
    want = wide.unsqueeze(1) * rows.data[:, 2:].view(torch.int8).float()
    torch.testing.assert_close(BlockMatrix([rows]).rows(torch.arange(16)), want, rtol=0, atol=0, equal_nan=True)
    found = cpu_kernels.linear(torch.eye(32), BlockMatrix([rows]), WIDEN)[:, :5]
    torch.testing.assert_close(found, want.T[:, :5], rtol=0, atol=0)

"""Time, bandwidth and arithmetic rate of every Triton kernel on a GPU, against ceilings measured on the same device.

    python benchmarks/benchmark_kernels.py --out benchmarks/results/h100_kernels.json
    python benchmarks/benchmark_kernels.py --check   kernels against their references over odd sizes, then the timings
    python benchmarks/benchmark_kernels.py --tune    the attention kernels with other tile shapes as well

Bytes are the fewest that must move (each input read once, each output written once), operations those of the products.
Shapes are Llama-3.1-8B's. Times are medians of graph replays with the L2 cache flushed in between.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.testing

from vllm.ops.attention import hopper as gluon_attention
from vllm.ops.attention.merge import merge_partials
from vllm.ops.attention.prefix import plan_prefix, prefix_attention, prefix_attention_reference, prefix_tiles
from vllm.ops.attention.suffix import (
    plan_chunk,
    plan_suffix,
    suffix_attention,
    suffix_attention_reference,
    suffix_tiles,
)
from vllm.ops.attention.tiles import TileConfig
from vllm.ops.launch import compiling_ahead
from vllm.ops.norm import Norm
from vllm.ops.rope import Rope
from vllm.ops.triton.activation import activate
from vllm.ops.triton.copy import BlockCopier
from vllm.ops.triton.linear import row_linear
from vllm.ops.triton.norm import row_norm
from vllm.ops.triton.rope import rope_and_write

HEADS, KV_HEADS, DIM, HIDDEN, INTERMEDIATE, BLOCK_SIZE = 32, 8, 128, 4096, 14336, 16
DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
# Largest ‖out - reference‖ / ‖reference‖.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, BF16: 8e-3}

PREFIX_TILES = [
    TileConfig(16, 64, 4, 3, 2),
    TileConfig(16, 64, 4, 4, 2),
    TileConfig(16, 128, 4, 2, 2),
    TileConfig(16, 32, 4, 4, 3),
    TileConfig(64, 64, 4, 3, 2),
    TileConfig(64, 128, 4, 2, 1),
    TileConfig(128, 64, 8, 3, 1),
    TileConfig(128, 128, 8, 2, 1),
    TileConfig(128, 128, 8, 3, 1),
]
SUFFIX_TILES = [
    TileConfig(16, 32, 4, 3, 4),
    TileConfig(16, 32, 4, 5, 3),
    TileConfig(16, 64, 4, 3, 3),
    TileConfig(16, 64, 4, 5, 2),
    TileConfig(16, 64, 2, 3, 4),
    TileConfig(64, 64, 4, 3, 2),
    TileConfig(128, 64, 8, 3, 1),
    TileConfig(128, 64, 8, 5, 1),
    TileConfig(128, 128, 8, 3, 1),
]


@dataclass
class Case:
    """A kernel on one input.

    Attributes:
        num_bytes: Fewest bytes to move.
        flops: Operations of the products.
    """

    name: str
    run: Callable[[], object]
    num_bytes: float
    flops: float = 0.0


def randn(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(dtype)


def num_sms() -> int:
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count


def to_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(DEVICE)


def size_of(work: np.ndarray) -> torch.Tensor:
    return torch.tensor([len(work)], dtype=torch.int32, device=DEVICE)


def median_ms(run: Callable[[], object]) -> float:
    """Milliseconds of one run, replayed as a graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return float(triton.testing.do_bench(graph.replay, warmup=10, rep=60, return_mode="median"))


def prefix_case(
    groups: int, batch: int, length: int, tiles: TileConfig | None = None, tma: bool = False, hopper: bool = False
) -> Case:
    """`batch` decode tokens in equal groups, each over an extent of its own.

    Args:
        hopper: By the kernel for Hopper instead.
    """
    per_group = batch // groups
    tiles = gluon_attention.TILES if hopper else tiles or prefix_tiles(batch * HEADS // KV_HEADS, DIM, BF16)
    programs = num_sms() * tiles.programs_per_sm
    parts = min(64, max(12, 1024 // batch))
    index = np.arange(groups)
    table = np.zeros((groups, 5), np.int64)
    table[:, 0], table[:, 1], table[:, 2], table[:, 3] = index * per_group, per_group, index * length, length
    work, counts = plan_prefix(
        table,
        batch,
        group_size=HEADS // KV_HEADS,
        num_kv_heads=KV_HEADS,
        tiles=tiles,
        num_programs=programs,
        max_partials=parts - parts // 4,
        max_work=10**6,
    )
    q, k, v = randn(batch, HEADS, DIM), *(randn(groups * length, KV_HEADS, DIM) for _ in range(2))
    out = torch.empty(parts, batch, HEADS, DIM, device=DEVICE)
    lse = torch.empty(parts, batch, HEADS, device=DEVICE)
    arguments = (q, k, v, DIM**-0.5, to_device(work), size_of(work), out, lse)

    def run() -> None:
        if hopper:
            gluon_attention.hopper_attention(*arguments, programs)
        else:
            prefix_attention(*arguments, tiles, programs, tma)

    return Case(
        f"prefix {groups} × {length}, {batch} sequences{' [Gluon]' if hopper else label(tiles, tma)}",
        run,
        2 * k.nbytes + q.nbytes + int(counts.sum()) * HEADS * (DIM + 1) * 4,
        4.0 * batch * HEADS * DIM * length,
    )


def suffix_case(batch: int, queries: int, context: int, tiles: TileConfig | None = None, hopper: bool = False) -> Case:
    """`batch` sequences with `queries` query tokens each; one part a token where nothing is split.

    Args:
        hopper: By the kernel for Hopper instead.
    """
    tiles = gluon_attention.TILES if hopper else tiles or suffix_tiles(queries * HEADS // KV_HEADS, DIM, BF16)
    programs = num_sms() * tiles.programs_per_sm
    parts = 1 if hopper or batch * queries > 64 else 16
    index = np.arange(batch)
    counts = np.zeros(batch * queries, np.int32)
    work = plan_suffix(
        index * queries,
        np.full(batch, queries),
        np.full(batch, context),
        index,
        counts,
        group_size=HEADS // KV_HEADS,
        num_kv_heads=KV_HEADS,
        tiles=tiles,
        num_programs=programs,
        max_partials=parts,
        max_work=10**6,
    )
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.randperm(batch * blocks, device=DEVICE).view(batch, blocks)
    q = randn(batch * queries, HEADS, DIM)
    k, v = (randn(batch * blocks * BLOCK_SIZE, KV_HEADS, DIM) for _ in range(2))
    direct = parts == 1
    out = torch.empty(parts, *q.shape, device=DEVICE, dtype=BF16 if direct else torch.float32)
    lse = None if direct else torch.empty(parts, *q.shape[:2], device=DEVICE)
    items, size = to_device(work), size_of(work)
    grid = programs if hopper or queries == 1 else len(work) * KV_HEADS

    def run() -> None:
        if hopper:
            gluon_attention.hopper_attention(
                q, k, v, DIM**-0.5, items, size, out, lse, grid, block_tables=tables, block_size=BLOCK_SIZE, causal=True
            )
        else:
            suffix_attention(q, k, v, DIM**-0.5, tables, BLOCK_SIZE, items, size, out, lse, tiles, grid)

    written = int(counts.sum()) * HEADS * DIM * out.element_size()
    pairs = sum(context - queries + 1 + i for i in range(queries))
    return Case(
        f"suffix {batch} × {context} keys, {queries} queries each{' [Gluon]' if hopper else label(tiles)}",
        run,
        batch * context * 2 * KV_HEADS * DIM * 2 + q.nbytes + written,
        4.0 * batch * pairs * HEADS * DIM,
    )


def chunk_case(start: int, count: int) -> Case:
    """A chunk of a system prompt's own prefill, by the kernel for Hopper."""
    work = plan_chunk(0, start, count, gluon_attention.TILES.tokens(HEADS // KV_HEADS))
    q, k, v = randn(count, HEADS, DIM), *(randn(start + count, KV_HEADS, DIM) for _ in range(2))
    out, items, size = torch.empty_like(q), to_device(work), size_of(work)
    return Case(
        f"prefill of tokens {start} … {start + count - 1} [Gluon]",
        lambda: gluon_attention.hopper_attention(q, k, v, DIM**-0.5, items, size, out, None, num_sms(), causal=True),
        2 * k.nbytes + 2 * q.nbytes,
        4.0 * HEADS * DIM * (start * count + count * (count + 1) / 2),
    )


def row_case(rows: int, columns: int) -> Case:
    x, weight = randn(1, columns), randn(rows, columns)
    return Case(f"one row × {rows} × {columns}", lambda: row_linear(x, weight), weight.nbytes, 2.0 * weight.numel())


def label(tiles: TileConfig, tma: bool = False) -> str:
    shape = f"{tiles.block_m}×{tiles.block_n} w{tiles.num_warps} s{tiles.num_stages} p{tiles.programs_per_sm}"
    return f" [{shape}{' descriptors' if tma else ''}]"


def merge_case(batch: int, parts: int) -> Case:
    partial, lse = torch.randn(parts, batch, HEADS, DIM, device=DEVICE), torch.randn(parts, batch, HEADS, device=DEVICE)
    counts = torch.full((batch,), parts, dtype=torch.int32, device=DEVICE)
    out = randn(batch, HEADS, DIM)
    moved = partial.nbytes + lse.nbytes + out.nbytes
    return Case(f"merge {batch} tokens × {parts} parts", lambda: merge_partials(partial, lse, counts, out), moved)


def layer_cases(tokens: int) -> Iterator[Case]:
    x, weight = randn(tokens, HIDDEN), randn(HIDDEN)
    yield Case(f"norm {tokens} tokens", lambda: row_norm(x, weight, None, Norm(1e-5)), 2 * x.nbytes + weight.nbytes)
    qkv = randn(tokens, (HEADS + 2 * KV_HEADS) * DIM)
    k, v = (randn(2 * tokens, KV_HEADS, DIM) for _ in range(2))
    cos_sin = torch.randn(40960, DIM, device=DEVICE)
    positions = torch.randint(40960, (tokens,), device=DEVICE)
    slots = torch.randperm(2 * tokens, device=DEVICE)[:tokens]
    q = randn(tokens, HEADS, DIM)
    yield Case(
        f"rotary + K/V write {tokens} tokens",
        lambda: rope_and_write(qkv, positions, Rope(cos_sin), None, slots, k, v, HEADS, q),
        2 * qkv.nbytes + tokens * (DIM * 4 + 16),
    )
    gate_up = randn(tokens, 2 * INTERMEDIATE)
    out = randn(tokens, INTERMEDIATE)
    yield Case(f"SiLU·mul {tokens} tokens", lambda: activate(gate_up, "silu", True, out), gate_up.nbytes + out.nbytes)


def copy_case(blocks: int) -> Case:
    caches = [randn(4 * blocks * BLOCK_SIZE, KV_HEADS, DIM) for _ in range(64)]
    copier = BlockCopier(caches, BLOCK_SIZE)
    moves = to_device(np.stack((np.arange(blocks), np.arange(blocks) + 2 * blocks), axis=1))
    moved = 2.0 * 64 * blocks * BLOCK_SIZE * KV_HEADS * DIM * 2
    # The list is on the device already: a graph cannot hold its transfer.
    return Case(f"copy {blocks} blocks × 32 layers", lambda: copier.launch(copier.bases, copier.bases, moves), moved)


def ceilings() -> tuple[float, float]:
    """(bytes/s of a device-to-device copy, read plus written; FLOP/s of an 8192³ bfloat16 product)."""
    source = torch.randint(127, (2**31,), dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    copy_ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    a, b = randn(8192, 8192), randn(8192, 8192)
    product_ms = triton.testing.do_bench(lambda: a @ b, return_mode="median")
    return 2 * source.nbytes / copy_ms * 1e3, 2 * 8192**3 / product_ms * 1e3


def cases() -> Iterator[Case]:
    for length, batch in product((2048, 8192, 32768), (1, 16, 64, 256)):
        yield prefix_case(1, batch, length)
        yield prefix_case(1, batch, length, tma=True)
    if torch.cuda.get_device_capability()[0] == 9:
        for length, batch in product((2048, 8192, 32768), (64, 256)):
            yield prefix_case(1, batch, length, hopper=True)
        yield prefix_case(8, 256, 8192, hopper=True)
        yield prefix_case(1, 8192, 24576, hopper=True)
        yield from (chunk_case(start, 4096) for start in (0, 12288, 28672))
        for batch, queries, context in ((1, 8192, 8192), (8, 1024, 1024), (64, 128, 128), (4, 512, 8192)):
            yield suffix_case(batch, queries, context, hopper=True)
    for rows, columns in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)):
        yield row_case(rows, columns)
    yield prefix_case(8, 256, 8192)
    yield prefix_case(64, 64, 2048)
    for batch, context in ((1, 384), (1, 32768), (16, 1152), (64, 2048), (256, 256), (256, 1152)):
        yield suffix_case(batch, 1, context)
    for batch, queries, context in ((1, 128, 128), (1, 8192, 8192), (8, 1024, 1024), (64, 128, 128), (4, 512, 8192)):
        yield suffix_case(batch, queries, context)
    yield from (merge_case(batch, parts) for batch, parts in ((1, 36), (16, 34), (64, 9), (256, 3)))
    for tokens in (1, 256, 8192):
        yield from layer_cases(tokens)
    yield copy_case(64)


def tuning_cases() -> Iterator[Case]:
    for length, batch in ((32768, 256), (8192, 256), (32768, 64), (8192, 16), (32768, 1), (2048, 1)):
        for tiles, tma in product(PREFIX_TILES, (False, True)):
            if (tiles.block_m == 16 and batch > 16) or (tiles.block_m > 64 and batch <= 16):
                continue
            yield prefix_case(1, batch, length, tiles, tma)
    for batch, queries, context in ((256, 1, 1152), (256, 1, 256), (1, 1, 384), (8, 1024, 1024), (1, 8192, 8192)):
        for tiles in SUFFIX_TILES:
            if (tiles.block_m == 16) == (queries == 1):
                yield suffix_case(batch, queries, context, tiles)


def relative_error(out: torch.Tensor, want: torch.Tensor) -> float:
    finite = torch.isfinite(want)
    if not torch.equal(torch.isfinite(out), finite):
        return float("inf")
    out, want = out[finite].double(), want[finite].double()
    return float((out - want).norm() / want.norm().clamp(min=1e-30))


def check() -> None:
    """Prefix and suffix attention over odd sizes against float64; raises AssertionError with the sizes that fail."""
    worst = dict.fromkeys(TOLERANCE, 0.0)
    checks: list[tuple[torch.dtype, Callable[[bool], float], tuple[Any, ...]]] = []
    for count, (dtype, dim, kv_heads) in enumerate(product(TOLERANCE, (64, 80, 96, 128, 256), (1, 4, 8))):
        # One of the lengths, row counts and group sizes for each shape; over all shapes, all of them come up.
        length, tokens = (1, 15, 16, 17, 4097)[count % 5], (1, 2, 17, 75, 300)[count // 5 % 5]
        heads = kv_heads * (1, 3, 4, 8)[count % 4]
        for kernel, shapes in ((_check_prefix, prefix_tiles), (_check_suffix, suffix_tiles)):
            for tiles in {shapes(rows, dim, dtype) for rows in (16, 64, 1024)}:
                what = (dtype, heads, kv_heads, dim, length, tokens, tiles)
                checks.append((dtype, partial(kernel, *what), (kernel.__name__, *what)))
    with compiling_ahead():
        for _, run, _ in checks:
            run(False)
    for dtype, run, what in checks:
        error = run(True)
        worst[dtype] = max(worst[dtype], error)
        assert error <= TOLERANCE[dtype], (error, *what)
    for dtype, error in worst.items():
        print(f"{len(checks)} cases checked, largest relative error of {dtype}: {error:.2e}")


def _check_prefix(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, length: int, tokens: int, tiles: TileConfig, compare: bool
) -> float:
    groups = np.array([[0, tokens, 3, length, 0], [tokens, 2, 3 + length, 16, 0]])
    programs = num_sms() * tiles.programs_per_sm
    work, _ = plan_prefix(
        groups,
        tokens + 3,
        group_size=heads // kv_heads,
        num_kv_heads=kv_heads,
        tiles=tiles,
        num_programs=programs,
        max_partials=8,
        max_work=10**6,
    )
    q = randn(tokens + 3, heads, dim, dtype=dtype)
    k, v = (randn(length + 19, kv_heads, dim, dtype=dtype) for _ in range(2))
    out = torch.full((8, tokens + 3, heads, dim), float("nan"), device=DEVICE)
    lse = torch.full(out.shape[:3], float("nan"), device=DEVICE)
    want, want_lse = out.clone(), lse.clone()
    prefix_attention(q, k, v, dim**-0.5, to_device(work), size_of(work), out, lse, tiles, programs)
    if not compare:
        return 0.0
    prefix_attention_reference(q, k, v, dim**-0.5, torch.from_numpy(work), want, want_lse)
    return max(relative_error(out, want), relative_error(lse, want_lse))


def _check_suffix(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, length: int, tokens: int, tiles: TileConfig, compare: bool
) -> float:
    queries = np.array([min(tokens, length), 1, 1, 1])
    contexts = np.array([length, 1, 0, 40])
    programs = num_sms() * tiles.programs_per_sm
    counts = np.zeros(int(queries.sum()), np.int32)
    work = plan_suffix(
        queries.cumsum() - queries,
        queries,
        contexts,
        np.arange(4),
        counts,
        group_size=heads // kv_heads,
        num_kv_heads=kv_heads,
        tiles=tiles,
        num_programs=programs,
        max_partials=8,
        max_work=10**6,
    )
    width = -(-max(length, 40) // BLOCK_SIZE)
    tables = torch.randperm(4 * width, device=DEVICE).view(4, width)
    q = randn(len(counts), heads, dim, dtype=dtype)
    k, v = (randn(4 * width * BLOCK_SIZE, kv_heads, dim, dtype=dtype) for _ in range(2))
    out = torch.full((8, len(counts), heads, dim), float("nan"), device=DEVICE)
    lse = torch.full(out.shape[:3], float("nan"), device=DEVICE)
    want, want_lse = out.clone(), lse.clone()
    arguments = (q, k, v, dim**-0.5, tables, BLOCK_SIZE)
    suffix_attention(*arguments, to_device(work), size_of(work), out, lse, tiles, programs)
    if not compare:
        return 0.0
    suffix_attention_reference(*arguments, torch.from_numpy(work), want, want_lse)
    return max(relative_error(out, want), relative_error(lse, want_lse))


@dataclass
class Result:
    name: str
    ms: float
    gb_per_s: float
    tflop_per_s: float
    percent_of_copy: float
    percent_of_product: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the references over odd sizes first")
    parser.add_argument("--tune", action="store_true", help="also time other tile shapes")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/benchmark_kernels.py needs an NVIDIA GPU.")
    torch.manual_seed(0)
    if args.check:
        check()
    copy_rate, product_rate = ceilings()
    name = torch.cuda.get_device_name()
    print(f"{name}: copy {copy_rate / 1e9:.0f} GB/s, bfloat16 product {product_rate / 1e12:.0f} TFLOP/s")
    print(f"{'kernel':78} {'µs':>9} {'GB/s':>6} {'':>5} {'TFLOP/s':>8}")
    results = []
    for source in (cases, tuning_cases) if args.tune else (cases,):
        for case in source():
            try:
                ms = median_ms(case.run)
            except triton.runtime.errors.OutOfResources as error:
                print(f"{case.name:78} {error}")
                continue
            moved, done = case.num_bytes / ms * 1e3, case.flops / ms * 1e3
            results.append(
                Result(
                    case.name,
                    round(ms, 5),
                    round(moved / 1e9, 1),
                    round(done / 1e12, 2),
                    round(100 * moved / copy_rate, 1),
                    round(100 * done / product_rate, 1),
                )
            )
            print(
                f"{case.name:78} {1e3 * ms:9.1f} {moved / 1e9:6.0f} {100 * moved / copy_rate:4.0f}% {done / 1e12:8.1f} "
                f"{100 * done / product_rate:4.0f}%"
            )
    if args.out:
        report = {
            "device": name,
            "copy_gb_per_s": round(copy_rate / 1e9, 1),
            "product_tflop_per_s": round(product_rate / 1e12, 1),
            "kernels": [asdict(r) for r in results],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

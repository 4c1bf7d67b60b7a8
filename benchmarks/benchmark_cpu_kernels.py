#!/usr/bin/env python3
"""Time, bandwidth and arithmetic rate of every compiled CPU kernel, against ceilings measured on the same machine.

    python benchmarks/benchmark_cpu_kernels.py --out benchmarks/results/cpu_kernels.json
    python benchmarks/benchmark_cpu_kernels.py --markdown benchmarks/results/cpu_kernels.json   an earlier run's table

Shapes are the default model's. Bytes are the fewest that must move (each input read once, each output written once),
operations those of the products. Weights, keys and values are taken from so many copies in turn that none is in a cache
when its turn comes. Times are medians of calls, made as the engine makes them.

A kernel cannot take less time than its bytes need at the highest bandwidth seen or its operations at the highest rate
seen. The longer of the two binds; the percentage says how near to it the kernel comes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from chat_load import markdown_table, positive_int, say
from machine_facts import machine
from vllm.ops.attention.metadata import AttentionMetadata, PrefixGroup
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.ops.cpu.kernels import (
    AttentionOptions,
    BlockMatrix,
    BlockRows,
    DecoderLayer,
    DecoderProgram,
    Matrix,
    Norm,
    PackedMatrix,
    Rope,
)
from vllm.ops.sampling import Flag, IntColumn, SamplingTables
from vllm.platforms import CpuPlatform

LAYERS, HEADS, KV_HEADS, DIM, HIDDEN, INTERMEDIATE, VOCABULARY = 30, 9, 3, 64, 576, 1536, 49152
BLOCK_SIZE, PREFIX, OWN = 16, 3000, 96
# Rows (N) and columns (K) of the matrices of a layer, then the output projection.
MATRICES = {
    "qkv": ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
    "o": (HIDDEN, HEADS * DIM),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
    "output": (VOCABULARY, HIDDEN),
}
# Of weights, and what is multiplied by them; those of BLOCKS stay as GGUF files have them.
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
BLOCKS = {"Q4_1": torch.float32, "Q8_0": torch.float32}
FORMATS |= BLOCKS
LINEAR_ROWS = (1, 8, 32, 200, 2048)
ARITHMETICS = {
    cpu_kernels.WIDEN: "widened to float32",
    cpu_kernels.DOT: "in dot products",
    cpu_kernels.TILES: "in tiles",
}
MEMORY, CACHE, ARITHMETIC = "memory", "cache", "arithmetic"


@dataclass
class Case:
    """A kernel on inputs of one shape.

    Attributes:
        calls: The same work on other copies of the inputs; taken in turn.
        num_bytes: Fewest bytes to move.
        flops: Operations of the products.
        from_memory: Whether the bytes come from memory; otherwise they are in a cache, and only the operations bind.
    """

    kernel: str
    dtype: str
    calls: Sequence[Callable[[], object]]
    num_bytes: float
    flops: float = 0.0
    from_memory: bool = True


@dataclass(frozen=True)
class Result:
    kernel: str
    dtype: str
    us: float
    gb_per_s: float
    gflop_per_s: float
    from_memory: bool


class Setting:
    """How much is measured, and on copies of what size."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.seconds: float = args.seconds
        self.rotated_bytes = args.rotated_mib * 2**20

    def copies(self, num_bytes: int) -> int:
        return max(1, math.ceil(self.rotated_bytes / num_bytes))

    def median_s(self, calls: Sequence[Callable[[], object]]) -> float:
        """Seconds of a call, in the middle."""
        calls[0]()
        times: list[float] = []
        ending = time.perf_counter() + self.seconds
        for call in itertools.cycle(calls):
            started = time.perf_counter()
            call()
            ended = time.perf_counter()
            times.append(ended - started)
            if ended > ending and len(times) >= 3:
                break
        return statistics.median(times)

    def measure(self, case: Case) -> Result:
        seconds = self.median_s(case.calls)
        rates = case.num_bytes / seconds / 1e9, case.flops / seconds / 1e9
        say(f"{case.kernel}, {case.dtype}: {seconds * 1e6:.1f} µs, {rates[0]:.1f} GB/s, {rates[1]:.0f} GFLOP/s")
        return Result(case.kernel, case.dtype, seconds * 1e6, *rates, case.from_memory)


def packed(name: str, form: str, interleave: bool = False) -> Matrix:
    n, k = MATRICES[name]
    if form in BLOCKS:
        sizes = (n // 2, n // 2) if interleave else (n,)
        return BlockMatrix([in_blocks(form, size, k) for size in sizes], interleave=interleave)
    return PackedMatrix((torch.randn(n, k) * 0.02).to(FORMATS[form]), interleave=interleave, int8=form == "int8")


def in_blocks(form: str, n: int, k: int) -> BlockRows:
    blocks = gguf.quantize(np.random.default_rng(0).standard_normal((n, k)) * 0.02, gguf.GGMLQuantizationType[form])
    return BlockRows(torch.from_numpy(blocks), k, form)


def size_of(matrix: Matrix) -> int:
    scale = matrix.scale if isinstance(matrix, PackedMatrix) else None
    return matrix.data.nbytes + (0 if scale is None else scale.nbytes)


def linear_cases(setting: Setting) -> Iterator[Case]:
    for (name, (n, k)), form in itertools.product(MATRICES.items(), FORMATS):
        first = packed(name, form)
        matrices = [first, *(packed(name, form) for _ in range(setting.copies(size_of(first)) - 1))]
        for rows in LINEAR_ROWS:
            if name == "output" and rows > LINEAR_ROWS[2]:
                continue  # Only the last token of a sequence is projected.
            x = torch.randn(rows, k)
            moved = size_of(first) + x.nbytes + 4 * rows * n
            calls = calls_of(cpu_kernels.linear, x, matrices)
            yield Case(f"linear {name}, {rows_of(rows)}", form, calls, moved, 2.0 * rows * n * k)
            if name == "output":
                calls = calls_of(cpu_kernels.most_likely, x, matrices)
                yield Case(f"most_likely, {rows_of(rows)}", form, calls, moved - 4 * rows * n, 2.0 * rows * n * k)


def swiglu_cases(setting: Setting) -> Iterator[Case]:
    n, k = MATRICES["gate_up"]
    for form in FORMATS:
        first = packed("gate_up", form, interleave=True)
        matrices = [first, *(packed("gate_up", form, True) for _ in range(setting.copies(size_of(first)) - 1))]
        for rows in (1, 8, 2048):
            x = torch.randn(rows, k)
            moved = size_of(first) + x.nbytes + 2 * rows * n
            calls = calls_of(cpu_kernels.swiglu, x, matrices)
            yield Case(f"swiglu gate_up, {rows_of(rows)}", form, calls, moved, 2.0 * rows * n * k)


def calls_of(
    kernel: Callable[[torch.Tensor, Matrix, int], torch.Tensor], x: torch.Tensor, matrices: Sequence[Matrix]
) -> list[Callable[[], object]]:
    return [partial(kernel, x, matrix, cpu_kernels.arithmetic()) for matrix in matrices]


@dataclass(frozen=True)
class Batch:
    """Sequences of `queries` tokens each, the last ones of `context` own tokens, that share a prefix."""

    sequences: int
    queries: int
    context: int
    prefix: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.queries

    @property
    def slots(self) -> int:
        """Of one layer's cache: own blocks first, then the prefix."""
        return self._first_prefix_slot + -(-self.prefix // BLOCK_SIZE) * BLOCK_SIZE

    @property
    def keys_read(self) -> int:
        return self.sequences * self.context + self.prefix

    @property
    def flops(self) -> float:
        """Of one layer's attention."""
        pairs = sum(self.context - self.queries + 1 + i for i in range(self.queries))
        return 4.0 * HEADS * DIM * self.sequences * (pairs + self.queries * self.prefix)

    @property
    def positions(self) -> torch.Tensor:
        own = torch.arange(self.context - self.queries, self.context)
        return (self.prefix + own).repeat(self.sequences)

    def metadata(self) -> AttentionMetadata:
        blocks = -(-self.context // BLOCK_SIZE)
        tables = torch.arange(self.sequences * blocks).view(self.sequences, blocks)
        own = torch.arange(self.context - self.queries, self.context)
        slots = (tables[:, own // BLOCK_SIZE] * BLOCK_SIZE + own % BLOCK_SIZE).flatten()
        groups = [PrefixGroup(0, self.tokens, self._first_prefix_slot, self.prefix)] if self.prefix else []
        counts = [self.queries] * self.sequences, [self.context] * self.sequences
        return AttentionMetadata(slots, tables, *counts, groups, BLOCK_SIZE)

    @property
    def _first_prefix_slot(self) -> int:
        return self.sequences * -(-self.context // BLOCK_SIZE) * BLOCK_SIZE


def attention_cases(setting: Setting) -> Iterator[Case]:
    batches = {
        f"1 token × {PREFIX:,} shared keys": Batch(1, 1, 1, PREFIX),
        f"8 tokens × {PREFIX:,} shared keys": Batch(8, 1, 1, PREFIX),
        f"44 tokens × {PREFIX:,} shared keys": Batch(1, 44, 44, PREFIX),
        f"512 tokens × {PREFIX:,} shared keys": Batch(1, 512, 512, PREFIX),
        "1,024 tokens, causal": Batch(1, 1024, 1024, 0),
        "8 sequences × 1,024 own keys": Batch(8, 1, 1024, 0),
    }
    for (name, batch), dtype in itertools.product(batches.items(), (torch.float32, torch.bfloat16)):
        width = KV_HEADS * DIM * dtype.itemsize
        caches = kv_caches(batch, dtype, setting.copies(2 * batch.slots * width))
        q = torch.randn(batch.tokens, HEADS, DIM)
        prepared, arithmetic = cpu_kernels.prepare(batch.metadata()), cpu_kernels.arithmetic()
        calls = [partial(cpu_kernels.attention, q, k, v, DIM**-0.5, prepared, arithmetic) for k, v in caches]
        moved = 2 * batch.keys_read * width + 2 * q.nbytes
        yield Case(f"attention, {name}", name_of(dtype), calls, moved, batch.flops)


def kv_caches(batch: Batch, dtype: torch.dtype, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    k, v = (torch.randn(batch.slots, KV_HEADS, DIM).to(dtype) for _ in range(2))
    return [(k, v), *((k.clone(), v.clone()) for _ in range(count - 1))]


def cos_sin() -> torch.Tensor:
    angles = torch.outer(torch.arange(8192.0), 1e5 ** -(torch.arange(0, DIM, 2) / DIM))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def small_cases(setting: Setting) -> Iterator[Case]:
    """What moves bytes and computes little."""
    turns = cos_sin()
    for rows in (1, 8, 2048):
        x, weight = torch.randn(rows, HIDDEN), torch.ones(HIDDEN)
        norm = [partial(cpu_kernels.rms_norm, x, weight, 1e-5)]
        yield Case(f"rms_norm, {rows_of(rows)}", "float32", norm, 2 * x.nbytes + weight.nbytes, from_memory=False)
    for rows, dtype in itertools.product((1, 8, 2048), (torch.float32, torch.bfloat16)):
        batch = Batch(rows, 1, 1, 0) if rows < 16 else Batch(1, rows, rows, 0)
        ((k, v),) = kv_caches(batch, dtype, 1)
        qkv, slots = torch.randn(rows, (HEADS + 2 * KV_HEADS) * DIM), batch.metadata().slot_mapping
        write = [partial(cpu_kernels.rope_and_write, qkv, batch.positions, turns, slots, k, v, HEADS)]
        moved = rows * (DIM * 4 + 4 * (2 * HEADS + 2 * KV_HEADS) * DIM + 2 * KV_HEADS * DIM * dtype.itemsize)
        yield Case(f"rope_and_write, {rows_of(rows)}", name_of(dtype), write, moved, from_memory=False)
    cache = torch.randn(setting.rotated_bytes // (KV_HEADS * DIM * 4) // 32 * 32, KV_HEADS, DIM)
    half = len(cache) // BLOCK_SIZE // 2
    pairs = torch.stack((torch.arange(half), torch.arange(half) + half), dim=1)
    # 64 blocks a call, the next ones every time.
    calls = [partial(cpu_kernels.copy_blocks, cache, some, BLOCK_SIZE) for some in pairs[: half // 64 * 64].split(64)]
    yield Case("copy_blocks, 64 blocks, 1 thread", "float32", calls, 2 * 64 * BLOCK_SIZE * KV_HEADS * DIM * 4)


WISHES: dict[str, tuple[float, ...]] = {
    # Temperature, top_p, min_p, presence, frequency and repetition penalty; top_k.
    "the highest": (0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0),
    "temperature 1": (1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0),
    "top_p 0.95": (1.0, 0.95, 0.0, 0.0, 0.0, 1.0, 0),
    "top_k 50": (1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 50),
    "min_p 0.05": (1.0, 1.0, 0.05, 0.0, 0.0, 1.0, 0),
    "all of these and penalties": (0.8, 0.95, 0.05, 0.5, 0.5, 1.1, 50),
}


def sampling_cases() -> Iterator[Case]:
    """What becomes of logits, which the output projection has just written."""
    for (shape, spread), rows in itertools.product({"normal": 3.0, "flat": 0.01}.items(), (1, 8)):
        logits = torch.randn(rows, VOCABULARY) * spread
        index, token_ids = torch.arange(rows), torch.zeros(rows, 2, dtype=torch.int64)
        for name, (*floats, top_k) in WISHES.items():
            tables = SamplingTables.make(rows, VOCABULARY, torch.device("cpu"))
            tables.floats[:] = torch.tensor(floats)
            tables.ints[:, IntColumn.TOP_K] = int(top_k)
            tables.ints[:, IntColumn.SEED] = index
            if floats[-1] != 1.0:
                tables.ints[:, IntColumn.FLAGS] = Flag.PENALTIES
                tables.counts[:, :300] = 1
            draw = partial(cpu_kernels.sample, logits, index, torch.ones_like(index), token_ids, tables)
            yield Case(f"sample {shape} logits, {name}, {rows_of(rows)}", "float32", [draw], logits.nbytes, 0.0, False)
        top = partial(cpu_kernels.logprobs, logits, index, 5)
        yield Case(f"logprobs {shape} logits, 5 a row, {rows_of(rows)}", "float32", [top], logits.nbytes, 0.0, False)


def stack_cases() -> Iterator[Case]:
    """All layers in one call; their weights together are larger than the caches."""
    batches = {
        f"1 row, {OWN} keys": Batch(1, 1, OWN, 0),
        f"8 rows, {OWN} keys each": Batch(8, 1, OWN, 0),
        f"1 row, {PREFIX:,} + {OWN} keys": Batch(1, 1, OWN, PREFIX),
        f"8 rows, {PREFIX:,} shared + {OWN} keys": Batch(8, 1, OWN, PREFIX),
        "60 rows, causal": Batch(1, 60, 60, 0),
        f"44 rows, {PREFIX:,} keys, then causal": Batch(1, 44, 44, PREFIX),
        "1,024 rows, causal": Batch(1, 1024, 1024, 0),
    }
    for form, dtype in FORMATS.items():
        attention = AttentionOptions(HEADS, KV_HEADS, DIM, DIM**-0.5, rope=Rope(cos_sin()))
        norm = Norm(HIDDEN, 1e-5, torch.ones(HIDDEN))
        layers = [
            DecoderLayer(
                attention,
                packed("qkv", form),
                packed("o", form),
                packed("gate_up", form, interleave=True),
                packed("down", form),
                before_attention=norm,
                before_mlp=norm,
            )
            for _ in range(LAYERS)
        ]
        stack = DecoderProgram(layers, norm)
        weights = sum(size_of(matrix) for layer in layers for matrix in layer.matrices)
        parameters = LAYERS * sum(n * k for name, (n, k) in MATRICES.items() if name != "output")
        for name, batch in batches.items():
            k, v = (list(caches) for caches in zip(*kv_caches(batch, dtype, LAYERS), strict=True))
            embeddings = torch.randn(batch.tokens, HIDDEN).to(dtype)
            step = partial(run_stack, stack, embeddings, batch.positions, k, v, batch.metadata())
            moved = weights + 2 * LAYERS * batch.keys_read * KV_HEADS * DIM * dtype.itemsize
            flops = 2.0 * batch.tokens * parameters + LAYERS * batch.flops
            yield Case(f"all layers, {name}", form, [step], moved, flops)


def run_stack(
    stack: DecoderProgram,
    embeddings: torch.Tensor,
    positions: torch.Tensor,
    k: list[torch.Tensor],
    v: list[torch.Tensor],
    metadata: AttentionMetadata,
) -> torch.Tensor:
    """As a step does it, the plan of its attention included."""
    return stack.forward(embeddings, positions, k, v, cpu_kernels.prepare(metadata))


def rows_of(count: int) -> str:
    return f"{count:,} row{'s' if count > 1 else ''}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Ceilings ------------------------------------------------------------------------------------------------------------


def ceilings(setting: Setting, threads: int) -> dict[str, float]:
    """GB/s at which memory is read and copied, GFLOP/s of torch's products."""
    large = torch.ones(setting.rotated_bytes // 4)
    target = torch.empty_like(large)
    matrices = [packed("output", "float32") for _ in range(setting.copies(4 * VOCABULARY * HIDDEN))]
    one_row = calls_of(cpu_kernels.linear, torch.randn(1, HIDDEN), matrices)
    found = {}
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        label = "1 thread" if count == 1 else f"{count} threads"
        found[f"read GB/s, torch's sum, {label}"] = large.nbytes / setting.median_s([large.sum]) / 1e9
        found[f"read GB/s, linear of 1 row, {label}"] = size_of(matrices[0]) / setting.median_s(one_row) / 1e9
        copied = setting.median_s([partial(target.copy_, large)])
        found[f"copy GB/s (read + written), torch, {label}"] = 2 * large.nbytes / copied / 1e9
    for dtype in (torch.float32, torch.bfloat16):
        for m, n, k in ((2048, 2 * INTERMEDIATE, HIDDEN), (2048, 2048, 2048)):
            x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            seconds = setting.median_s([partial(torch.nn.functional.linear, x, weight)])
            found[f"GFLOP/s, torch {name_of(dtype)}, {m} × {n} × {k}"] = 2 * m * n * k / seconds / 1e9
    for name, value in found.items():
        say(f"{name}: {value:.1f}")
    return found


def rooflines(results: Sequence[Result], given: dict[str, float]) -> dict[str, float]:
    """The highest rates seen, of torch or of ours: `memory` in GB/s, and GFLOP/s by dtype.

    bfloat16 and int8 operands may be widened to float32, so float32's rate counts for them too.
    """
    memory = [value for name, value in given.items() if "GB/s" in name]
    memory += [result.gb_per_s for result in results if result.from_memory]
    rates = {
        dtype: [value for name, value in given.items() if f"torch {dtype}," in name]
        + [result.gflop_per_s for result in results if result.dtype == dtype]
        for dtype in FORMATS
    }
    wide = max(rates["float32"], default=0.0)
    narrow = max([wide, *rates["bfloat16"], *rates["int8"]])
    return {MEMORY: max(memory), "float32": wide, "bfloat16": narrow, "int8": narrow, **dict.fromkeys(BLOCKS, wide)}


def with_rooflines(result: Result, highest: dict[str, float]) -> dict[str, Any]:
    """The result with what binds it and how near it comes; the percentage is None where neither bytes nor operations
    do."""
    shares = {ARITHMETIC: result.gflop_per_s / highest[result.dtype]}
    if result.from_memory:
        shares[MEMORY] = result.gb_per_s / highest[MEMORY]
    binding = max(shares, key=shares.__getitem__)
    percent = 100 * shares[binding] if shares[binding] > 0 else None
    return {**asdict(result), "bound_by": binding if percent is not None else CACHE, "percent": percent}


def show(report: dict[str, Any]) -> str:
    """A report in Markdown."""
    facts, highest = report["machine"], report["highest"]
    head = (
        f"{facts['cpu']}, {report['threads']} threads, {facts['instructions']}, bfloat16 {report['arithmetic']}; torch "
        f"{facts['torch']}, {report['date'][:10]}. Highest seen: {highest[MEMORY]:.1f} GB/s, float32 "
        f"{highest['float32']:,.0f} GFLOP/s, bfloat16 and int8 {highest['bfloat16']:,.0f}."
    )
    given: list[list[object]] = [["ceiling", "measured"]]
    given += [[name, f"{value:,.1f}"] for name, value in report["ceilings"].items()]
    table: list[list[object]] = [["kernel", "weights or K/V", "bound by", "µs", "GB/s", "GFLOP/s", "% of the bound"]]
    for row in report["kernels"]:
        rates = [f"{row['us']:,.1f}", f"{row['gb_per_s']:.1f}", f"{row['gflop_per_s']:,.0f}"]
        percent = "–" if row["percent"] is None else f"{row['percent']:.0f}"
        table.append([row["kernel"], row["dtype"], row["bound_by"], *rates, percent])
    return "\n\n".join([head, markdown_table(given), markdown_table(table, num_text_columns=3)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive_int, help="default: those that the server takes")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement (default: %(default)s)")
    parser.add_argument("--rotated-mib", type=positive_int, default=256, help="copies together (default: %(default)s)")
    parser.add_argument("--only", default="", help="only kernels whose name contains this text")
    parser.add_argument("--out", type=Path, help="write the report to this file as JSON")
    parser.add_argument("--markdown", type=Path, metavar="REPORT", help="only show an earlier report")
    args = parser.parse_args()
    if args.markdown:
        print(show(json.loads(args.markdown.read_text())))
        return
    if cpu_kernels.library() is None:
        raise SystemExit("The compiled CPU kernels cannot be used here, so there is nothing to measure.")
    torch.manual_seed(0)
    threads = args.threads or CpuPlatform().take_processors(0, 1)
    torch.set_num_threads(threads)
    setting = Setting(args)
    given = ceilings(setting, threads)
    sources = (
        linear_cases(setting),
        swiglu_cases(setting),
        attention_cases(setting),
        small_cases(setting),
        sampling_cases(),
        stack_cases(),
    )
    results = [setting.measure(case) for case in itertools.chain(*sources) if args.only in case.kernel]
    highest = rooflines(results, given)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "threads": threads,
        "arithmetic": ARITHMETICS[cpu_kernels.arithmetic()],
        "ceilings": given,
        "highest": highest,
        "kernels": [with_rooflines(result, highest) for result in results],
    }
    print(show(report))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

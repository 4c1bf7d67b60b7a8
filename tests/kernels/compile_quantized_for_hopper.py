"""Compiles the kernels of quantised weights for a Hopper GPU, on a machine that has none, for Llama-3.1-8B's matrices.

`python compile_quantized_for_hopper.py [--once]` prints a line for each kernel; exits with an error where one does not
compile, or needs more shared memory than a program has. With --once, a few of them.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch
from triton.runtime import driver

from tests.kernels.compile_for_hopper import MAX_SHARED, HopperDriver
from vllm.ops import packed4
from vllm.ops.norm import Norm
from vllm.ops.packed8 import Packed8, Rows8
from vllm.ops.triton import packed4 as kernels4
from vllm.ops.triton import packed4_row, rows8, sum_parts
from vllm.ops.triton import packed8 as kernels8

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
MODULES = (kernels4, packed4_row, kernels8, rows8, sum_parts)
done: set[tuple[Any, ...]] = set()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    options |= {"PDL": True, "launch_pdl": True}
    key = (kernel, tuple(options.items()), tuple(getattr(x, "dtype", None) for x in args))
    if key in done:
        return
    done.add(key)
    compiled = kernel.warmup(*args, grid=grid, **options)
    shared = compiled.metadata.shared
    shown = " ".join(f"{k}={v}" for k, v in options.items() if k.isupper())
    print(f"{kernel.__name__} {shared} bytes shared: {shown}", flush=True)
    if shared > MAX_SHARED:
        raise SystemExit(f"{kernel.__name__} needs {shared} bytes of shared memory; a program has {MAX_SHARED}.")


def four_bits(group: int, code: packed4.Code, features: int) -> packed4.Packed4:
    scales = torch.zeros(features // group, 4096, dtype=BF16)
    zeros = torch.zeros(scales.shape, dtype=torch.uint8) if code == "int4_zeros" else None
    factors = torch.zeros(4096) if group == 16 else None
    data = torch.zeros(4096, features // 2, dtype=torch.uint8)
    return packed4.Packed4(data, scales, zeros, factors, features, group, code)


def compile_all(once: bool) -> None:
    cases: list[tuple[int, packed4.Code]] = [(128, "int4")]
    if not once:
        cases += [(128, "int4_zeros"), (64, "int4"), (32, "int4_zeros"), (32, "e2m1"), (16, "e2m1")]
    for group, code in cases:
        for features in (14336,) if once else (4096, 14336):
            weight = four_bits(group, code, features)
            for rows in (1, 256) if once else (1, 8, 32, 64, 256):
                kernels4.packed4_linear(torch.zeros(rows, features, dtype=BF16), weight, None)
            kernels4.unpack(weight, BF16)
    for dtype, count in ((E4M3, 32),) if once else ((E4M3, 32), (E4M3, 1), (torch.int8, 1)):
        matrix = Packed8(torch.zeros(4096, 4096, dtype=torch.int8).view(dtype), torch.zeros(4096, count))
        for rows in (1, 256) if once else (1, 8, 32, 64, 256):
            kernels8._row(torch.zeros(1, 4096, dtype=BF16), matrix, torch.zeros(1, 4096, dtype=BF16), False)
            x = Rows8(torch.zeros(rows, 4096, dtype=torch.int8).view(dtype), torch.zeros(rows, count))
            kernels8._tile(x, matrix, torch.zeros(rows, 4096, dtype=BF16), False)
        x, weight_of_norm = torch.zeros(2, 4096, dtype=BF16), torch.zeros(4096, dtype=BF16)
        rows8.norm_rows(x, weight_of_norm, None, Norm(1e-5), dtype, count > 1)
        rows8.activate_rows(torch.zeros(2, 28672, dtype=BF16), "silu", True, dtype, count > 1)


if __name__ == "__main__":
    driver.set_active(HopperDriver())
    patches = [mock.patch.object(module, "launch", launch) for module in MODULES]
    for module in (kernels4, packed4_row):
        # The instructions by which codes are decoded are a GPU's.
        patches.append(mock.patch.object(module, "is_gpu", lambda device: True))
    for module in (kernels4, kernels8):
        patches.append(mock.patch.object(module, "num_multiprocessors", lambda device: 132))
    for patch in patches:
        patch.start()
    compile_all("--once" in sys.argv)

"""Compiles the attention kernels that the Triton backend launches on a Hopper GPU, on a machine that has none.

`python compile_for_hopper.py [--once] CASE…` prints a line for each kernel; exits with an error where one does not
compile, or needs more shared memory than a multiprocessor gives to one program. With --once, each kernel is compiled
for one of the ways in which it is launched with small tiles, and for one with larger ones.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vllm.attention.backends import triton as backend_module
from vllm.attention.replay import ReplayPlans
from vllm.attention.spec import AttentionSpec
from vllm.ops.attention import hopper, merge, prefix, suffix
from vllm.ops.attention.metadata import AttentionMetadata, PrefixGroup

MAX_SHARED = 227 * 1024
BLOCK_SIZE = 16
CPU = torch.device("cpu")

BF16 = torch.bfloat16
CASES: dict[str, AttentionSpec] = {
    "llama": AttentionSpec(32, 8, 128, 128, 0.1, BF16),
    "qwen": AttentionSpec(28, 4, 128, 128, 0.1, BF16),
    "mistral": AttentionSpec(32, 8, 128, 128, 0.1, BF16, window=4096),
    "gemma2": AttentionSpec(8, 4, 256, 256, 0.1, BF16, window=4096, softcap=50.0),
    "gemma2-full": AttentionSpec(8, 4, 256, 256, 0.1, BF16, softcap=50.0),
    "gemma3": AttentionSpec(8, 4, 256, 256, 0.1, BF16, window=1024),
    "gpt-oss": AttentionSpec(64, 8, 64, 64, 0.1, BF16, window=128, sinks=True),
    "gpt-oss-full": AttentionSpec(64, 8, 64, 64, 0.1, BF16, sinks=True),
    "all": AttentionSpec(16, 2, 64, 64, 0.1, BF16, window=128, softcap=5.0, sinks=True),
    "float32": AttentionSpec(4, 2, 64, 64, 0.1, torch.float32, window=100, softcap=5.0, sinks=True),
}


class HopperDriver:
    """As much of a driver as compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU


def batches() -> Iterator[AttentionMetadata]:
    """As `ModelRunner` tries before the engine takes requests: prompts long and short, with and without extents."""
    for lens, groups, contiguous in (
        ([8192], [], None),
        ([8192], [], 0),
        ([1, 8000], [], None),
        ([1, 8000], [PrefixGroup(0, 8001, 0, 4096)], None),
        ([100] * 4, [], None),
        ([100] * 4, [PrefixGroup(0, 400, 0, 4096)], None),
    ):
        tokens = torch.zeros(sum(lens), dtype=torch.int64)
        tables = torch.zeros((len(lens), -(-max(lens) // BLOCK_SIZE)), dtype=torch.int64)
        yield AttentionMetadata(tokens, tables, lens, lens, groups, BLOCK_SIZE, contiguous)


def compile_case(name: str, spec: AttentionSpec, once: bool) -> None:
    done: set[tuple] = set()

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        started = time.perf_counter()
        options |= {"PDL": True, "launch_pdl": True}
        constants = {k: v for k, v in options.items() if isinstance(v, int)}
        key: tuple = (kernel, tuple(constants.items()), tuple(getattr(x, "dtype", None) for x in args))
        if once:
            key = (kernel, constants.get("BLOCK_M", 0) > 16, constants.get("CAUSAL"), constants.get("PAGE"))
        if key in done:
            return
        done.add(key)
        shared = kernel.warmup(*args, grid=grid, **options).metadata.shared
        shown = " ".join(f"{k}={int(v)}" for k, v in constants.items())
        print(
            f"{name} {kernel.__name__} {time.perf_counter() - started:.1f} s, {shared} bytes shared: {shown}",
            flush=True,
        )
        if shared > MAX_SHARED:
            raise SystemExit(f"{kernel.__name__} needs {shared} bytes of shared memory; a program has {MAX_SHARED}.")

    patches = [mock.patch.object(module, "launch", launch) for module in (hopper, merge, prefix, suffix)]
    patches.append(mock.patch.object(backend_module, "gpu_generation", lambda device: (9, 0)))
    patches.append(mock.patch.object(backend_module, "num_multiprocessors", lambda device: 132))
    for patch in patches:
        patch.start()
    backend = backend_module.TritonAttentionBackend(CPU, BLOCK_SIZE)
    k, v = (torch.zeros(64, spec.num_kv_heads, spec.head_dim, dtype=spec.dtype) for _ in range(2))
    sinks = torch.zeros(spec.num_heads, dtype=spec.dtype) if spec.sinks else None

    def attend(tokens: int, prepared: object) -> None:
        q = torch.zeros(tokens, spec.num_heads, spec.head_dim, dtype=spec.dtype)
        backend.attend(q, k, v, spec, prepared, sinks)

    for metadata in batches():
        attend(sum(metadata.query_lens), backend.prepare(metadata, [spec])[0])
    plans = ReplayPlans(backend, [spec], 1024, torch.zeros(16, 16, dtype=torch.int64), BLOCK_SIZE)
    for size in (1, 8, 16, 64, 128, 256, 1024):
        for decode, plain in ((True, True), (True, False), (False, False)):
            attend(size, plans.prepared(size, decode=decode, plain=plain)[0])
    for patch in patches:
        patch.stop()


if __name__ == "__main__":
    driver.set_active(HopperDriver())
    print(f"Triton {triton.__version__}")
    once = "--once" in sys.argv
    for case in [argument for argument in sys.argv[1:] if argument != "--once"] or CASES:
        compile_case(case, CASES[case], once)

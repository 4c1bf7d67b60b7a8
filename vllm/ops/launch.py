"""How Triton kernels are launched: overlapped with the kernel before them, and compiled ahead of use in parallel.

Every kernel takes a constexpr `PDL` and begins with `follow(PDL)`: on Hopper and newer it is launched while the kernel
before it still runs (programmatic dependent launch), and touches what others write only after that one has finished. In
a decode step of one sequence, ten kernels a layer, that takes a microsecond or two off each boundary.

A kernel that reads nothing of the one before it may run beside it: it begins with `follow_or_pass(beside, PDL)` and
ends with `meet(beside, PDL)`, so that whoever follows it follows both. What the one before it waited for is done when
it begins.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm.platforms.devices import gpu_generation

_compile_only = False


@triton.jit
def follow(PDL: tl.constexpr):
    """Waits for the kernel before this one to finish, and lets the one behind it get ready."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def follow_or_pass(beside, PDL: tl.constexpr):
    """As `follow`, but waits for nothing if `beside` is not 0."""
    if PDL:
        if beside == 0:
            gdc_wait()
        gdc_launch_dependents()


@triton.jit
def meet(beside, PDL: tl.constexpr):
    """Ends a kernel that has not waited: it has not finished before the kernel before it has."""
    if PDL:  # noqa: SIM102 - settled when the kernel is compiled
        # One program is enough, and the others leave room for those of the kernel behind.
        if beside != 0 and tl.program_id(0) == 0:
            gdc_wait()


@cache
def _overlaps() -> bool:
    return gpu_generation() >= (9, 0)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches `kernel[grid](*args, **options)`, which must take a constexpr `PDL`.

    Args:
        options: Its constexprs by name, and the compiler's options (`num_warps`, `num_stages`).
    """
    options["PDL"] = _overlaps()
    if options["PDL"]:
        options["launch_pdl"] = True
    if _compile_only:
        kernel.warmup(*args, grid=grid, **options)
    else:
        kernel[grid](*args, **options)


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Within it, launches only compile their kernels, side by side; all are ready at its end.

    What the kernels would have written stays as it is, so nothing that is read back may depend on it.
    """
    global _compile_only
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        _compile_only = True
        try:
            with triton.AsyncCompileMode(threads):
                yield
        finally:
            _compile_only = False

"""How Triton kernels are launched: overlapped with the kernel before them, and compiled ahead of use in parallel.

Every kernel takes a constexpr `PDL` and, where it is set, begins with `gdc_wait()`: on Hopper and newer it may then be
launched while the kernel before it still runs (programmatic dependent launch), and touches memory only after that one
has finished. In a decode step of one sequence, ten kernels a layer, that takes about a microsecond off each boundary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

_compile_only = False


@cache
def _overlaps() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


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
    from triton import AsyncCompileMode

    global _compile_only
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        _compile_only = True
        try:
            with AsyncCompileMode(threads):
                yield
        finally:
            _compile_only = False

"""What a figure depends on: the processor, what may be used of it, and the software that computes."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_instructions() -> str:
    """The instruction set that the compiled CPU kernels use here."""
    from vllm import envs
    from vllm.ops.cpu import kernels as cpu_kernels

    library = cpu_kernels.library()
    if library is None:
        return "none, torch computes"
    best = cpu_kernels.INSTRUCTIONS[library.vsp_best_instructions()]
    return min(best, envs.cpu_instructions() or best, key=cpu_kernels.INSTRUCTIONS.index)


def machine() -> dict[str, Any]:
    """The facts by name."""
    import psutil
    import torch

    import vllm

    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "instructions": cpu_instructions(),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }

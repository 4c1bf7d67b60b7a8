"""The host's processors, and how much of them and of its memory this process may use.

In a container the host's figures are too large; what counts are the limits of the process's control groups, in either
version of the kernel's interface: v2 (`memory.max`, `cpu.max`) or v1 (`memory.limit_in_bytes`, `cpu.cfs_quota_us`).
A limit may sit on any ancestor of the process's group.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from vllm import envs
from vllm.exceptions import StartupError
from vllm.platforms.base import Platform, dtype_name

_ROOT = Path("/")


class CpuPlatform(Platform):
    device_type = "cpu"
    pipeline_depth = 1

    def default_dtype(self, hf_dtype: object, is_quantised_gguf: bool = False) -> str:
        # Measured on a 2-core AVX-512 machine without AMX, torch 2.13: float32 GEMM 300-325 GFLOP/s, bfloat16 162-168.
        # Dequantised weights are free to be either, so they take the faster one.
        if is_quantised_gguf:
            return "float32"
        name = dtype_name(hf_dtype)
        # Processors without native float16 arithmetic emulate it, and its range is too small for some activations that
        # GPUs keep in float32 accumulators. float32 holds every float16 value.
        return "float32" if name in (None, "float16") else str(name)

    def total_memory_bytes(self) -> int:
        return min([psutil.virtual_memory().total, *(group.limit for group in memory_limits())])

    def available_memory_bytes(self) -> int:
        return min([psutil.virtual_memory().available, *(group.left for group in memory_limits())])

    def available_host_memory_bytes(self) -> int:
        return self.available_memory_bytes()

    def available_kv_bytes(self, utilization: float, num_ranks: int = 1) -> int:
        """`VLLM_CPU_KVCACHE_SPACE` for each rank if it is set; else 4 GiB, or half of what is left where that is less,
        for all of them: the host's memory, unlike a GPU's, belongs to others too."""
        asked = envs.cpu_kvcache_space_gib()
        if asked is not None:
            return int(asked * 2**30)
        left = int(self.available_memory_bytes() - (1 - utilization) * self.total_memory_bytes())
        return max(0, min(4 * 2**30, left // 2)) // num_ranks

    def take_processors(self, rank: int, num_ranks: int) -> int:
        """The processors that `VLLM_CPU_OMP_THREADS_BIND` names for the rank, if it names some; else, unbound,
        `OMP_NUM_THREADS` threads if it is set, else this rank's share of the processors this process may run on."""
        bound = envs.cpu_omp_threads_bind()
        if bound is not None:
            if len(bound) != num_ranks:
                raise StartupError(
                    f"VLLM_CPU_OMP_THREADS_BIND names processors for {len(bound)} ranks, separated by |; there are "
                    f"{num_ranks}."
                )
            try:
                os.sched_setaffinity(0, bound[rank])
            except OSError as error:
                raise StartupError(
                    f"VLLM_CPU_OMP_THREADS_BIND: rank {rank} cannot have the processors {sorted(bound[rank])}: "
                    f"{error.strerror}."
                ) from None
            return len(bound[rank])
        value = os.environ.get("OMP_NUM_THREADS", "")
        return int(value) if value.isdecimal() and int(value) > 0 else max(1, usable_cpus() // num_ranks)

    def attention_backend(self) -> str:
        return "CPU"

    def synchronize(self) -> None:
        return None


class MemoryLimit(NamedTuple):
    """A control group's limit and what it still leaves, in bytes."""

    limit: int
    left: int


def usable_cpus(root: Path = _ROOT) -> int:
    """Processors that this process may run on: its affinity mask, cut to its control groups' quota; at least 1."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # Only Linux has affinity masks.
        count = os.cpu_count() or 1
    for folder in _control_groups(root, "cpu"):
        v2 = (_read(folder / "cpu.max") or "max").split()
        quota, period = (
            v2 if len(v2) == 2 else (_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))
        )
        if quota and period and quota.isdecimal() and period.isdecimal() and int(period) > 0:
            count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


def memory_limits(root: Path = _ROOT) -> list[MemoryLimit]:
    """The memory limits that hold for this process, of its control group and of the group's ancestors."""
    limits = []
    for folder in _control_groups(root, "memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if limit and used and limit.isdecimal() and used.isdecimal():
            # The page cache counts as used, but its inactive part is given up under pressure.
            reclaimable = _statistic(folder / "memory.stat", ("inactive_file", "total_inactive_file"))
            limits.append(MemoryLimit(int(limit), max(0, int(limit) - int(used) + reclaimable)))
    return limits


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group for a controller and of its ancestors, as far as they are visible."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, names, path = line.split(":", 2)
        if names == "":
            mount = root / "sys/fs/cgroup"
        elif controller in names.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        # Inside a container the path may be the host's and not exist here; the mount's root is then our own group.
        group = Path(path.lstrip("/"))
        yield from (mount / part for part in (group, *group.parents) if (mount / part).is_dir())


def _statistic(path: Path, names: tuple[str, ...]) -> int:
    """The value of the last of `names` that a `memory.stat` file has, or 0."""
    values = dict(line.split() for line in (_read(path) or "").splitlines() if len(line.split()) == 2)
    return next((int(values[name]) for name in reversed(names) if name in values), 0)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None

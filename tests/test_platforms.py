"""What the platforms say about memory, processors and dtypes."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from vllm.exceptions import StartupError
from vllm.platforms import CudaPlatform, current_platform
from vllm.platforms.cpu import memory_limits, usable_cpus

GIB = 2**30


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


@pytest.mark.parametrize(
    ("hf_dtype", "quantised", "expected"),
    [
        (torch.bfloat16, False, "bfloat16"),
        ("float32", False, "float32"),
        (torch.float16, False, "float32"),
        (None, False, "float32"),
        (torch.bfloat16, True, "float32"),
    ],
)
def test_default_dtype_on_cpu(hf_dtype: object, quantised: bool, expected: str) -> None:
    assert current_platform("cpu").default_dtype(hf_dtype, quantised) == expected


def test_device_names() -> None:
    assert current_platform("cpu").device_type == "cpu"
    assert current_platform("auto").device_type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(StartupError, match="use auto, cpu or cuda"):
        current_platform("tpu")


def test_cuda_without_a_gpu_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    current_platform.cache_clear()
    with pytest.raises(StartupError, match="no usable NVIDIA GPU"):
        current_platform("cuda")
    current_platform.cache_clear()


@pytest.mark.gpu
def test_cuda_memory_and_dtype() -> None:
    platform = current_platform("cuda")
    assert 0 < platform.available_memory_bytes() <= platform.total_memory_bytes()
    assert platform.default_dtype(torch.bfloat16) == "bfloat16"
    assert platform.default_dtype(None, True) in ("bfloat16", "float16")
    platform.synchronize()


def test_cpu_memory_is_within_the_machines() -> None:
    platform = current_platform("cpu")
    assert 0 < platform.available_memory_bytes() <= platform.total_memory_bytes() <= psutil.virtual_memory().total


def test_memory_limits_of_cgroup_v2_and_its_ancestors(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/server",
            "sys/fs/cgroup/pod/server/memory.max": "max",
            "sys/fs/cgroup/pod/server/memory.current": GIB,
            "sys/fs/cgroup/pod/memory.max": 4 * GIB,
            "sys/fs/cgroup/pod/memory.current": 3 * GIB,
            "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {GIB // 2}",
        },
    )
    assert memory_limits(tmp_path) == [(4 * GIB, GIB + GIB // 2)]


def test_memory_limits_of_cgroup_v1_seen_from_inside_a_container(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 2 * GIB,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 4}",
        },
    )
    assert memory_limits(tmp_path) == [(2 * GIB, GIB + GIB // 4)]


def test_usage_above_the_limit_leaves_nothing(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": GIB,
            "sys/fs/cgroup/memory.current": 2 * GIB,
        },
    )
    assert memory_limits(tmp_path) == [(GIB, 0)]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "250000 100000"}, 3),
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "50000 100000", "sys/fs/cgroup/a/b/x": ""}, 1),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": 400000,
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
            },
            8,
        ),
        ({}, 8),
    ],
)
def test_usable_cpus_respects_the_quota(
    files: dict[str, object], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    write(tmp_path, files)
    assert usable_cpus(tmp_path) == expected


def test_num_threads_follows_omp_num_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert current_platform("cpu").take_processors(0, 1) == 7
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert current_platform("cpu").take_processors(0, 1) == usable_cpus()


def test_gpu_threads() -> None:
    assert CudaPlatform().take_processors(0, 1) == usable_cpus()

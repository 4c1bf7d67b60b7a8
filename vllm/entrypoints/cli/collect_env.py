"""`vllm collect-env`: what a bug report should say about this machine. No secrets, no names of users or hosts."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator

import psutil

from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.platforms import CudaPlatform
from vllm.version import __version__

USAGE = ""
DESCRIPTION = "Prints what a bug report should say about this machine."

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "numpy",
    "fastapi",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "pydantic",
    "msgspec",
    "orjson",
    "pyzmq",
    "prometheus-client",
    "huggingface-hub",
    "jinja2",
    "xgrammar",
    "ray",
    "xformers",
)
_VARIABLES = ("CUDA_", "NCCL_", "OMP_", "TORCH", "VLLM_")
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns the exit code."""
    for title, lines in (
        ("System", _system()),
        ("Device", _device()),
        ("Packages", _packages()),
        ("Environment", _environment()),
    ):
        print(f"{title}\n{'=' * len(title)}")
        for name, value in lines:
            print(f"{name:<24}: {value}")
        print()
    return 0


def _system() -> Iterator[tuple[str, object]]:
    yield "vLLM version", __version__
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "OS", platform.platform()
    yield "Architecture", platform.machine()
    yield "CPU", _cpu_name()
    yield "CPUs usable", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "Memory", f"{psutil.virtual_memory().total / 2**30:.1f} GiB"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _device() -> Iterator[tuple[str, object]]:
    import torch

    yield "CUDA of torch", torch.version.cuda
    yield "CUDA usable", CudaPlatform.is_available()
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield f"GPU {i}", f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    yield "NVIDIA driver", _driver_version()
    yield "CPU capability of torch", torch.backends.cpu.get_cpu_capability()
    yield "Threads of torch", torch.get_num_threads()


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "none"
    return found.stdout.strip().partition("\n")[0]


def _packages() -> Iterator[tuple[str, object]]:
    for name in _PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _environment() -> Iterator[tuple[str, object]]:
    for name, value in sorted(os.environ.items()):
        if name.startswith(_VARIABLES):
            yield name, "(set)" if any(word in name for word in _SECRET) else value

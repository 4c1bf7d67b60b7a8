"""The device that this process computes on; the only place that asks which one it is."""

from __future__ import annotations

from functools import lru_cache

from vllm.exceptions import StartupError
from vllm.platforms.base import Platform
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.cuda import CudaPlatform

__all__ = ["CpuPlatform", "CudaPlatform", "Platform", "current_platform"]


@lru_cache
def current_platform(device: str = "auto") -> Platform:
    """Returns the platform of a `--device` value: `cpu`, `cuda`, or `auto` for CUDA where there is a usable GPU.

    Raises:
        StartupError: The value is none of these, or `cuda` was asked for and there is no usable GPU.
    """
    if device == "cpu":
        return CpuPlatform()
    if device == "cuda":
        if not CudaPlatform.is_available():
            raise StartupError(
                "--device cuda: torch finds no usable NVIDIA GPU (is the driver installed, and torch a CUDA build?); "
                "use --device cpu to run without one."
            )
        return CudaPlatform()
    if device == "auto":
        return CudaPlatform() if CudaPlatform.is_available() else CpuPlatform()
    raise StartupError(f"--device {device!r} is not supported; use auto, cpu or cuda.")

"""Kernels run natively where there is an NVIDIA GPU, and in Triton's interpreter on the CPU everywhere else."""

from __future__ import annotations

import importlib.util
import os

import torch

# Read when a kernel is defined, so before any module with kernels is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from tests.kernels.interpreter_repairs import repair

    repair()

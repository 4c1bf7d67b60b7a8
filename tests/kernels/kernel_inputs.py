"""What the kernel tests share: the device, tolerances, and random inputs."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Largest ‖out - reference‖ / ‖reference‖.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCE)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory in which an element that is read but was never written shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def assert_near(out: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Compares by relative norm; also every element by a multiple of it, so that one wrong element of many shows."""
    out, want = out.double(), want.double()
    assert bool(torch.isfinite(out).all())
    scale = max(float(want.norm()), 1e-30)
    assert float((out - want).norm()) <= tolerance * scale
    bound = 30 * tolerance * max(float(want.abs().max()), 1e-30)
    assert float((out - want).abs().max()) <= bound

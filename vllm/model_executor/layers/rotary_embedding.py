"""The tables by which queries and keys are turned, and by which queries grow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from vllm.ops.rope import Rope


class RotaryEmbedding(nn.Module):
    """A table of cosines and sines.

    Attributes:
        cos_sin: float32 [max_positions, R]: R/2 cosines, then as many sines.

    Args:
        frequencies: Angular frequency of each pair of dimensions, in radians a token; R/2 of them.
        factor: Of cosines and sines.
        interleaved: As of `Rope`.
        max_positions: Positions 0 … max_positions-1 are tabulated.
    """

    cos_sin: torch.Tensor

    def __init__(self, frequencies: Sequence[float], factor: float, interleaved: bool, max_positions: int) -> None:
        super().__init__()
        self.interleaved = interleaved
        # Not on the device that the network is being made on.
        positions = torch.arange(max_positions, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, torch.tensor(frequencies, dtype=torch.float32, device="cpu"))
        table = torch.cat((angles.cos(), angles.sin()), dim=-1) * factor
        self.register_buffer("cos_sin", table, persistent=False)

    def rope(self) -> Rope:
        return Rope(self.cos_sin, self.interleaved)


class QueryFactors(nn.Module):
    """The table of `1 + beta · ln(1 + floor(p / length))`.

    Attributes:
        factors: float32 [max_positions].
    """

    factors: torch.Tensor

    def __init__(self, beta: float, length: int, max_positions: int) -> None:
        super().__init__()
        # Not on the device that the network is being made on.
        steps = torch.arange(max_positions, device="cpu").div(length, rounding_mode="floor").float()
        self.register_buffer("factors", 1 + beta * torch.log1p(steps), persistent=False)

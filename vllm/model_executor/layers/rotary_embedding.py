"""Rotary position embedding (Su et al., 2021), half-rotated: dimension i turns with dimension i + head_dim/2."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vllm.exceptions import StartupError

# Scalings whose frequencies do not depend on the length of the sequence at hand.
_STATIC_SCALINGS = ("linear", "llama3", "yarn")


def rope_parameters(config: PretrainedConfig) -> dict[str, Any]:
    """The checkpoint's RoPE settings under one spelling: `rope_type`, `rope_theta` and those of its scaling."""
    parameters = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    parameters.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    return parameters


def inverse_frequencies(config: PretrainedConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Angular frequency of each pair of dimensions, float32 [head_dim / 2], and the factor of cos and sin.

    Raises:
        StartupError: the checkpoint asks for a scaling that is not supported.
    """
    parameters = rope_parameters(config)
    kind = parameters["rope_type"]
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        return 1.0 / (float(parameters["rope_theta"]) ** exponents), 1.0
    if kind not in _STATIC_SCALINGS:
        raise StartupError(
            f"The model asks for RoPE scaling {kind!r}; supported are default, {', '.join(_STATIC_SCALINGS)}."
        )
    with torch.device("cpu"):  # not the device that the network is being made on
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, float(factor)


class RotaryEmbedding(nn.Module):
    """The table of cosines and sines by which queries and keys are turned.

    Attributes:
        cos_sin: float32 [max_positions, head_dim]: head_dim/2 cosines, then as many sines.

    Args:
        config: Checkpoint configuration.
        max_positions: Positions 0 … max_positions-1 are tabulated.
    """

    cos_sin: torch.Tensor

    def __init__(self, config: PretrainedConfig, head_dim: int, max_positions: int) -> None:
        super().__init__()
        frequencies, factor = inverse_frequencies(config, head_dim)
        positions = torch.arange(max_positions, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, frequencies.to("cpu", torch.float32))
        table = torch.cat((angles.cos(), angles.sin()), dim=-1) * factor
        self.register_buffer("cos_sin", table, persistent=False)

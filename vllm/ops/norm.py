"""Norms of rows: root mean square (Zhang and Sennrich, 2019) and layer norm (Ba et al., 2016), in float32.

rms:    n = x / sqrt(mean(x²) + eps)
layer:  n = (x - mean(x)) / sqrt(mean((x - mean(x))²) + eps)
out  =  n · (weight + offset) + bias
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Norm:
    """Kind and numbers of a norm.

    Attributes:
        eps: Added to the mean square.
        kind: `rms` or `layer`.
        offset: Added to the weights (Gemma stores its weights less 1).
        rounds_first: n is rounded to the dtype of x before it is multiplied (as Llama was trained); otherwise once, at
            the end.
    """

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    offset: float = 0.0
    rounds_first: bool = True


def normalise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm) -> torch.Tensor:
    """`norm` of the last dimension, in plain torch.

    Args:
        x: [..., N].
        weight, bias: [N].

    Returns [..., N] in the dtype of `x`.
    """
    rule = functional.rms_norm if norm.kind == "rms" else functional.layer_norm
    wide = rule(x.float(), weight.shape, eps=norm.eps)
    factor = weight.float() + norm.offset
    if norm.rounds_first:
        wide, factor = wide.to(x.dtype), factor.to(x.dtype)
    wide = wide * factor
    return (wide if bias is None else wide + bias).to(x.dtype)

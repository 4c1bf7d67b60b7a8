"""8-bit integers, symmetric, with a factor a tensor or an output feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vllm.model_executor.layers.quantization.base import Scheme
from vllm.model_executor.layers.quantization.stored import ALL, IN, OUT, Axis, Stored
from vllm.transformers_utils.quantization_config import Int8Format


class Int8(Scheme):
    """`weight · weight_scale`. A static factor of the inputs is not used, as with `Fp8`."""

    def __init__(self, format: Int8Format) -> None:
        self.format = format
        axes = () if format.scales == "tensor" else (OUT, Axis("in", ALL))
        self.stored = {
            "weight": Stored((OUT, IN), torch.int8),
            "weight_scale": Stored(axes, torch.float32),
            "input_scale": Stored((), torch.float32, optional=True, read=False),
        }

    def row_scales(self, tensors: Mapping[str, torch.Tensor], parts: Sequence[int], in_features: int) -> torch.Tensor:
        """Factors of each row: float32 [N, 1]."""
        scale = tensors["weight_scale"]
        if not bool(torch.isfinite(scale).all()):
            raise ValueError("weight_scale holds numbers that are not finite")
        if self.format.scales == "channel":
            return scale
        return scale.repeat_interleave(torch.tensor(parts, device=scale.device)).unsqueeze(1)

    def dequantise(self, tensors: Mapping[str, torch.Tensor], parts: Sequence[int], in_features: int) -> torch.Tensor:
        return tensors["weight"].float() * self.row_scales(tensors, parts, in_features)

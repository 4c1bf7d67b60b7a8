"""4-bit floats (e2m1) with a factor a group of input features: MXFP4 (32, powers of two) and NVFP4 (16, e4m3 and one
for the tensor)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vllm.model_executor.layers.quantization.base import Scheme
from vllm.model_executor.layers.quantization.stored import OUT, Axis, Stored
from vllm.ops.quantization import e2m1_values, e8m0_values, spread, unpack_nibbles
from vllm.transformers_utils.quantization_config import Fp4Format


class Fp4(Scheme):
    """Two codes a byte, the earlier one in the low half.

    modelopt's factor of the tensor multiplies, that of compressed-tensors divides. Factors of the inputs are not used:
    inputs stay in the dtype of the network.

    Attributes:
        group: Input features of a group.
    """

    def __init__(self, format: Fp4Format) -> None:
        self.format = format
        self.group = 16 if format.kind == "nv" else 32
        modelopt = format.layout == "modelopt"
        self.weight_name = "weight" if modelopt else "weight_packed"
        self.global_name = "weight_scale_2" if modelopt else "weight_global_scale"
        of_group = torch.float8_e4m3fn if format.kind == "nv" else torch.uint8
        number = Stored((), torch.float32)
        self.stored = {
            self.weight_name: Stored((OUT, Axis("in", 2)), torch.uint8),
            "weight_scale": Stored((OUT, Axis("in", self.group)), of_group),
        }
        if format.kind == "nv":
            self.stored[self.global_name] = number
            inputs = "input_scale" if modelopt else "input_global_scale"
            self.stored[inputs] = Stored((), torch.float32, optional=True, read=False)

    def scales_and_factors(
        self, tensors: Mapping[str, torch.Tensor], parts: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Factors of each group, float32 [N, groups], and of each row besides, float32 [N], where there are some."""
        scale = tensors["weight_scale"]
        wide, rows = e8m0_values(scale) if self.format.kind == "mx" else scale.float(), None
        if self.format.kind == "nv":
            of_part = tensors[self.global_name]
            of_part = of_part if self.format.layout == "modelopt" else 1.0 / of_part
            rows = of_part.repeat_interleave(torch.tensor(parts, device=scale.device))
        for factors in (wide, rows):
            if factors is not None and not bool(torch.isfinite(factors).all()):
                raise ValueError("the scales hold numbers that are not finite")
        return wide, rows

    def dequantise(self, tensors: Mapping[str, torch.Tensor], parts: Sequence[int], in_features: int) -> torch.Tensor:
        values = e2m1_values(unpack_nibbles(tensors[self.weight_name]))
        scales, rows = self.scales_and_factors(tensors, parts)
        wide = values * spread(scales, self.group, in_features)
        return wide if rows is None else wide * rows.unsqueeze(1)

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

    def row_scales(self, tensors: Mapping[str, torch.Tensor], parts: Sequence[int]) -> torch.Tensor:
        """Factors of each group: float32 [N, groups]."""
        scale = tensors["weight_scale"]
        if self.format.kind == "mx":
            wide = e8m0_values(scale)
        else:
            of_part = tensors[self.global_name]
            of_part = of_part if self.format.layout == "modelopt" else 1.0 / of_part
            rows = of_part.repeat_interleave(torch.tensor(parts, device=scale.device))
            wide = scale.float() * rows.unsqueeze(1)
        if not bool(torch.isfinite(wide).all()):
            raise ValueError("the scales hold numbers that are not finite")
        return wide

    def dequantise(self, tensors: Mapping[str, torch.Tensor], parts: Sequence[int], in_features: int) -> torch.Tensor:
        values = e2m1_values(unpack_nibbles(tensors[self.weight_name]))
        return values * spread(self.row_scales(tensors, parts), self.group, in_features)

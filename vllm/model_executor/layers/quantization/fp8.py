"""8-bit floats (e4m3), with a factor a tensor, an output feature, or a block of 128 × 128 weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vllm.model_executor.layers.quantization.base import Scheme
from vllm.model_executor.layers.quantization.stored import ALL, IN, OUT, Axis, Stored
from vllm.ops.quantization import spread
from vllm.transformers_utils.quantization_config import Fp8Format

BLOCK = 128
_WEIGHT = Stored((OUT, IN), torch.float8_e4m3fn)
_SCALES = {
    "tensor": (),
    "channel": (OUT, Axis("in", ALL)),
    "block": (Axis("out", BLOCK, whole=False), Axis("in", BLOCK, whole=False)),
}


class Fp8(Scheme):
    """`weight · scale`, the factors in float32.

    A static factor of the inputs is not used: they are quantised by what they are, each token for itself.
    """

    def __init__(self, format: Fp8Format) -> None:
        self.format = format
        self.scale_name = format.scale_name
        self.stored = {"weight": _WEIGHT, format.scale_name: Stored(_SCALES[format.scales], torch.float32)}
        if format.static:
            self.stored["input_scale"] = Stored((), torch.float32, optional=True, read=False)

    def row_scales(self, tensors: Mapping[str, torch.Tensor], parts: Sequence[int], in_features: int) -> torch.Tensor:
        """Factors of each row: float32 [N, 1], or [N, blocks of input features]."""
        scale = tensors[self.scale_name]
        if not bool(torch.isfinite(scale).all()):
            raise ValueError(f"{self.scale_name} holds numbers that are not finite")
        if self.format.scales == "channel":
            return scale
        if self.format.scales == "tensor":
            return scale.repeat_interleave(torch.tensor(parts, device=scale.device)).unsqueeze(1)
        blocks = [-(-part // BLOCK) for part in parts]
        rows = [s.repeat_interleave(BLOCK, 0)[:part] for s, part in zip(scale.split(blocks), parts, strict=True)]
        return torch.cat(rows)

    def dequantise(self, tensors: Mapping[str, torch.Tensor], parts: Sequence[int], in_features: int) -> torch.Tensor:
        scales = self.row_scales(tensors, parts, in_features)
        return tensors["weight"].float() * spread(scales, BLOCK, in_features)

"""4-bit integers with a scale a group of input features, as AWQ, GPTQ and compressed-tensors pack them.

All are `(q - zero) · scale`. What differs is which way eight of them lie in an int32:

    AWQ                 qweight [K, N/8] along N in the order 0 2 4 6 1 3 5 7, qzeros [groups, N/8] alike
    GPTQ                qweight [K/8, N] along K, qzeros [groups, N/8] along N, less 1 in the first format; g_idx [K]
    compressed-tensors  weight_packed [N, K/8] along K, weight_zero_point [N/8, groups] along N; weight_g_idx [K]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from vllm.model_executor.layers.quantization.base import Scheme
from vllm.model_executor.layers.quantization.stored import ALL, IN, OUT, Axis, Stored
from vllm.ops.cpu.kernels import BLOCK, TILE, BlockRows, pack_int4_groups
from vllm.ops.quantization import spread, unpack_int4
from vllm.transformers_utils.quantization_config import Int4Format

_INT32 = torch.int32
# Code j of a word lies in bits 4 · _AWQ_ORDER[j].
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_SYMMETRIC_ZERO = 8


class Int4Codes(NamedTuple):
    """A matrix [N, K] in a form that all layouts share.

    Attributes:
        codes: 0 … 15; uint8 [N, K].
        scales, zeros: float32 [N, groups].
        order: Column j of `codes` is input feature `order[j]`; None: j.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    order: torch.Tensor | None


class Int4(Scheme):
    """See the table above.

    Attributes:
        group: Input features of a group; 0: all.
    """

    def __init__(self, format: Int4Format) -> None:
        self.format = format
        self.group = format.group
        by_8, groups = Axis("out", 8), Axis("in", format.group or ALL)
        if format.layout == "compressed-tensors":
            self._names = "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"
            self.stored = {
                "weight_packed": Stored((OUT, Axis("in", 8)), _INT32),
                "weight_scale": Stored((OUT, groups), torch.float32),
                "weight_shape": Stored((), optional=True, read=False),
            }
            zeros = Stored((by_8, groups), _INT32)
        else:
            self._names = "qweight", "scales", "qzeros", "g_idx"
            packed = (IN, by_8) if format.layout == "awq" else (Axis("in", 8), OUT)
            self.stored = {"qweight": Stored(packed, _INT32), "scales": Stored((groups, OUT), torch.float32)}
            zeros = Stored((groups, by_8), _INT32)
        if not format.symmetric:
            self.stored[self._names[2]] = zeros
        if format.layout == "gptq" or format.act_order:
            self.stored[self._names[3]] = Stored((IN,), _INT32, optional=not format.act_order)

    def codes(self, tensors: Mapping[str, torch.Tensor], in_features: int) -> Int4Codes:
        """Takes the packed tensors apart.

        Raises:
            ValueError: scales that are not finite, or groups that are of no order of the input features.
        """
        weight, scales, zeros = (tensors.get(name) for name in self._names[:3])
        assert weight is not None and scales is not None
        if not bool(torch.isfinite(scales).all()):
            raise ValueError(f"{self._names[1]} holds numbers that are not finite")
        layout = self.format.layout
        if layout == "compressed-tensors":
            codes = unpack_int4(weight, 1)
            unpacked = None if zeros is None else unpack_int4(zeros, 0)
        else:
            order = _AWQ_ORDER if layout == "awq" else range(8)
            codes = (unpack_int4(weight, 1, order) if layout == "awq" else unpack_int4(weight, 0)).T
            scales = scales.T
            unpacked = None if zeros is None else unpack_int4(zeros, 1, order).T
        offset = 1.0 if self.format.zeros_less_one else 0.0
        wide = torch.full_like(scales, _SYMMETRIC_ZERO) if unpacked is None else unpacked.float() + offset
        permutation = self._order(tensors.get(self._names[3]), in_features)
        if permutation is not None:
            codes = codes[:, permutation]
        return Int4Codes(codes.contiguous(), scales.contiguous(), wide.contiguous(), permutation)

    def _order(self, groups: torch.Tensor | None, in_features: int) -> torch.Tensor | None:
        """The input features by their groups; None where that is their own order.

        Args:
            groups: Group of each, for each part: int32 [parts, K].
        """
        if groups is None or not self.group:
            return None
        if not bool((groups == groups[0]).all()):
            raise ValueError(f"the parts of a merged layer have different {self._names[3]}")
        # A rank's share of the input features need not begin with the first group.
        groups = groups - groups[0].min()
        by_group, order = torch.sort(groups[0], stable=True)
        plain = torch.arange(in_features, device=groups.device) // self.group
        if not torch.equal(by_group, plain.to(by_group.dtype)):
            raise ValueError(
                f"{self._names[3]} does not name {self.group} input features of each group; activation order cannot be "
                "split over tensor-parallel ranks"
            )
        return None if torch.equal(groups[0], plain.to(by_group.dtype)) else order

    def blocks(
        self, tensors: Mapping[str, torch.Tensor], parts: Sequence[int], in_features: int
    ) -> list[BlockRows] | None:
        group = self.group or in_features
        if self.format.act_order or group % BLOCK or in_features % group or any(part % TILE for part in parts):
            return None
        codes, scales, zeros, order = self.codes(tensors, in_features)
        if order is not None:
            return None
        return [
            pack_int4_groups(*rows)
            for rows in zip(*(t.split(list(parts)) for t in (codes, scales, zeros)), strict=True)
        ]

    def dequantise(self, tensors: Mapping[str, torch.Tensor], parts: Sequence[int], in_features: int) -> torch.Tensor:
        codes, scales, zeros, order = self.codes(tensors, in_features)
        group = self.group or in_features
        wide = (codes.float() - spread(zeros, group, in_features)) * spread(scales, group, in_features)
        return wide if order is None else wide[:, torch.argsort(order)]

"""What one layer of a network keeps between steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """What lies in one slot of a tensor: [num_heads, dim]."""

    num_heads: int
    dim: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.num_heads * self.dim * self.dtype.itemsize


@dataclass(frozen=True)
class PagedKV:
    """A slot of keys and one of values for each token, in blocks; this rank's share of the heads.

    Attributes:
        window: W, where a token is read by itself and the W - 1 behind it only.
    """

    k: Row
    v: Row
    window: int | None = None

    @property
    def slot_bytes(self) -> int:
        return self.k.num_bytes + self.v.num_bytes


LayerCache = PagedKV
"""What a layer may keep; a network says it of every layer, from the first to the last."""

"""What a layer asks of attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of one layer, this rank's share of its heads. Layers with equal specs share the plan of a batch.

    Attributes:
        num_heads, num_kv_heads: Query heads, and the KV heads that equal shares of them read.
        head_dim: Size of queries and keys.
        v_dim: Size of values, and of the output of a head.
        scale: Factor of the scores.
        dtype: Of q, K and V.
        window: A query at position p reads keys p - window < key ≤ p; None: all keys ≤ p.
        softcap: Scores s become `softcap · tanh(s / softcap)`, after `scale`; None: they stay as they are.
        sinks: A learned logit of each query head joins the softmax, with a value of zero.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_dim: int
    scale: float
    dtype: torch.dtype
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def beyond_plain(self) -> str | None:
        """What it asks for besides causal attention over heads of one size, in words; None for nothing."""
        if self.window is not None:
            return f"a window of {self.window} tokens"
        if self.softcap is not None:
            return f"scores capped at {self.softcap:g}"
        if self.sinks:
            return "attention sinks"
        if self.v_dim != self.head_dim:
            return f"values of {self.v_dim} beside keys of {self.head_dim}"
        return None

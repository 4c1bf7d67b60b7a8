"""What a batch's attention reads and writes, the same for every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PrefixGroup:
    """Neighbouring query tokens that all read one extent.

    Attributes:
        first_token, num_tokens: The query tokens, as a range of the batch's tokens.
        first_slot, length: The K/V slots they read, all of them. A token that reads a chain of extents is in several
            groups.
        position: Of the token in the first slot.
    """

    first_token: int
    num_tokens: int
    first_slot: int
    length: int
    position: int = 0


@dataclass(frozen=True)
class AttentionMetadata:
    """A batch of B sequences with T query tokens in all, sequence by sequence.

    Attributes:
        slot_mapping: Slot into which each query token's K and V are written; int64 [T].
        block_tables: Own blocks of each sequence; int64 [B, W], W ≥ the most blocks any of them uses.
        query_lens: Query tokens of each sequence.
        context_lens: Own tokens of each sequence, its query tokens included (the pinned prefix not).
        groups: Reads of pinned extents.
        block_size: Slots in a block.
        contiguous_from: Where all that the only sequence reads, extents and own tokens, lies in consecutive slots: the
            first of them.
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    query_lens: list[int]
    context_lens: list[int]
    groups: list[PrefixGroup]
    block_size: int
    contiguous_from: int | None = None

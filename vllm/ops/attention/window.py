"""What a window leaves of a batch to plan for: a query at position p sees the keys p - window < key ≤ p.

Which keys of an extent a token sees depends on its position, so the kernel over extents reads the first position that
each token sees from a list. Over own blocks it needs none: there the window ends at the query itself.
"""

from __future__ import annotations

import numpy as np


def first_positions(sequences: np.ndarray, groups: np.ndarray, num_tokens: int, window: int) -> np.ndarray:
    """The first position that each query token sees, 0 or less where it sees all before it.

    Args:
        sequences: (first query token, query tokens, own tokens with the query tokens, …) of each; int [B, ≥ 3].
        groups: See `group_array`. A sequence's own tokens begin where the last of its extents ends.
        num_tokens: Tokens of the batch; those of no sequence get 0.

    Returns int32 [num_tokens].
    """
    position = np.full(num_tokens, window - 1, np.int64)
    first, tokens, context = sequences[:, 0], sequences[:, 1], sequences[:, 2]
    own = members(first, tokens)
    position[own] = own + np.repeat(context - tokens - first, tokens)
    before = np.zeros(num_tokens, np.int64)
    np.maximum.at(before, members(groups[:, 0], groups[:, 1]), np.repeat(groups[:, 4] + groups[:, 3], groups[:, 1]))
    return (position + before - (window - 1)).astype(np.int32)


def within_window(groups: np.ndarray, first_seen: np.ndarray, tokens_of_tile: int, block_n: int) -> np.ndarray:
    """The groups as far as their tokens see them: a group for each tile of tokens, with whole steps of `block_n` keys
    from the end of the extent on; groups of which no token sees anything are left out.

    Args:
        groups: See `group_array`.
        first_seen: From `first_positions`.
    """
    if not len(groups):
        return groups
    first, tokens, slot, length, position = groups.T
    num_tiles = -(-tokens // tokens_of_tile)
    per_tile = -(-tokens // num_tiles)
    num_tiles = -(-tokens // per_tile)
    of = np.repeat(np.arange(len(groups)), num_tiles)
    start = (np.arange(len(of)) - (num_tiles.cumsum() - num_tiles)[of]) * per_tile[of]
    tokens = np.minimum(tokens[of] - start, per_tile[of])
    first, slot, length, position = first[of] + start, slot[of], length[of], position[of]
    lowest = np.minimum.reduceat(first_seen[members(first, tokens)], tokens.cumsum() - tokens)
    steps = -(-(position + length - lowest) // block_n)
    kept = np.minimum(length, steps * block_n)
    skipped = length - kept
    return np.stack((first, tokens, slot + skipped, kept, position + skipped), axis=1)[kept > 0]


def cut_where_parts_change(sequences: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sequences cut so that all query tokens of a piece have equally many parts: the first ones of a prompt may see
    what others do not.

    Args:
        sequences: (first query token, query tokens, own tokens with the query tokens, row of the block tables), the
            first tokens rising; int [B, 4].
        counts: Parts of each token; int [T].
    """
    sequences = sequences[sequences[:, 1] > 0]
    changes = np.flatnonzero(counts[1:] != counts[:-1]) + 1
    if not len(changes) or not len(sequences):
        return sequences
    first, tokens, context, row = sequences.T
    of = np.searchsorted(first, changes, side="right") - 1
    inside = (of >= 0) & (changes > first[of]) & (changes < (first + tokens)[of])
    starts = np.sort(np.concatenate((first, changes[inside])))
    of = np.searchsorted(first, starts, side="right") - 1
    ends = np.minimum(np.append(starts[1:], len(counts)), (first + tokens)[of])
    return np.stack((starts, ends - starts, (context - tokens - first)[of] + ends, row[of]), axis=1)


def members(first: np.ndarray, size: np.ndarray) -> np.ndarray:
    """All tokens of the ranges, range by range."""
    return np.repeat(first - (size.cumsum() - size), size) + np.arange(size.sum())

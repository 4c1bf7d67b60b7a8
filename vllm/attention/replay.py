"""Attention of steps that are replayed as graphs: its work lists, at fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm.attention.backends.triton import SMALL_ROWS, Launch, PreparedBatch, TritonAttention, TritonAttentionBackend
from vllm.attention.spec import AttentionSpec
from vllm.ops.attention.metadata import PrefixGroup
from vllm.ops.attention.prefix import PREFIX_FIELDS, group_array
from vllm.ops.attention.suffix import SUFFIX_FIELDS, keep_from_merge
from vllm.ops.attention.tiles import TileConfig
from vllm.ops.staging import reserve

# Plans of pinned reads that are kept for steps with the same ones.
_KEPT_PLANS = 32


class ReplayBuffers:
    """Fixed device memory of steps that are replayed: up to `max_tokens` query tokens, of which padding is a part.

    A graph captured over `prepared(...)` is replayed after `fill(...)`, whatever groups and lengths come. All sizes
    share the same memory, so only one of them is filled at a time. There are two kinds: decode steps, of one token a
    sequence, and mixed steps, of sequences with any number of tokens.

    Args:
        attention: Whose `forward` is captured.
        max_tokens: Most query tokens of a step, padding included.
        block_tables: All rows of the KV cache's block tables; int32 or int64 [rows, W].
        block_size: Slots in a block.
        beside: Buffers of other layers with heads of the same shape; they share the memory of partial results, which
            are used up before another layer begins.

    Attributes:
        inputs: What `fill` was given of each query token; int64 [3, max_tokens].
    """

    # Extents that a sequence may read one after the other; system prompts nest no deeper, in no more pieces.
    max_chain = 8

    def __init__(
        self,
        attention: TritonAttention,
        max_tokens: int,
        block_tables: torch.Tensor,
        block_size: int,
        beside: ReplayBuffers | None = None,
    ) -> None:
        self.attention = attention
        self.max_tokens = max_tokens
        self._block_tables = block_tables
        self._block_size = block_size
        # A tile for every link of every chain, and as many more as all programs take in a few rounds.
        extra = 16 * attention.num_sms
        self._max_prefix_work = max_tokens * self.max_chain + extra
        self._max_suffix_work = max_tokens + extra
        suffix = self._max_suffix_work * SUFFIX_FIELDS
        # Three int64 of each token take six places. The fourth list is `first_seen`.
        windowed = 0 if attention.window is None else max_tokens
        prefix = self._max_prefix_work * PREFIX_FIELDS
        self._ends = np.cumsum((6 * max_tokens, 3, max_tokens, windowed, prefix, suffix, suffix)).tolist()
        self._plans: dict[tuple[int, bytes], tuple[np.ndarray, np.ndarray]] = {}
        self._flat = torch.zeros(self._ends[-1], dtype=torch.int32, device=attention.device)
        self.inputs = self._flat[: self._ends[0]].view(torch.int64).view(3, max_tokens)
        if beside is None:
            most = max(self.max_partials(n) * n for n in range(1, max_tokens + 1))
            self._partial, self._lse = attention.workspace(1, most)
        else:
            self._partial, self._lse = beside._partial, beside._lse

    def max_partials(self, tokens: int) -> int:
        """Parts that a token of a step of this size may have: few tokens need many to fill the device."""
        return min(64, max(self.max_chain + 2, 3072 // tokens))

    def splits_alike(self, batch: int) -> bool:
        """Whether decode batches of this size without prefixes are replayed with their rows split: few sequences do
        not fill the device otherwise. Larger ones of like lengths are not split, and then need no merge."""
        return 2 * batch * self.attention.num_kv_heads < self.attention.programs(self.attention.suffix_tiles(1))

    def prepared(self, tokens: int, *, decode: bool, plain: bool) -> PreparedBatch:
        """What `forward` launches for a step of this size, always the same.

        Args:
            plain: For steps that `fill` reports as plain: no prefix, and no merge unless `splits_alike(tokens)`.
        """
        attention, parts, e = self.attention, self.max_partials(tokens), self._ends
        direct = plain and not self.splits_alike(tokens)
        tiles = attention.prefix_tiles(tokens)
        num_work = self._flat[e[0] : e[1]]
        prefix = Launch(self._flat[e[3] : e[4]].view(-1, PREFIX_FIELDS), num_work[:1], tiles, attention.programs(tiles))
        suffixes = []
        for i, tiles in enumerate(self._suffix_tiles(tokens, decode)):
            work = self._flat[e[4 + i] : e[5 + i]].view(-1, SUFFIX_FIELDS)
            suffixes.append(Launch(work, num_work[1 + i : 2 + i], tiles, attention.programs(tiles)))
        shape = (parts, tokens, attention.num_heads)
        partial = self._partial.view(-1)[: parts * tokens * attention.num_heads * attention.head_dim]
        return PreparedBatch(
            prefix=None if plain else prefix,
            suffixes=tuple(suffixes),
            counts=self._flat[e[1] : e[1] + tokens],
            partial=None if direct else partial.view(*shape, attention.head_dim),
            lse=None if direct else self._lse.view(-1)[: parts * tokens * attention.num_heads].view(shape),
            block_tables=self._block_tables,
            block_size=self._block_size,
            first_seen=None if attention.window is None else self._flat[e[2] : e[2] + tokens],
        )

    def _suffix_tiles(self, tokens: int, decode: bool) -> list[TileConfig]:
        """Tiles of the sequences with few query rows; in a mixed step, then of the others."""
        small = self.attention.suffix_tiles(1)
        return [small] if decode else [small, self.attention.suffix_tiles(tokens)]

    def _plan_groups(
        self, groups: np.ndarray, tokens: int, tiles: TileConfig, parts: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """As of the attention. From one decode step to the next groups are mostly the same, so plans are kept."""
        key = (tokens, groups.tobytes())
        found = self._plans.pop(key, None)
        if found is None:
            found = self.attention.plan_groups(groups, tokens, tiles, parts, self._max_prefix_work)
            if len(self._plans) >= _KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
        self._plans[key] = found
        work, counts = found
        return work, counts.copy()

    def fill(
        self, inputs: np.ndarray, sequences: np.ndarray, groups: list[PrefixGroup], *, decode: bool, plain: bool = True
    ) -> bool:
        """Plans a step and sends the plan to the device, with what else the step reads, in one copy on the current
        stream.

        Args:
            inputs: Three numbers of each query token, for whoever captures; int64 [3, size that is replayed]. What is
                beyond the sequences' query tokens is padding, whose attention is 0 (undefined in a plain step without
                merge).
            sequences: (first query token, query tokens, own tokens with the query tokens, row of the block tables) of
                each sequence; int [n, 4].
            groups: Reads of pinned extents.
            plain: Let the step be replayed as a plain one if it is one.

        Returns whether `prepared(tokens, plain=True)` may be replayed: no prefix, and every sequence has one part where
        such steps are not merged.

        Raises:
            ValueError: a chain of extents is longer than `max_chain`.
        """
        tokens = inputs.shape[1]
        attention, e, parts = self.attention, self._ends, self.max_partials(tokens)
        prefix_tiles = attention.prefix_tiles(tokens)
        seen_groups, first_seen = attention.in_sight(sequences, group_array(groups), tokens, prefix_tiles)
        prefix_work, counts = self._plan_groups(seen_groups, tokens, prefix_tiles, parts - parts // 4)
        tiles = self._suffix_tiles(tokens, decode)
        context_lens = sequences[:, 2] if attention.window is None else np.minimum(sequences[:, 2], attention.window)
        plain = plain and decode and not len(prefix_work) and len(sequences) > 0
        direct = plain and not self.splits_alike(tokens)
        if direct and (
            self.splits_alike(len(sequences)) or len(sequences) * int(context_lens.max()) > 2 * int(context_lens.sum())
        ):
            plain = direct = False
        if decode:
            picked = [sequences]
        else:
            small = sequences[:, 1] * attention.group_size <= SMALL_ROWS
            picked = [sequences[small], sequences[~small]]
        suffix_work = [
            attention.plan_sequences(some, counts, shape, 1 if direct else parts, self._max_suffix_work)
            for some, shape in zip(picked, tiles, strict=True)
        ]
        if not direct:
            keep_from_merge(suffix_work, counts)
        used = e[3] + prefix_work.size
        for i, work in enumerate(suffix_work):
            if len(work):
                used = e[4 + i] + work.size
        # What lies between the lists is sent as it is; nobody reads it.
        flat, staged = reserve(used, np.int32, attention.device)
        flat[: e[0]].view(np.int64).reshape(3, -1)[:, :tokens] = inputs
        flat[e[0]] = len(prefix_work)
        flat[e[1] : e[1] + tokens] = counts
        if first_seen is not None:
            flat[e[2] : e[2] + tokens] = first_seen
        flat[e[3] : e[3] + prefix_work.size] = prefix_work.ravel()
        for i, work in enumerate(suffix_work):
            flat[e[0] + 1 + i] = len(work)
            flat[e[4 + i] : e[4 + i] + work.size] = work.ravel()
        self._flat[:used].copy_(staged, non_blocking=True)
        return plain


class ReplayPlans:
    """The plans of all layers of a network, for steps that are replayed: `ReplayBuffers` for each kind of plan.

    Args:
        backend: Serves the layers.
        specs: The network's different ones, in order.
        max_tokens, block_tables, block_size: As of `ReplayBuffers`.
        window_tables: Block tables of the window group, which layers with a window read; None where there is none.

    Attributes:
        inputs: What `fill` was given of each query token; int64 [3, max_tokens].
    """

    def __init__(
        self,
        backend: TritonAttentionBackend,
        specs: Sequence[AttentionSpec],
        max_tokens: int,
        block_tables: torch.Tensor,
        block_size: int,
        window_tables: torch.Tensor | None = None,
    ) -> None:
        self._of_specs = [backend.of(spec) for spec in specs]
        self._has_window_group = window_tables is not None
        self._buffers: dict[TritonAttention, ReplayBuffers] = {}
        of_shape: dict[tuple[int, int], ReplayBuffers] = {}
        for attention in dict.fromkeys(self._of_specs):
            shape = (attention.num_heads, attention.head_dim)
            tables = block_tables if attention.window is None or window_tables is None else window_tables
            buffers = ReplayBuffers(attention, max_tokens, tables, block_size, of_shape.get(shape))
            self._buffers[attention] = of_shape[shape] = buffers
        self.inputs = next(iter(self._buffers.values())).inputs

    def prepared(self, tokens: int, *, decode: bool, plain: bool) -> list[PreparedBatch]:
        """What `AttentionBackend.prepare` returns, for a step of this size; see `ReplayBuffers.prepared`."""
        plans = {a: buffers.prepared(tokens, decode=decode, plain=plain) for a, buffers in self._buffers.items()}
        return [plans[attention] for attention in self._of_specs]

    def fill(
        self,
        inputs: np.ndarray,
        sequences: np.ndarray,
        groups: list[PrefixGroup],
        window_groups: list[PrefixGroup] | None = None,
        *,
        decode: bool,
    ) -> bool:
        """Plans a step for every shape; see `ReplayBuffers.fill`. Returns whether it may be replayed as a plain one.

        Args:
            window_groups: Reads of extents of the window group, where there is one.
        """

        def fill(attention: TritonAttention, plain: bool) -> bool:
            within = self._has_window_group and attention.window is not None
            reads = (window_groups or []) if within else groups
            return self._buffers[attention].fill(inputs, sequences, reads, decode=decode, plain=plain)

        plain = {attention: fill(attention, True) for attention in self._buffers}
        if all(plain.values()):
            return True
        for attention, was_plain in plain.items():
            if was_plain:
                fill(attention, False)
        return False

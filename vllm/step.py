"""One step of the engine as data: the plan that the scheduler makes, and what the ranks send back.

Plain values, so that a plan can be printed, recorded and broadcast to every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from vllm.sampling_params import SamplingParams
from vllm.system_prompt_store.manifest import SnapshotRecord
from vllm.token_ids import ID_BYTES, TokenIds

PROMPT_ROWS = 64
"""Rows of the ranks' buffers for prefills of system prompts, behind those of requests: so many may be under way."""


@dataclass(frozen=True)
class PrefixExtent:
    """Pinned KV that a sequence reads: the first `num_tokens` slots from block `start_block` on."""

    start_block: int
    num_tokens: int


@dataclass(frozen=True)
class WindowExtent:
    """Pinned KV of the window group: the first `num_tokens` slots from block `start_block` on, of the tokens from
    `position` on. What lies further behind than a token's window is there because blocks are whole."""

    start_block: int
    num_tokens: int
    position: int


@dataclass(frozen=True)
class SequenceStart:
    """A sequence that begins (or begins again) to run, in a row of the ranks' buffers.

    Requests have the rows `0 … max_num_seqs - 1`, system prompts under computation the `PROMPT_ROWS` behind them.

    Attributes:
        token_ids: All tokens known so far, but for the first `num_skipped`, whose KV is pinned.
        block_table: Blocks of its own tokens in order: of a system prompt all that its extents have.
        prefix: The pinned extents it reads, in order of position; together they hold its first tokens. One of them may
            get its last tokens in the very step in which this sequence begins.
        window_table, window_prefix: The same in the window group; block 0 stands for blocks that have been given back.
        seed: 64-bit seed of its draws.
        stop_token_ids: Tokens that may not come before `min_tokens`.
        is_system_prompt: It is the prefill of a system prompt, which draws nothing.
    """

    row: int
    token_ids: TokenIds
    num_prompt_tokens: int
    block_table: list[int]
    prefix: tuple[PrefixExtent, ...]
    sampling_params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]
    num_skipped: int = 0
    is_system_prompt: bool = False
    window_table: list[int] = field(default_factory=list)
    window_prefix: tuple[WindowExtent, ...] = ()


@dataclass
class BlockOrders:
    """What becomes of the blocks of a cache group, in this order: moves, copies, cleared, new_blocks.

    Attributes:
        moves: Blocks that make room for an extent, (source, destination).
        copies: Blocks that a forked sequence needs a copy of, (source, destination); a source may be a destination
            of `moves`.
        cleared: Blocks whose slots become zero.
        new_blocks: (row, first column, block ids) to write into the block tables.
    """

    moves: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    cleared: list[int] = field(default_factory=list)
    new_blocks: list[tuple[int, int, list[int]]] = field(default_factory=list)

    @property
    def touches_blocks(self) -> bool:
        """Whether there is something to do besides the block tables."""
        return bool(self.moves or self.copies or self.cleared)


@dataclass(frozen=True)
class FreedSequence:
    """A sequence that no longer runs; what a system prompt has computed stays."""

    row: int
    is_system_prompt: bool


@dataclass(frozen=True)
class HostImage:
    """Memory on the host for a copy of an extent.

    Attributes:
        num_blocks: Blocks of the full group.
        start: Its first block in the host tier; None for memory of its own, which `StepPlan.dropped` ends.
        num_window_blocks: Blocks of the window group.
        num_extra: Blocks of the tier, as large as those of the full group, that hold the window group's.
    """

    prompt_id: str
    num_blocks: int
    start: int | None = None
    num_window_blocks: int = 0
    num_extra: int = 0

    @property
    def size(self) -> int:
        """Blocks of the tier that it takes."""
        return self.num_blocks + self.num_extra


@dataclass(frozen=True)
class ExtentCopy:
    """A part of a prompt's K/V, from its extents to its image on the host or back: as much as the blocks
    `first … first+count` of the tier take, in the order in which the image lies in memory (group by group, layer by
    layer).

    Attributes:
        extents: All of them, (first block, number of blocks) each; together as many blocks as the image has.
        window_extents: The same in the window group.
    """

    image: HostImage
    extents: tuple[tuple[int, int], ...]
    first: int
    count: int
    to_host: bool
    window_extents: tuple[tuple[int, int], ...] = ()


SnapshotOp = Literal["load", "save", "update", "delete"]


@dataclass(frozen=True)
class SnapshotJob:
    """Work on a snapshot in the background of the steps; its end is told by `StepResult.ended_jobs`.

    Attributes:
        image: Where K and V are loaded to or saved from; None for the other kinds.
    """

    op: SnapshotOp
    record: SnapshotRecord
    image: HostImage | None = None


@dataclass(frozen=True)
class EndedJob:
    """How a `SnapshotJob` ended: an outcome of `SnapshotOutcome`."""

    op: str
    prompt_id: str
    outcome: str


@dataclass
class StepPlan(BlockOrders):
    """What the ranks do in one step, in this order: moves, copies, cleared, freed, new_blocks, started, then the batch.

    Between tiers: dropped, transfers (they begin after all of that but the batch, and run beside it; done before
    anything of the next step begins), jobs.

    The batch is one entry a sequence, sequences that read the same extents side by side:
        rows, starts (first position to compute), counts (tokens to compute), samples (whether a token is drawn),
        wants_prompt_logprobs.
    Every layer writes K and V of all tokens of the batch before any of them attends, so that a sequence may read an
    extent whose last tokens are computed in the same batch: a request its system prompt, a prompt its parent. A
    system prompt's count is a multiple of the block size, but for its last one.

    Its own block orders are those of the full group.

    Attributes:
        window: Block orders of the window group.
        dropped: Images whose memory is given back.
        transfers: Copies between extents and the host.
        jobs: Work on snapshots to begin.
        job_patience_s: Asks which of that work has ended, waiting so long for the first of it; None does not ask.
        masked: Entries of the batch whose next token is constrained; which tokens may be drawn is told later.
    """

    window: BlockOrders = field(default_factory=BlockOrders)
    freed: list[FreedSequence] = field(default_factory=list)
    started: list[SequenceStart] = field(default_factory=list)
    dropped: list[HostImage] = field(default_factory=list)
    transfers: list[ExtentCopy] = field(default_factory=list)
    jobs: list[SnapshotJob] = field(default_factory=list)
    job_patience_s: float | None = None
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    wants_prompt_logprobs: list[bool] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        batch = self.rows or self.touches_blocks or self.window.touches_blocks or self.freed
        tiers = self.dropped or self.transfers or self.jobs or self.job_patience_s is not None
        return not (batch or tiers)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step."""
        return sum(self.counts)


@dataclass(frozen=True)
class PositionLogprobs:
    """Log-probabilities at P positions: W tokens at each, the chosen one first, then the most likely ones.

    They are kept as memory. A long prompt has some hundred thousand of them, and an object for each would hold up
    whoever sends or receives them for a tenth of a second.

    Attributes:
        width: W.
        token_ids: uint32 [P, W].
        logprobs: float64 [P, W], natural log.
        ranks: uint32 [P], 1-based, of the chosen tokens.
    """

    width: int
    token_ids: bytes
    logprobs: bytes
    ranks: bytes

    @classmethod
    def joined(cls, parts: Sequence[PositionLogprobs]) -> PositionLogprobs:
        """The positions of several parts, each of which has as many tokens at a position or no position at all."""
        return cls(
            next((part.width for part in parts if part), 1),
            b"".join(part.token_ids for part in parts),
            b"".join(part.logprobs for part in parts),
            b"".join(part.ranks for part in parts),
        )

    def __len__(self) -> int:
        return len(self.ranks) // ID_BYTES

    def chosen(self) -> list[float]:
        """Log-probability of the chosen token at each position."""
        return [float(value) for value in memoryview(self.logprobs).cast("d")[:: self.width]]


@dataclass
class StepResult:
    """What a step drew: entry i belongs to entry i of the plan's batch.

    Attributes:
        token_ids: The drawn token, or -1 where none was asked for.
        logprobs: At the drawn token, where asked for.
        prompt_logprobs: At the prompt positions that the step computed, where asked for.
        ended_jobs: Work on snapshots that has ended on every rank.
    """

    token_ids: list[int]
    logprobs: list[PositionLogprobs | None]
    prompt_logprobs: list[PositionLogprobs | None]
    ended_jobs: list[EndedJob] = field(default_factory=list)

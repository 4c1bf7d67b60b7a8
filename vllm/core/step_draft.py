"""A step while it is being planned."""

from __future__ import annotations

from typing import NamedTuple

from vllm.core.pinned_prompt import PinnedPrompt
from vllm.core.stops import StopRules
from vllm.sequence import Sequence
from vllm.step import SequenceStart, StepPlan


class PlannedBatch(NamedTuple):
    """A plan in flight: its sequences, the first position that each one computed, and the system prompts whose last
    chunks it computes. Prefills of system prompts are among the sequences; nothing is drawn for them."""

    sequences: list[Sequence]
    starts: list[int]
    prefilled: list[PinnedPrompt]


class StepDraft:
    """A plan, and the batch that is written into it last.

    Args:
        stops: Says which tokens sequences that begin may end with.
        share: Most tokens of one prompt.

    Attributes:
        plan: Orders for blocks and rows are written as they come up.
        prefilled: System prompts whose last chunks are in the batch.
    """

    def __init__(self, stops: StopRules, share: int) -> None:
        self.plan = StepPlan()
        self.share = share
        self.prefilled: list[PinnedPrompt] = []
        self._stops = stops
        self._scheduled: list[tuple[Sequence, int]] = []

    def start(self, seq: Sequence, skipped: int) -> None:
        """Tells the ranks of a sequence that begins to run, all but its first `skipped` tokens, whose KV is pinned."""
        prompt = seq.system_prompt
        if prompt is not None and not prompt.prefix:
            raise RuntimeError(f"{seq} reads system prompt {prompt.id}, which has no extent")
        self.plan.started.append(
            SequenceStart(
                row=seq.row,
                token_ids=seq.token_ids[skipped:],
                num_skipped=skipped,
                num_prompt_tokens=seq.num_prompt_tokens,
                block_table=list(seq.block_table),
                prefix=prompt.prefix if prompt is not None else (),
                window_table=window_blocks(seq),
                window_prefix=prompt.window_prefix if prompt is not None else (),
                sampling_params=seq.sampling_params,
                seed=seq.seed,
                stop_token_ids=self._stops.token_ids(seq),
                is_system_prompt=seq.is_system_prompt,
            )
        )

    def compute(self, seq: Sequence, count: int) -> None:
        """Puts the next `count` tokens of a sequence into the batch."""
        self._scheduled.append((seq, count))

    def fill_batch(self) -> int:
        """Writes the batch, sequences of one group side by side so that its extent is read once. Returns how many beams
        are drawn for."""
        plan, num_beams = self.plan, 0
        self._scheduled.sort(key=_order_key)
        for seq, count in self._scheduled:
            samples = seq.num_computed_tokens + count == seq.num_tokens and not seq.is_system_prompt
            plan.rows.append(seq.row)
            plan.starts.append(seq.num_computed_tokens)
            plan.counts.append(count)
            plan.samples.append(samples)
            if samples and seq.matcher is not None:
                plan.masked.append(len(plan.samples) - 1)
            plan.wants_prompt_logprobs.append(
                seq.sampling_params.prompt_logprobs is not None
                and seq.index == 0
                and seq.num_computed_tokens < seq.num_prompt_tokens
                and seq.num_output_tokens == 0
            )
            seq.num_computed_tokens += count
            if samples and seq.is_beam:
                seq.awaits_search = True
                num_beams += 1
            elif samples:
                seq.num_in_flight += 1
        return num_beams

    @property
    def batch(self) -> PlannedBatch:
        """What is remembered of it until its tokens are known."""
        return PlannedBatch([seq for seq, _ in self._scheduled], self.plan.starts, self.prefilled)


def window_blocks(seq: Sequence) -> list[int]:
    """Its window table as the ranks get it; they never read what a hole stands for."""
    return [max(0, block) for block in seq.window_table]


def _order_key(entry: tuple[Sequence, int]) -> tuple[int, ...]:
    """Brings those side by side that read the same extents."""
    prompt = entry[0].system_prompt
    return prompt.order_key if prompt is not None else ()

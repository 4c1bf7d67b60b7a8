"""What the pool keeps for the operator: prompts that ran unpinned, and those that differ in a short span only."""

from __future__ import annotations

from collections import OrderedDict

from vllm.core.pinned_prompt import Outcome
from vllm.core.prompt_index import EVERYBODY
from vllm.core.varying_prompts import VaryingPrompts
from vllm.core.wants import Want
from vllm.logger import init_logger
from vllm.outputs import RefusedPromptInfo, VaryingSpanInfo
from vllm.sequence import Sequence
from vllm.token_ids import TokenIds

logger = init_logger(__name__)

_MAX_REFUSED = 1024
# Under churn most requests may bring a prompt that finds no room.
_SECONDS_BETWEEN_LINES = 1.0


class PoolLog:
    """Bounded, the latest.

    Attributes:
        new_spans: Places where prompts vary that have not been told yet; whoever tells them empties it.
    """

    def __init__(self) -> None:
        self._refused: OrderedDict[str, RefusedPromptInfo] = OrderedDict()
        self._last_line = float("-inf")
        self._num_unsaid = 0
        self._varying = VaryingPrompts()
        self.new_spans: list[VaryingSpanInfo] = []

    @property
    def refused(self) -> list[RefusedPromptInfo]:
        return list(self._refused.values())

    @property
    def varying(self) -> list[VaryingSpanInfo]:
        return self._varying.spans

    def note_refusal(
        self, key: str, token_ids: TokenIds, want: Want, outcome: Outcome, seq: Sequence, now: float
    ) -> None:
        """A prompt runs unpinned."""
        self._watch_variation(key, token_ids, want)
        info = self._refused.pop(key, None)
        if info is None or info.outcome != outcome.value:
            self._say(key, outcome, seq, now)
            info = RefusedPromptInfo(key, len(token_ids), outcome.value, 0, 0.0)
        info.requests += 1
        info.last_seen = now
        self._refused[key] = info
        if len(self._refused) > _MAX_REFUSED:
            self._refused.popitem(last=False)

    def _say(self, key: str, outcome: Outcome, seq: Sequence, now: float) -> None:
        """A line for the first prompt of a second, with the number of those left out before; all are listed."""
        if 0 <= now - self._last_line < _SECONDS_BETWEEN_LINES:
            self._num_unsaid += 1
            return
        more = f" {self._num_unsaid} others before." if self._num_unsaid else ""
        logger.info("System prompt %s runs unpinned: %s (request %s).%s", key, outcome.value, seq.request_id, more)
        self._last_line, self._num_unsaid = now, 0

    def note_prompt(self, key: str, token_ids: TokenIds, want: Want) -> None:
        """A prompt comes into the pool."""
        self._watch_variation(key, token_ids, want)
        self._refused.pop(key, None)

    def _watch_variation(self, key: str, token_ids: TokenIds, want: Want) -> None:
        # What clients keep for themselves is nobody else's business, and no advice to the operator.
        if want.source == "auto" and want.scope == EVERYBODY:
            span = self._varying.see(key, token_ids)
            if span is not None:
                self.new_spans.append(span)

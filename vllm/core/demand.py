"""How often each system prompt is asked for: the pool's memory of prompts that it does not hold, and its clock.

Requests that may come with a system prompt are counted; their number is the time that `pin_policy.worth` measures in.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from vllm.core.pin_policy import USES_OF_A_PIN, worth
from vllm.core.pinned_prompt import PinClass, PinnedPrompt, prompt_id
from vllm.core.wants import Want
from vllm.token_ids import TokenIds

_MAX_SIGHTINGS = 65_536


class Sighting(NamedTuple):
    """How often a prompt that is not in the pool was asked for, and by which requests."""

    uses: int
    first_use: int
    last_use: int


class Demand:
    """Counts requests, and remembers who asked for prompts that are not in the pool; the latest `_MAX_SIGHTINGS`.

    Attributes:
        num_requests: Requests counted so far, and so the number of the latest one.
    """

    def __init__(self) -> None:
        self.num_requests = 0
        self._seen: OrderedDict[str, Sighting] = OrderedDict()

    def count_request(self) -> None:
        self.num_requests += 1

    def is_reused(self, token_ids: TokenIds, want: Want) -> bool:
        """Whether a prompt that is not in the pool is pinned at once instead of put on probation."""
        if want.reused or want.pin == PinClass.HARD:
            return True
        sighting = self._seen.get(prompt_id(token_ids, want.scope))
        return sighting is not None and sighting.uses + 1 >= USES_OF_A_PIN

    def worth_of_newcomer(self, key: str) -> float:
        """Worth of a prompt that is not in the pool and that the latest request asks for."""
        now = self.num_requests
        sighting = self._seen.get(key)
        if sighting is None:
            return worth(1, now, now, now)
        return worth(sighting.uses + 1, sighting.first_use, now, now)

    def worth_of(self, prompt: PinnedPrompt) -> float:
        """Worth of a prompt of the pool; one that no request has used yet counts as used by every request."""
        if not prompt.uses:
            return 1.0
        return worth(prompt.uses, prompt.first_use, prompt.last_use, self.num_requests)

    def note(self, key: str) -> None:
        """Records that the latest request asks for a prompt that does not come into the pool."""
        earlier = self._seen.get(key)
        first = earlier.first_use if earlier else self.num_requests
        self._keep(key, Sighting(earlier.uses + 1 if earlier else 1, first, self.num_requests))

    def hand_over(self, prompt: PinnedPrompt, is_use: bool) -> None:
        """Gives a prompt that enters the pool the uses that were recorded for it.

        Args:
            is_use: The latest request uses it, too.
        """
        sighting = self._seen.pop(prompt.id, None)
        if sighting is not None:
            prompt.uses, prompt.first_use, prompt.last_use = sighting
        if is_use:
            prompt.uses, prompt.last_use = prompt.uses + 1, self.num_requests
            prompt.first_use = prompt.first_use or self.num_requests

    def take_back(self, prompt: PinnedPrompt) -> None:
        """Records the uses of a prompt that leaves the pool. A removed one starts anew when it is asked for again."""
        if prompt.uses and not prompt.doomed:
            self._keep(prompt.id, Sighting(prompt.uses, prompt.first_use, prompt.last_use))

    def _keep(self, key: str, sighting: Sighting) -> None:
        self._seen.pop(key, None)
        self._seen[key] = sighting
        if len(self._seen) > _MAX_SIGHTINGS:
            self._seen.popitem(last=False)

    def check_integrity(self) -> None:
        """Raises AssertionError when a record names requests that have not come yet."""
        assert len(self._seen) <= _MAX_SIGHTINGS, len(self._seen)
        for key, sighting in self._seen.items():
            assert 0 <= sighting.first_use <= sighting.last_use <= self.num_requests, (key, sighting)

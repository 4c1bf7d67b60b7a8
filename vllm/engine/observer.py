"""What happens to requests, as metrics see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vllm.outputs import RequestMetrics
from vllm.sampling_params import SamplingParams


class ObservedOutput(Protocol):
    """What observers see of an output."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def finish_reason(self) -> str | None: ...


class ObservedRequest(Protocol):
    """What observers see of a request."""

    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    num_cached_tokens: int

    @property
    def outputs(self) -> Sequence[ObservedOutput]: ...


class RequestObserver:
    """What happens to requests, for metrics; the base class ignores it all. Times are seconds of `time.time()`."""

    def on_first_token(self, request: ObservedRequest, now: float) -> None:
        """A request got its first token; the prompt is computed."""

    def on_token(self, now: float, previous: float | None) -> None:
        """An output got a token at `now`; the one before it came at `previous` (None: it is the first)."""

    def on_tokens(self, count: int) -> None:
        """Outputs got so many tokens, which nobody saw come one by one."""

    def on_finish(self, request: ObservedRequest, now: float) -> None:
        """All outputs of a request ended, or it was cut off (their reason is then `abort` or `error`)."""

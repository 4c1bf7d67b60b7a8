"""Where the news of one request wait for whoever serves it."""

from __future__ import annotations

import asyncio

from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind


class Mailbox:
    """News of one request, handed over once the reader has time: what comes before that is joined to one item.

    With hundreds of streams, a GPU draws tokens faster than one event loop can send them one by one; streams then get
    several tokens at once instead of falling behind.

    Args:
        kind: Of the request's outputs: deltas are joined, of the others the latest says it all.
    """

    def __init__(self, kind: RequestOutputKind) -> None:
        self._joins = kind == RequestOutputKind.DELTA
        self._news: RequestOutput | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, news: RequestOutput | Exception) -> None:
        """Takes in news; an error is handed over after what came before it."""
        if isinstance(news, Exception):
            self._error = news
        elif self._news is not None and self._joins:
            join_deltas(self._news, news)
        else:
            self._news = news
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> RequestOutput:
        """Waits for news, on behalf of the one reader. Raises the error that ended the request."""
        while True:
            news, self._news = self._news, None
            if news is not None:
                return news
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter


def join_deltas(first: RequestOutput, later: RequestOutput) -> None:
    """Appends the later deltas of a request to the first ones."""
    for delta in later.outputs:
        known = next((out for out in first.outputs if out.index == delta.index), None)
        if known is None:
            first.outputs.append(delta)
        else:
            _join(known, delta)
    first.finished = later.finished
    first.metrics = later.metrics
    first.num_cached_tokens = later.num_cached_tokens
    first.num_cache_write_tokens = later.num_cache_write_tokens
    first.prompt_logprobs = later.prompt_logprobs


def _join(first: CompletionOutput, later: CompletionOutput) -> None:
    first.text += later.text
    first.token_ids = [*first.token_ids, *later.token_ids]
    if first.logprobs is not None and later.logprobs is not None:
        first.logprobs = [*first.logprobs, *later.logprobs]
    first.cumulative_logprob = later.cumulative_logprob
    first.finish_reason, first.stop_reason = later.finish_reason, later.stop_reason

"""Where the news of one request wait for whoever serves it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import chain

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
        self._joined: JoinedDeltas | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, news: RequestOutput | Exception) -> None:
        """Takes in news; an error is handed over after what came before it."""
        if isinstance(news, Exception):
            self._error = news
        elif self._news is not None and self._joins:
            if self._joined is None:
                self._joined = JoinedDeltas(self._news)
            self._joined.add(news)
        else:
            self._news = news
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> RequestOutput:
        """Waits for news, on behalf of the one reader. Raises the error that ended the request."""
        while True:
            news, self._news = self._news, None
            joined, self._joined = self._joined, None
            if news is not None:
                return news if joined is None else joined.output()
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter


class JoinedDeltas:
    """Deltas of one request as one: each is copied when it comes and when all are taken, however many there are."""

    def __init__(self, first: RequestOutput) -> None:
        self._latest = first
        self._outputs: dict[int, _JoinedOutput] = {}
        self.add(first)

    def add(self, later: RequestOutput) -> None:
        """Appends what comes after all that has been added."""
        self._latest = later
        for delta in later.outputs:
            known = self._outputs.get(delta.index)
            if known is None:
                self._outputs[delta.index] = _JoinedOutput(delta)
            else:
                known.add(delta)

    def output(self) -> RequestOutput:
        """All that was added; an output of the request has its place by its first delta."""
        return replace(self._latest, outputs=[joined.output() for joined in self._outputs.values()])


class _JoinedOutput:
    def __init__(self, first: CompletionOutput) -> None:
        self._latest = first
        self._texts = [first.text]
        self._token_ids = list(first.token_ids)
        self._logprobs = None if first.logprobs is None else [first.logprobs]

    def add(self, later: CompletionOutput) -> None:
        self._latest = later
        self._texts.append(later.text)
        self._token_ids += later.token_ids
        if self._logprobs is not None and later.logprobs is not None:
            self._logprobs.append(later.logprobs)

    def output(self) -> CompletionOutput:
        logprobs = None if self._logprobs is None else list(chain.from_iterable(self._logprobs))
        return replace(self._latest, text="".join(self._texts), token_ids=self._token_ids, logprobs=logprobs)

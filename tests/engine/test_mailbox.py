"""News that wait for a slow reader."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from vllm.engine.mailbox import Mailbox
from vllm.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from vllm.sampling_params import RequestOutputKind


def news(index: int, text: str, token: int, finish_reason: str | None = None, finished: bool = False) -> RequestOutput:
    output = CompletionOutput(index, text, [token], -1.0 * token, [{token: Logprob(-1.0)}], finish_reason)
    return RequestOutput("r", None, [1], [output], finished)


def test_deltas_are_joined_while_nobody_takes_them() -> None:
    async def go() -> None:
        box = Mailbox(RequestOutputKind.DELTA)
        box.put(news(0, "a", 1))
        assert (await box.take()).outputs[0].text == "a"
        for one in (news(0, "b", 2), news(1, "x", 7), news(0, "c", 3, "stop")):
            box.put(one)
        box.put(news(1, "y", 8, "length", finished=True))
        taken = await box.take()
        assert [(o.index, o.text, list(o.token_ids), o.finish_reason) for o in taken.outputs] == [
            (0, "bc", [2, 3], "stop"),
            (1, "xy", [7, 8], "length"),
        ]
        assert [list(entry) for entry in taken.outputs[0].logprobs or []] == [[2], [3]]
        assert taken.outputs[0].cumulative_logprob == -3.0 and taken.finished

    asyncio.run(go())


def test_of_whole_outputs_the_latest_counts() -> None:
    async def go() -> None:
        box = Mailbox(RequestOutputKind.CUMULATIVE)
        box.put(news(0, "a", 1))
        box.put(news(0, "ab", 2))
        assert (await box.take()).outputs[0].text == "ab"

    asyncio.run(go())


def test_an_error_comes_after_the_news_before_it() -> None:
    async def go() -> None:
        box = Mailbox(RequestOutputKind.DELTA)
        waiting = asyncio.create_task(box.take())
        await asyncio.sleep(0)
        box.put(news(0, "a", 1))
        box.put(RuntimeError("engine"))
        assert (await waiting).outputs[0].text == "a"
        with pytest.raises(RuntimeError, match="engine"):
            await box.take()

    asyncio.run(go())


class Counted(CompletionOutput):
    """An output that counts the characters and items that anybody reads from it."""

    work = 0

    @property
    def text(self) -> str:
        Counted.work += len(self._text)
        return self._text

    @text.setter
    def text(self, value: str) -> None:
        self._text = value

    @property
    def token_ids(self) -> Sequence[int]:
        Counted.work += len(self._token_ids)
        return self._token_ids

    @token_ids.setter
    def token_ids(self, value: Sequence[int]) -> None:
        self._token_ids = value

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        Counted.work += len(self._logprobs or ())
        return self._logprobs

    @logprobs.setter
    def logprobs(self, value: list[TokenLogprobs] | None) -> None:
        self._logprobs = value


def test_deltas_that_wait_cost_as_much_as_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    count, num_outputs = 2000, 3
    monkeypatch.setattr(Counted, "work", 0)

    async def go() -> RequestOutput:
        box = Mailbox(RequestOutputKind.DELTA)
        for i in range(count):
            output = Counted(i % num_outputs, "ab", [i], None, [{i: Logprob(-1.0)}])
            box.put(RequestOutput("r", None, [1], [output], i == count - 1))
        return await box.take()

    taken = asyncio.run(go())
    read = Counted.work
    assert [o.text for o in taken.outputs] == ["ab" * len(range(i, count, num_outputs)) for i in range(num_outputs)]
    assert [list(o.token_ids) for o in taken.outputs] == [[*range(i, count, num_outputs)] for i in range(num_outputs)]
    # Two characters, a token and its log-probability each, looked at a few times.
    assert read <= 4 * (4 * count)

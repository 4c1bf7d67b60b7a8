"""News that wait for a slow reader."""

from __future__ import annotations

import asyncio

import pytest

from vllm.engine.mailbox import Mailbox
from vllm.outputs import CompletionOutput, Logprob, RequestOutput
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

"""The engine in a process of its own: what reaches callers when things go wrong on either side."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine.helpers import greedy
from vllm.core.pinned_prompt import Outcome, PoolTokens
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.engine.llm_engine import LLMEngine
from vllm.engine.messages import EngineRequest, EngineStats
from vllm.engine.metrics import EngineMetrics
from vllm.engine.watchdog import Watchdog
from vllm.entrypoints.args.cli_args import make_arg_parser
from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.entrypoints.assembly import build_app
from vllm.exceptions import EngineDeadError, EngineStalledError, VLLMValidationError
from vllm.inputs import CacheMark
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.system_prompt_store import SnapshotOutcome
from vllm.token_ids import token_array

PROMPT = [1, 2, 3]
Run = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs coroutines of all tests in one event loop, in which the engine's tasks live."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path, run: Run) -> Iterator[AsyncLLMEngine]:
    """An engine that may die once, takes four outputs at a time, and should finish a step a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_S", "1")
        args = EngineArgs(
            str(tiny_model_dir), dtype="float32", max_model_len=1024, num_gpu_blocks_override=256, max_num_queued_reqs=4
        )
        engine = AsyncLLMEngine.from_engine_args(args, max_restarts=1)
    yield engine
    engine.shutdown()


async def generate(engine: AsyncLLMEngine, max_tokens: int = 4, request_id: str = "r", **more: Any) -> RequestOutput:
    params = greedy(max_tokens, output_kind=RequestOutputKind.FINAL_ONLY, **more)
    # What waits for ever is to fail.
    async with asyncio.timeout(120):
        return [output async for output in engine.generate(PROMPT, params, request_id)][-1]


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@contextmanager
def stopped(engine: AsyncLLMEngine) -> Iterator[None]:
    pid = engine.replicas[0].link.client.process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def client(engine: AsyncLLMEngine) -> AsyncIterator[httpx.AsyncClient]:
    """Speaks to the HTTP application of the engine, without a server between."""
    app = build_app(engine, make_arg_parser(FlexibleArgumentParser()).parse_args([]))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine", timeout=60) as http:
        yield http


def values(metrics: EngineMetrics, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """Samples of a metric by the values of its own labels."""
    found = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            if sample.name == f"vllm:{name}":
                found[tuple(sample.labels[label] for label in labels)] = sample.value
    return found


def test_every_value_of_a_label_is_there_from_the_start(engine: AsyncLLMEngine) -> None:
    metrics = EngineMetrics(engine.vllm_config, 8)
    operations = {(op, outcome.value) for op in ("load", "save", "update", "delete") for outcome in SnapshotOutcome}
    for name, labels, expected in (
        ("request_success_total", ("finished_reason",), {("stop",), ("length",), ("abort",), ("error",)}),
        ("system_prompt_requests_total", ("outcome",), {(outcome.value,) for outcome in Outcome}),
        ("system_prompt_snapshot_total", ("op", "outcome"), operations),
        ("system_prompt_pool_tokens", ("state",), {(state.value,) for state in PoolTokens}),
        ("admission_rejections_total", ("reason",), {("max_num_queued_reqs",)}),
    ):
        assert values(metrics, name, *labels) == dict.fromkeys(expected, 0.0), name
    for family in metrics.registry.collect():
        assert family.samples, family.name
    # What the engine tells later are the same values, and no others.
    metrics.on_stats(EngineStats(pool_outcomes={"hit": 2}, pool_snapshots={"save/ok": 1}))
    assert values(metrics, "system_prompt_requests_total", "outcome")[("hit",)] == 2
    assert values(metrics, "system_prompt_snapshot_total", "op", "outcome").keys() == operations
    assert len(values(metrics, "system_prompt_pool_tokens", "state")) == len(PoolTokens)


WRONG_REQUESTS: list[dict[str, Any]] = [
    {"priority": "high"},
    {"priority": 2**40},
    {"num_system_tokens": "x"},
    {"cache_salt": 5},
    {"marks": [1]},
    {"marks": [CacheMark("x")]},  # type: ignore[arg-type]
]


def wrong_params() -> list[Any]:
    params = []
    for name, value in (("ignore_eos", "x"), ("temperature", "hot"), ("bad_words", [1]), ("seed", 2**80)):
        params.append(SamplingParams())
        setattr(params[-1], name, value)
    return [*params, {"temperature": 0}, None]


def test_wrong_values_are_told_to_the_caller_and_the_engine_goes_on(engine: AsyncLLMEngine, run: Run) -> None:
    pins: list[tuple[Any, dict[str, Any]]] = [
        ([1, 2], {"pin": "x"}),
        ([1, 2], {"pin": 3}),
        ([1, 2], {"name": 3}),
        ([1, 2], {"name": ""}),
        ([1, 2], {"ttl": "soon"}),
        ([1, 2], {"ttl": float("nan")}),
        ([1, 2], {"ttl": -1}),
        ([-1], {}),
        ([2**40], {}),
        ({"a": 1}, {}),
        (5, {}),
        (None, {}),
    ]

    async def go() -> None:
        calls: list[Coroutine[Any, Any, Any]] = [
            *(engine.add_system_prompt(prompt, **options) for prompt, options in pins),
            engine.update_system_prompt("sp-1", pin="x"),
            engine.update_system_prompt("sp-1", ttl="x"),
            engine.update_system_prompt(["sp-1"]),  # type: ignore[arg-type]
            engine.remove_system_prompt({}),  # type: ignore[arg-type]
            engine.remove_system_prompt("sp-1"),
            engine.set_system_prompt_budget("x"),  # type: ignore[arg-type]
            engine.set_system_prompt_budget(-5),
            engine.sleep("x"),  # type: ignore[arg-type]
            # As callers of another version would send them.
            engine._call("add_system_prompt", [1, 2], {"pin": "x"}),
            engine._call("add_system_prompt", [1, 2], {"colour": "x"}),
            engine._call("add_system_prompt", [-1], {}),
            engine._call("add_system_prompt"),
            engine._call("update_system_prompt", ["sp-1"], {}),
            engine._call("sleep", "x"),
            engine._call("is_sleeping", 1),
            engine._call("explain_request", {"request_id": 5}),
            engine._call("__init__"),
        ]
        for call in calls:
            with pytest.raises(VLLMValidationError):
                await call
        for options in WRONG_REQUESTS:
            with pytest.raises(VLLMValidationError):
                await anext(engine.generate(PROMPT, SamplingParams(), "wrong", **options))
        for params in wrong_params():
            with pytest.raises(VLLMValidationError):
                await anext(engine.generate(PROMPT, params, "wrong"))
        for prompt in (5, {"prompt": 5}, ["a"], [2**40], b"a"):
            with pytest.raises(VLLMValidationError):
                await anext(engine.generate(prompt, SamplingParams(), "wrong"))  # type: ignore[arg-type]
        await engine.check_health()
        assert len((await generate(engine)).outputs[0].token_ids) == 4

    run(go())


def test_a_request_that_the_engine_process_cannot_read_fails_alone(
    engine: AsyncLLMEngine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = engine.input_processor.request

    def lying(request_id: str, *args: Any, **kwargs: Any) -> Any:
        request, processed = honest(request_id, *args, **kwargs)
        if request_id == "wrong":
            request = EngineRequest("wrong", token_array(PROMPT), request.sampling_params, arrival_time="x")  # type: ignore[arg-type]
        return request, processed

    monkeypatch.setattr(engine.input_processor, "request", lying)

    async def go() -> None:
        others = asyncio.create_task(generate(engine, 200))
        with pytest.raises(RuntimeError, match=r"The engine cannot take this: Expected `float`"):
            await generate(engine, request_id="wrong")
        assert len((await others).outputs[0].token_ids) == 200

    run(go())


def test_the_engine_in_this_process_checks_the_same_values(make_tiny: Callable[..., LLMEngine]) -> None:
    engine = make_tiny()
    for options in ({"pin": "x"}, {"ttl": "soon"}, {"name": 3}):
        with pytest.raises(VLLMValidationError):
            engine.add_system_prompt([1, 2], **options)  # type: ignore[arg-type]
    with pytest.raises(VLLMValidationError):
        engine.remove_system_prompt([1])  # type: ignore[arg-type]
    for wrong in WRONG_REQUESTS:
        with pytest.raises(VLLMValidationError):
            engine.add_request("wrong", PROMPT, SamplingParams(), **wrong)
    for params in wrong_params():
        with pytest.raises(VLLMValidationError):
            engine.add_request("wrong", PROMPT, params)
    assert not engine.has_unfinished_requests()


def test_the_watchdog_counts_from_the_last_step_or_the_first_work() -> None:
    now = 0.0
    dog = Watchdog(10, lambda: now)
    now = 100.0
    dog.check(has_work=False)
    dog.note_progress()
    now = 110.0
    dog.check(has_work=True)
    now = 111.0
    with pytest.raises(EngineStalledError, match="no step for 11 s; more than 10 s are too long"):
        dog.check(has_work=True)
    dog.note_progress()
    dog.check(has_work=True)


CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "a", "max_tokens": 2}),
    ("/v1/completions", {"prompt": ["a", "b"], "stream": True, "max_tokens": 2}),
    ("/v1/completions", {"prompt": "a", "n": 2, "use_beam_search": True, "max_tokens": 2}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/responses", {"input": "a", "max_output_tokens": 2}),
    ("/v1/responses", {"input": "a", "max_output_tokens": 2, "stream": True}),
    ("/v1/messages", CHAT),
    ("/v1/messages", CHAT | {"stream": True}),
    ("/invocations", {"prompt": "a", "max_tokens": 2}),
]


def test_what_comes_beyond_the_limit_is_refused_at_once(engine: AsyncLLMEngine, run: Run) -> None:
    def refusals() -> float:
        return values(engine.replicas[0].metrics, "admission_rejections_total", "reason")["max_num_queued_reqs",]

    async def go() -> None:
        async with client(engine) as http:
            before = refusals()
            with stopped(engine):
                two = asyncio.create_task(http.post("/v1/completions", json={"prompt": "a", "n": 2, "max_tokens": 4}))
                await until(lambda: engine.replicas[0].processor.num_outputs == 2)
                refused = await http.post("/v1/completions", json={"prompt": "a", "n": 3})
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                # A herd: places are taken before anything is read of what the requests say.
                herd = [asyncio.create_task(http.post("/v1/completions", json={"prompt": "a"})) for _ in range(5)]
                await until(lambda: sum(task.done() for task in herd) == 3)
                assert [task.result().status_code for task in herd if task.done()] == [503] * 3
                for path, body in ROUTES:
                    answer = await http.post(path, json=body)
                    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), path
                    assert "takes at most 4 (--max-num-queued-reqs); try again in a moment." in answer.text, path
                assert refusals() == before + 1 + 3 + len(ROUTES)
                background = await http.post("/v1/responses", json={"input": "a", "background": True})
                assert background.status_code == 503
                assert (await http.get("/v1/models")).status_code == 200
                assert (await http.post("/tokenize", json=CHAT)).status_code == 200
            assert [task.status_code for task in await asyncio.gather(two, *herd)].count(200) == 3
            never = await http.post("/v1/completions", json={"prompt": "a", "n": 5})
            assert (never.status_code, never.json()["error"]["param"]) == (400, "n")
            for path, body in ROUTES:
                assert (await http.post(path, json=body)).status_code == 200, path
            # Responses in the background keep their places until the engine has them.
            asked = {"input": "a", "background": True, "max_output_tokens": 4}
            many = await asyncio.gather(*(http.post("/v1/responses", json=asked) for _ in range(8)))
            assert {answer.status_code for answer in many} <= {200, 503}
            for answer in many:
                if answer.status_code == 200:
                    path = f"/v1/responses/{answer.json()['id']}"
                    async with asyncio.timeout(30):
                        while (said := (await http.get(path)).json())["status"] in ("queued", "in_progress"):
                            await asyncio.sleep(0.01)
                    assert said["status"] == "incomplete", said
        assert (engine.replicas[0].processor.num_outputs, engine._admission._num_prepared) == (0, 0)

    run(go())


def test_health_says_when_the_engine_does_not_get_on(engine: AsyncLLMEngine, run: Run) -> None:
    async def go() -> None:
        async with client(engine) as http:

            async def status() -> int:
                return (await http.get("/health")).status_code

            with stopped(engine):
                await asyncio.sleep(1.2)
                assert await status() == 200  # without work there is nothing to wait for
                request = asyncio.create_task(generate(engine))
                await until(lambda: bool(engine.replicas[0].processor.requests))
                assert await status() == 200
                while await status() == 200:
                    await asyncio.sleep(0.05)
                error = (await http.get("/health")).json()["error"]
                assert error["code"] == 503
                assert error["message"].startswith("The engine has work and has finished no step for ")
                assert "VLLM_EXECUTE_MODEL_TIMEOUT_S" in error["message"]
            await request
            assert await status() == 200
            # One that sleeps is not expected to work.
            await engine.sleep(0)
            request = asyncio.create_task(generate(engine))
            await asyncio.sleep(1.2)
            assert await status() == 200 and not request.done()
            await engine.wake_up()
            assert await status() == 200
            await request

    run(go())


def test_news_that_cannot_be_taken_in_are_the_engines_death(
    engine: AsyncLLMEngine, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_stats = engine.replicas[0].metrics.on_stats
    faults = 0

    def break_once(stats: EngineStats) -> None:
        nonlocal faults
        if stats.num_running and faults:
            faults -= 1
            raise ZeroDivisionError
        on_stats(stats)

    monkeypatch.setattr(engine.replicas[0].metrics, "on_stats", break_once)

    async def fails() -> None:
        nonlocal faults
        requests = [asyncio.create_task(generate(engine, 1000, request_id=str(i))) for i in range(3)]
        await until(lambda: engine.replicas[0].stats.num_running == 3)
        process, faults = engine.replicas[0].link.client.process, 1
        for request in requests:
            with pytest.raises(EngineDeadError):
                await request
        with pytest.raises(EngineDeadError):
            await engine.check_health()
        await until(lambda: process.poll() is not None)

    async def go() -> None:
        await fails()
        await until(lambda: not engine.errored)
        assert len((await generate(engine)).outputs[0].token_ids) == 4
        await engine.check_health()
        await fails()
        await asyncio.wait_for(engine.wait_until_dead(), 60)
        assert engine.errored

    run(go())

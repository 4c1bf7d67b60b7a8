"""Engines in this process, and requests run on them to their end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from vllm.engine.arg_utils import EngineArgs
from vllm.engine.llm_engine import LLMEngine
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams


class Request(NamedTuple):
    """A prompt as token ids, and how many of them are its system prompt."""

    token_ids: list[int]
    num_system_tokens: int | None = None


def make_engine(model: object, **args: Any) -> LLMEngine:
    """An engine in float32 with a small KV cache; `args` are engine flags."""
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "num_gpu_blocks_override": 512, "seed": 0}
    return LLMEngine.from_engine_args(EngineArgs(model=str(model), **(options | args)))


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    """Greedy, to exactly `max_tokens` tokens."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **more)


def add(engine: LLMEngine, request_id: str, request: Request, params: SamplingParams, **more: Any) -> None:
    params = params.clone()
    params.output_kind = RequestOutputKind.FINAL_ONLY
    engine.add_request(request_id, request.token_ids, params, num_system_tokens=request.num_system_tokens, **more)


def finish(engine: LLMEngine) -> dict[str, RequestOutput]:
    """Steps until nothing is left; returns the last output of each request."""
    outputs = {}
    while engine.has_unfinished_requests() or engine.core.has_work():
        for output in engine.step():
            outputs[output.request_id] = output
    return outputs


def run(
    engine: LLMEngine, requests: Iterable[Request], params: SamplingParams | list[SamplingParams], **more: Any
) -> list[RequestOutput]:
    """Sends all requests at once; returns their outputs in the same order."""
    requests = list(requests)
    every = params if isinstance(params, list) else [params] * len(requests)
    for i, (request, one) in enumerate(zip(requests, every, strict=True)):
        add(engine, f"run-{i}", request, one, **more)
    outputs = finish(engine)
    return [outputs[f"run-{i}"] for i in range(len(requests))]


def tokens(outputs: Iterable[RequestOutput]) -> list[list[int]]:
    """Token ids of the first output of each."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def assert_nothing_held(engine: LLMEngine) -> None:
    """No request is left and none left anything behind: books balance, no block used, no reader."""
    scheduler = engine.core.scheduler
    scheduler.check_integrity()
    assert not engine.core.has_work()
    assert (scheduler.blocks.num_used_blocks, engine.core.pool.num_readers) == (0, 0)
    assert all(prompt.readers == 0 for prompt in engine.core.pool.prompts())

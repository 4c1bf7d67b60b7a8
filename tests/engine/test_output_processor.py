"""News of the engine on their way to whoever asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm.engine.input_processor import ProcessedPrompt
from vllm.engine.messages import EngineOutput, EngineRequest
from vllm.engine.observer import ObservedRequest, RequestObserver
from vllm.engine.output_processor import OutputProcessor
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.token_ids import token_array
from vllm.transformers_utils.tokenizer import Tokenizer, load_tokenizer

News = RequestOutput | Exception


class Ends(RequestObserver):
    def __init__(self) -> None:
        self.reasons: list[str | None] = []

    def on_finish(self, request: ObservedRequest, now: float) -> None:
        self.reasons += [output.finish_reason for output in request.outputs]


class BrokenText:
    """Text whose tokens cannot be decoded."""

    stop_string = None

    def append(self, token_id: int, is_stop_token: bool, is_last: bool) -> None:
        raise KeyError(token_id)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return load_tokenizer(str(tiny_model_dir))


def add(processor: OutputProcessor, request_id: str, receiver: list[News], **params: int) -> None:
    request = EngineRequest(request_id, token_array([1]), SamplingParams(**params), 0.0)
    processor.add(request, ProcessedPrompt([1], token_array([1]), None), receiver.append)


def token(request_id: str, finish_reason: str | None = None) -> EngineOutput:
    return EngineOutput(request_id, 0, [5], finish_reason=finish_reason)


def test_a_request_whose_text_cannot_be_read_ends_alone(tokenizer: Tokenizer) -> None:
    observer = Ends()
    processor = OutputProcessor(tokenizer, observer)
    good: list[News] = []
    bad: list[News] = []
    add(processor, "good", good)
    add(processor, "bad", bad)
    processor.requests["bad"].outputs[0].text = BrokenText()  # type: ignore[assignment]
    assert processor.process([token("bad"), token("good")]).aborts == [("bad", None)]
    assert processor.process([token("bad"), token("good", "length")]).aborts == []
    assert [str(error) for error in bad] == ["Request bad has ended: its output could not be read (KeyError: 5)."]
    assert [isinstance(item, RequestOutput) for item in good] == [True, True]
    assert (observer.reasons, processor.requests, processor.num_outputs) == (["error", "length"], {}, 0)


@pytest.mark.parametrize("finish_reason", [None, "length"])
def test_a_receiver_that_breaks_ends_its_request_alone(tokenizer: Tokenizer, finish_reason: str | None) -> None:
    processor = OutputProcessor(tokenizer)
    told: list[News] = []
    good: list[News] = []

    def deliver(news: News) -> None:
        told.append(news)
        if not isinstance(news, Exception):
            raise OSError("full")

    request = EngineRequest("bad", token_array([1]), SamplingParams(), 0.0)
    processor.add(request, ProcessedPrompt([1], token_array([1]), None), deliver)
    add(processor, "good", good)
    assert ("bad", None) in processor.process([token("bad", finish_reason), token("good")]).aborts
    assert isinstance(told[-1], RuntimeError)
    assert "OSError: full" in str(told[-1])
    assert len(good) == 1 and list(processor.requests) == ["good"]


def test_one_that_cannot_be_told_does_not_keep_the_others_from_it(tokenizer: Tokenizer) -> None:
    class Broken(RequestObserver):
        def on_finish(self, request: ObservedRequest, now: float) -> None:
            raise ZeroDivisionError

    def deaf(news: News) -> None:
        raise OSError("full")

    processor = OutputProcessor(tokenizer, Broken())
    good: list[News] = []
    request = EngineRequest("deaf", token_array([1]), SamplingParams(), 0.0)
    processor.add(request, ProcessedPrompt([1], token_array([1]), None), deaf)
    add(processor, "good", good, n=3)
    error = RuntimeError("dead")
    processor.fail_all(error)
    assert good == [error]
    assert (processor.requests, processor.num_outputs) == ({}, 0)


def test_what_an_observer_raises_is_nobodys_own_fault(tokenizer: Tokenizer) -> None:
    class Broken(RequestObserver):
        def on_token(self, now: float, previous: float | None) -> None:
            raise ZeroDivisionError

    processor = OutputProcessor(tokenizer, Broken())
    add(processor, "r", [])
    with pytest.raises(ZeroDivisionError):
        processor.process([token("r")])

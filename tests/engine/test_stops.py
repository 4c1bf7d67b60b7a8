"""When an output ends, why, and what of its text is shown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.helpers import Request, assert_nothing_held, finish, greedy, make_engine, run, tokens
from vllm.engine.llm_engine import LLMEngine
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

pytestmark = pytest.mark.usefixtures("pipeline_depth")

PROMPT = Request([464, 3290, 318, 257, 845, 1263, 5044])
# Many different words, the same in each test.
LIVELY = {"temperature": 1.0, "seed": 3, "max_tokens": 40, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Iterator[LLMEngine]:
    engine = make_engine(tiny_model_dir, max_model_len=128)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def whole(engine: LLMEngine) -> CompletionOutput:
    """The output that nothing stops."""
    output = run(engine, [PROMPT], SamplingParams(**LIVELY))[0].outputs[0]
    assert (output.finish_reason, output.stop_reason, len(output.token_ids)) == ("length", None, 40)
    assert output.text == engine.tokenizer.decode(output.token_ids)
    return output


def token_ends(engine: LLMEngine, output: CompletionOutput) -> list[int]:
    """Length of the text after each token."""
    return [len(engine.tokenizer.decode(output.token_ids[: i + 1])) for i in range(len(output.token_ids))]


def stops_of(text: str) -> list[str]:
    """Pieces of 1 to 12 characters from all over the text, most of them over several tokens."""
    return [text[i : i + 1 + i % 12] for i in range(3, len(text) - 12, 3)]


def test_stop_strings(engine: LLMEngine, whole: CompletionOutput) -> None:
    stops = stops_of(whole.text)
    assert len(stops) > 30
    ends = token_ends(engine, whole)
    outputs = run(engine, [PROMPT] * len(stops), [SamplingParams(stop=stop, **LIVELY) for stop in stops])
    over_tokens = 0
    for stop, request_output in zip(stops, outputs, strict=True):
        output = request_output.outputs[0]
        at = whole.text.find(stop)
        assert output.text == whole.text[:at], stop
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        last = next(i for i, end in enumerate(ends) if end >= at + len(stop))
        assert len(output.token_ids) == last + 1, "it ends with the token that completes the string"
        over_tokens += last > 0 and at < ends[last - 1]
    assert over_tokens > 10
    assert_nothing_held(engine)


def test_stop_strings_in_the_output(engine: LLMEngine, whole: CompletionOutput) -> None:
    stops = stops_of(whole.text)
    settings = [SamplingParams(stop=[stop], include_stop_str_in_output=True, **LIVELY) for stop in stops]
    for stop, output in zip(stops, run(engine, [PROMPT] * len(stops), settings), strict=True):
        assert output.outputs[0].text == whole.text[: whole.text.find(stop) + len(stop)]


def test_the_first_of_several_stop_strings_counts(engine: LLMEngine, whole: CompletionOutput) -> None:
    late, early = whole.text[60:70], whole.text[20:26]
    (output,) = run(engine, [PROMPT], SamplingParams(stop=["\x00never", late, early], **LIVELY))
    assert output.outputs[0].stop_reason == early
    assert output.outputs[0].text == whole.text[: whole.text.find(early)]


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
@pytest.mark.parametrize("include", [False, True])
def test_streamed_text_never_shows_a_part_of_a_stop_string(
    engine: LLMEngine, whole: CompletionOutput, kind: RequestOutputKind, include: bool
) -> None:
    stops = stops_of(whole.text)
    for i, stop in enumerate(stops):
        params = SamplingParams(stop=stop, output_kind=kind, include_stop_str_in_output=include, **LIVELY)
        engine.add_request(str(i), PROMPT.token_ids, params)
    shown = [""] * len(stops)
    ids: list[list[int]] = [[] for _ in stops]
    while engine.has_unfinished_requests():
        for news in engine.step():
            i, output = int(news.request_id), news.outputs[0]
            if kind == RequestOutputKind.DELTA:
                shown[i] += output.text
                ids[i] += output.token_ids
            else:
                assert output.text.startswith(shown[i]), "what was shown stays"
                shown[i], ids[i] = output.text, list(output.token_ids)
            at = whole.text.find(stops[i])
            limit = whole.text[: at + (len(stops[i]) if include else 0)]
            assert limit.startswith(shown[i]), (stops[i], shown[i])
            assert not news.finished or shown[i] == limit
            assert news.finished == (output.finish_reason is not None)
    assert all(found == list(whole.token_ids[: len(found)]) for found in ids)


def test_deltas_of_an_output_that_nothing_stops_are_its_text(engine: LLMEngine, whole: CompletionOutput) -> None:
    for i, stop in enumerate(([], ["\x00never seen in this text"])):
        params = SamplingParams(stop=stop, output_kind=RequestOutputKind.DELTA, **LIVELY)
        engine.add_request(str(i), PROMPT.token_ids, params)
    shown = ["", ""]
    while engine.has_unfinished_requests():
        for news in engine.step():
            shown[int(news.request_id)] += news.outputs[0].text
    assert shown == [whole.text] * 2


def test_one_stopped_output_of_several_leaves_the_others(engine: LLMEngine, whole: CompletionOutput) -> None:
    stop = whole.text[30:40]
    (output,) = run(engine, [PROMPT], SamplingParams(n=3, stop=stop, **LIVELY))
    first, *others = output.outputs
    assert (first.finish_reason, first.text) == ("stop", whole.text[: whole.text.find(stop)])
    assert [(o.finish_reason, len(o.token_ids)) for o in others] == [("length", 40)] * 2
    assert_nothing_held(engine)


def test_min_tokens_put_off_stop_strings_and_stop_tokens(engine: LLMEngine, whole: CompletionOutput) -> None:
    stop = whole.text[:4]
    (output,) = run(engine, [PROMPT], SamplingParams(stop=stop, min_tokens=20, **LIVELY))
    assert output.outputs[0].finish_reason == "length" or len(output.outputs[0].token_ids) > 20
    token = whole.token_ids[2]
    (output,) = run(engine, [PROMPT], SamplingParams(stop_token_ids=[token], min_tokens=10, **LIVELY))
    assert token not in output.outputs[0].token_ids[:10]
    assert len(output.outputs[0].token_ids) > 10


def test_stop_token_ids(engine: LLMEngine, whole: CompletionOutput) -> None:
    for i in (0, 5, 17):
        token = whole.token_ids[i]
        first = list(whole.token_ids).index(token)
        for include in (False, True):
            params = SamplingParams(stop_token_ids=[1, token], include_stop_str_in_output=include, **LIVELY)
            output = run(engine, [PROMPT], params)[0].outputs[0]
            assert (output.finish_reason, output.stop_reason) == ("stop", token)
            assert output.token_ids == whole.token_ids[: first + 1]
            shown = output.token_ids if include else output.token_ids[:-1]
            assert output.text == engine.tokenizer.decode(shown)


def test_end_of_sequence(engine: LLMEngine) -> None:
    (eos, *_) = engine.vllm_config.model.eos_token_ids
    bias = {eos: 100.0}

    def output_of(**params: object) -> CompletionOutput:
        asked = SamplingParams(temperature=0, max_tokens=6, logit_bias=bias, **params)
        return run(engine, [PROMPT], asked)[0].outputs[0]

    output = output_of()
    assert (output.finish_reason, output.stop_reason, output.token_ids, output.text) == ("stop", None, [eos], "")
    output = output_of(min_tokens=3)
    assert (output.finish_reason, len(output.token_ids), output.token_ids[-1]) == ("stop", 4, eos)
    assert eos not in output.token_ids[:3]
    output = output_of(ignore_eos=True)
    assert (output.finish_reason, output.token_ids) == ("length", [eos] * 6)


def test_max_tokens_are_cut_to_what_the_context_leaves(engine: LLMEngine) -> None:
    long = Request(list(range(1000, 1120)))
    for max_tokens, got in ((3, 3), (8, 8), (9, 8), (1000, 8), (None, 8)):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        output = run(engine, [long], params)[0].outputs[0]
        assert (len(output.token_ids), output.finish_reason) == (got, "length")
    assert len(tokens(run(engine, [Request(list(range(1000, 1127)))], greedy(5)))[0]) == 1
    for size in (128, 500):
        with pytest.raises(
            VLLMValidationError, match=f"maximum context length is 128 tokens.* at least {size} input tokens"
        ):
            engine.add_request("long", list(range(1000, 1000 + size)), greedy(5))
    assert not engine.has_unfinished_requests()


def test_abort(engine: LLMEngine) -> None:
    engine.add_request("a", PROMPT.token_ids, greedy(50))
    engine.add_request("b", PROMPT.token_ids, greedy(5))
    engine.step()
    engine.abort_request(["a", "unknown"])
    outputs = finish(engine)
    assert set(outputs) == {"b"} and outputs["b"].finished
    assert_nothing_held(engine)


def test_a_request_id_in_use(engine: LLMEngine) -> None:
    engine.add_request("a", PROMPT.token_ids, greedy(2))
    with pytest.raises(VLLMValidationError, match="request id 'a' is in use"):
        engine.add_request("a", PROMPT.token_ids, greedy(2))
    assert set(finish(engine)) == {"a"}
    engine.add_request("a", PROMPT.token_ids, greedy(2))
    assert set(finish(engine)) == {"a"}

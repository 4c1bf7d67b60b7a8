"""What a request makes the API process do: where it runs, how often, and how much of it there may be.

The application and its engine, without a socket between, so that a test can see which thread does what.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from vllm.engine import input_processor, logprobs
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.args.cli_args import make_arg_parser
from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.entrypoints.assembly import build_app
from vllm.entrypoints.chat import messages as chat_messages
from vllm.entrypoints.http import json_answer, json_body
from vllm.entrypoints.http.body_limits import BodyBytes
from vllm.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_SAMPLER_ENTRIES, MAX_STOP_SEARCHES
from vllm.transformers_utils import chat_template

USER = {"role": "user", "content": "Name a colour."}
SHORT = {"max_tokens": 2, "temperature": 0}
AGENT = "x-anthropic-billing-header: cc_version=2.1.177.{0}; cc_entrypoint=cli; cch={0}a1;"
SYSTEM = "You keep the desk of a harbour office. Berth 1 takes boats up to 11 metres, berth 2 up to 12 metres."


class Served:
    """The application, asked from the thread of its event loop."""

    def __init__(self, runner: asyncio.Runner, app: Any, engine: AsyncLLMEngine) -> None:
        self.app, self.engine, self._runner = app, engine, runner

    def post(self, path: str, body: dict[str, Any] | AsyncIterator[bytes], **headers: str) -> httpx.Response:
        return self.post_all((path, body), **headers)[0]

    def post_all(self, *requests: tuple[str, Any], **headers: str) -> list[httpx.Response]:
        """Answers to requests that are sent together."""

        async def ask() -> list[httpx.Response]:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                return await asyncio.gather(
                    *(
                        client.post(path, json=body, headers=headers)
                        if isinstance(body, dict)
                        else client.post(path, content=body, headers={"Content-Type": "application/json"} | headers)
                        for path, body in requests
                    )
                )

        return self._runner.run(ask())

    def refused(self, path: str, body: dict[str, Any], status: int = 400) -> str:
        answer = self.post(path, body)
        assert answer.status_code == status, answer.text
        message = answer.json()["error"]["message"]
        assert "\n" not in message
        return str(message)


@pytest.fixture(scope="module")
def served(tiny_model_dir, warm_engines) -> Iterator[Served]:
    flags = ["--model", str(tiny_model_dir), "--max-model-len", "4096", "--num-gpu-blocks-override", "600"]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([*flags, "--disable-log-stats"])
    engine = AsyncLLMEngine.from_engine_args(EngineArgs.from_cli_args(args))
    with asyncio.Runner() as runner:
        yield Served(runner, build_app(engine, args), engine)

        async def end() -> None:
            engine.shutdown()

        runner.run(end())


def record_threads(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[str]:
    """Names of the threads in which a function runs from now on."""
    seen: list[str] = []
    function = getattr(owner, name)

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append(threading.current_thread().name)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, recording)
    return seen


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [USER], "bad_words": ["blue", "red"]}),
        ("/v1/chat/completions", {"messages": [{"role": "system", "content": SYSTEM}, USER]}),
        ("/v1/completions", {"prompt": ["Once", "Twice"], "bad_words": ["blue"]}),
        ("/v1/completions", {"prompt": "Once", "use_beam_search": True, "n": 2}),
        ("/v1/messages", {"messages": [USER], "system": SYSTEM}),
        ("/v1/responses", {"input": "Name a colour.", "max_output_tokens": 16}),
        ("/tokenize", {"prompt": "Once"}),
        ("/v1/system_prompts?explain=1", {"messages": [{"role": "system", "content": SYSTEM}, USER]}),
    ],
)
def test_nothing_is_tokenised_on_the_event_loop(served: Served, monkeypatch, path, body) -> None:
    seen = record_threads(monkeypatch, served.engine.tokenizer, "encode")
    answer = served.post(path, ({} if "responses" in path else SHORT) | body)
    assert answer.status_code == 200, answer.text
    assert seen and all("work" in name for name in seen), seen


def test_bad_words_are_tokenised_once_for_all_prompts_of_a_request(served: Served, monkeypatch) -> None:
    seen = record_threads(monkeypatch, served.engine.input_processor, "_bad_words")
    body = SHORT | {"prompt": ["Once", "Twice", "Thrice"], "bad_words": ["blue"]}
    assert served.post("/v1/completions", body).status_code == 200
    assert len(seen) == 1


def test_a_long_body_is_parsed_checked_and_rendered_in_the_lane_of_long_ones(served: Served, monkeypatch) -> None:
    parsing = record_threads(monkeypatch, json_body, "parse_json_object")
    checking = record_threads(monkeypatch, chat_messages, "_check_message")
    rendering = record_threads(monkeypatch, served.engine.renderer, "render")
    long = {"messages": [USER], "metadata": {"note": "x" * 20_000}}
    assert served.post("/v1/chat/completions", SHORT | {"messages": [USER]}).status_code == 200
    assert served.post("/v1/chat/completions", SHORT | long).status_code == 200
    main = threading.main_thread().name
    assert [name.partition("_")[0] for name in parsing] == [main, "long-work"]
    assert [name.partition("_")[0] for name in checking] == [main, "long-work"]
    assert [name.partition("_")[0] for name in rendering] == ["short-work", "long-work"]


def test_a_chat_is_checked_once_and_its_own_tokens_not_at_all(served: Served, monkeypatch) -> None:
    checks = record_threads(monkeypatch, chat_messages, "_check_message")
    again = record_threads(monkeypatch, chat_template, "_normalised")
    of_ids = record_threads(monkeypatch, served.engine.input_processor, "_checked_ids")
    body = SHORT | {"messages": [{"role": "system", "content": SYSTEM}, USER]}
    first = served.post("/v1/chat/completions", body).json()
    assert (len(checks), len(again), len(of_ids)) == (2, 0, 0)
    assert served.post("/v1/completions", SHORT | {"prompt": "Once"}).status_code == 200
    assert not of_ids
    # A client's own ids are checked, and give the same answer.
    ids = served.post("/tokenize", {"messages": body["messages"]}).json()["tokens"]
    assert served.post("/v1/completions", SHORT | {"prompt": ids}).json()["usage"]["completion_tokens"] == 2
    assert len(of_ids) == 1 and first["usage"]["prompt_tokens"] == len(ids)


BODY = {"messages": [USER], **SHORT}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bad_words": ["x"] * (MAX_BAD_WORDS + 1)}, f"at most {MAX_BAD_WORDS} entries, got 257"),
        ({"bad_words": ["x" * 1025]}, "at most 1024 characters, got one of 1025"),
        ({"bad_words": ["x1" * 500] * 2 + [f"y{i}" * 300 for i in range(60)]}, f"at most {MAX_BAD_WORD_TOKENS} tokens"),
        ({"allowed_token_ids": [5] * 49_153}, "at most 49152 entries, got 49153"),
        ({"allowed_token_ids": list(range(4096)), "n": 128}, f"{MAX_SAMPLER_ENTRIES} entries over all outputs"),
        ({"logprobs": True, "top_logprobs": 20, "n": 26}, "logprobs may be at most 500 over all n outputs"),
        ({f"field{i}": 1 for i in range(1030)}, "at most 1024 fields"),
        ({"stop": ["y"] * 100, "n": 128}, f"{MAX_STOP_SEARCHES} entries over all outputs"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "at most 1024 entries, got 1025"),
        ({"stop_token_ids": [1] * 1025}, "at most 1024 entries, got 1025"),
    ],
)
def test_what_is_beyond_a_limit_is_refused_in_a_line_that_names_it(served: Served, fields, words) -> None:
    message = served.refused("/v1/chat/completions", BODY | fields)
    assert words in message and (next(iter(fields)) in message or "fields" in words)


@pytest.mark.parametrize(
    "fields",
    [
        {"bad_words": [f"w{i}" for i in range(MAX_BAD_WORDS)]},
        {"allowed_token_ids": list(range(49_152))},
        {"stop": ["y" * 1024] * 256},
        {"stop": ["y"] * 64, "n": 32},
        {"logit_bias": {str(i): 1 for i in range(1024)}, "stop_token_ids": list(range(10, 1034)), "n": 4},
    ],
)
def test_what_is_at_a_limit_is_served(served: Served, fields) -> None:
    answer = served.post("/v1/chat/completions", BODY | fields)
    assert answer.status_code == 200, answer.text


def test_a_prompts_log_probabilities_are_bounded_and_shaped_in_a_thread(served: Served, monkeypatch) -> None:
    seen = record_threads(monkeypatch, logprobs.LogprobRows, "at")
    body = SHORT | {"prompt": list(range(100, 1100)), "prompt_logprobs": 20}
    (choice,) = served.post("/v1/completions", body).json()["choices"]
    shown = choice["prompt_logprobs"]
    assert (len(shown), shown[0]) == (1000, None) and all(len(row) in (20, 21) for row in shown[1:])
    assert set(map(str, range(101, 1100))) == {next(iter(row)) for row in shown[1:]}
    assert len(seen) == 999 and all("work" in name for name in seen)
    with monkeypatch.context() as patch:
        patch.setattr(input_processor, "MAX_PROMPT_LOGPROBS", 19_999)
        assert "at most 19999 over all tokens of the prompt, got 20 for each of 1000" in served.refused(
            "/v1/completions", body
        )


def test_long_answers_are_encoded_as_short_ones_are() -> None:
    rows = [{"a": i, "b": [i, None, "x"]} for i in range(1000)]
    answer = {"n": 1, "ids": list(range(10_000)), "choices": [{"logprobs": {"content": rows}}, {"content": []}]}
    assert json.loads(json_answer.encode_in_pieces(answer)) == answer
    assert json_answer.cost(answer) > 4096 > json_answer.cost({"choices": [{"message": {"content": "x" * 10_000}}]})


def test_lists_of_prompts_count_as_outputs(served: Served) -> None:
    body = SHORT | {"prompt": ["a"] * 512, "logit_bias": {str(i): 1 for i in range(600)}}
    assert "600 for each of 512" in served.refused("/v1/completions", body)


def test_bodies_beyond_the_bytes_that_may_be_held_are_told_to_come_later(served: Served, monkeypatch) -> None:
    bodies = BodyBytes(100_000)
    monkeypatch.setitem(served.app.state._state, "bodies", bodies)
    held: list[int] = []

    async def chunked(size: int) -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(size // 1000):
            yield b"x" * 1000
            await asyncio.sleep(0)
            held.append(bodies.held)
        yield b'"}'

    declared, unknown = SHORT | {"prompt": "x" * 150_000}, chunked(150_000)
    short = SHORT | {"prompt": "Once"}
    answers = served.post_all(("/v1/completions", unknown), ("/v1/completions", short), ("/v1/completions", declared))
    assert [answer.status_code for answer in answers] == [503, 200, 503]
    for refused in (answers[0], answers[2]):
        assert refused.headers["retry-after"] == "1"
        assert "try again in 1 s" in refused.json()["error"]["message"]
    assert 90_000 < max(held) <= 100_000
    assert bodies.held == 0
    assert served.post("/v1/completions", SHORT | {"prompt": "x" * 20_000}).status_code == 400, "it is read now"
    assert bodies.held == 0


def test_three_agents_share_a_system_prompt_but_for_their_billing_line(served: Served) -> None:
    def cached(head: str, apart: bool, user: str) -> int:
        blocks = [head, SYSTEM] if apart else [f"{head}\n{SYSTEM}"]
        system = [{"type": "text", "text": text} for text in blocks]
        answer = served.post(
            "/v1/messages", {"max_tokens": 2, "system": system, "messages": [{**USER, "content": user}]}
        )
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["cache_read_input_tokens"])

    cached(AGENT.format("0b1"), True, "One")
    cached(AGENT.format("0b2"), True, "Two")
    size = cached(AGENT.format("0b3"), True, "Three")
    assert size > 20
    assert cached(AGENT.format("0b4"), False, "Four") == size, "in the same block as the rest"
    chat = {"messages": [{"role": "system", "content": f"{AGENT.format('0b5')}\n{SYSTEM}"}, USER]}
    answer = served.post("/v1/chat/completions", SHORT | chat).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == size, "on another route"
    counted = {"system": [{"type": "text", "text": AGENT.format("0b6")}, {"type": "text", "text": SYSTEM}]}
    plain = served.post("/v1/messages/count_tokens", {"messages": [USER], "system": SYSTEM}).json()
    assert served.post("/v1/messages/count_tokens", {"messages": [USER], **counted}).json() == plain


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": AGENT.format("0")}, {"role": "assistant", "content": "x"}],
        [{"role": "system", "content": "Say x-anthropic-billing-header: cc_version=1;"}, USER],
        [{"role": "system", "content": "x-anthropic-billing-header: is a header of HTTP.\nExplain it."}, USER],
        [{"role": "system", "content": SYSTEM}, {"role": "system", "content": AGENT.format("0")}, USER],
    ],
)
def test_what_only_looks_like_a_billing_line_stays(messages) -> None:
    assert chat_messages.without_billing_line(messages) == messages


def test_a_system_part_of_the_billing_line_alone_is_none() -> None:
    for content in (AGENT.format("0"), [{"type": "text", "text": AGENT.format("0") + "\n"}]):
        assert chat_messages.without_billing_line([{"role": "system", "content": content}, USER]) == [USER]


def test_a_body_that_is_long_to_parse_is_refused_before(served: Served) -> None:
    for value, what in (([0] * 525_000, "values"), ([[]] * 65_537, "strings, arrays and objects")):
        assert f"{what}; send several" in served.refused("/v1/completions", {"prompt": "Once", "metadata": value}, 413)
    # As text they are none.
    text = json.dumps([0] * 100_000) * 6 + '\\"[{,' * 50_000
    assert "maximum context length" in served.refused("/v1/completions", {"prompt": text})

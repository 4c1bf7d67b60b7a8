"""`vllm run-batch`: files of requests in the OpenAI batch format."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import pytest

from vllm.entrypoints.openai import run_batch
from vllm.entrypoints.openai.run_batch import answer_file

CHAT = "/v1/chat/completions"
SYSTEM = {"role": "system", "content": "You answer the letters of children in the name of a bear. " * 8}


def line(custom_id: Any, url: Any = CHAT, **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def chat(text: str) -> dict[str, Any]:
    return {"messages": [SYSTEM, {"role": "user", "content": text}], "max_tokens": 4, "ignore_eos": True}


def test_a_file_is_answered_in_its_order_and_bad_lines_hurt_no_other(run_vllm, tmp_path, tiny_model_dir):
    good = [
        line("chat-1", **chat("What do bears eat?")),
        line("chat-2", **chat("Where do bears sleep?")),
        line("text", "/v1/completions", prompt=["Once", "Twice"], max_tokens=3, ignore_eos=True),
        line("response", "/v1/responses", input="Hello", max_output_tokens=3),
    ]
    bad = [
        (line("stream", **chat("Hi"), stream=True), 400, "stream"),
        (line("value", **(chat("Hi") | {"temperature": -1})), 400, "temperature"),
        (line("model", **chat("Hi"), model="nobody"), 404, "model"),
        (line("url", "/v1/nothing"), 400, "url"),
        (line("list", ["/v1/completions"]), 400, "url"),
        (json.dumps({"custom_id": "body", "url": CHAT, "body": 5}), 400, "body"),
        (json.dumps({"custom_id": "get", "url": CHAT, "method": "GET", "body": {}}), 400, "method"),
        (line(7, **chat("Hi")), 400, "custom_id"),
        ("{not json", 400, None),
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([good[0], "", *(text for text, _, _ in bad), *good[1:]]))  # no newline at the end
    flags = ("--max-model-len", "2048", "--num-gpu-blocks-override", "256", "--served-model-name", "bear")
    done = run_vllm("run-batch", "-i", source, "-o", target, "--model", tiny_model_dir, *flags)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(text) for text in target.read_text().splitlines()]
    assert len(answers) == len(good) + len(bad)

    first, *failed = answers[: len(bad) + 1]
    for answer, (text, status, param) in zip(failed, bad, strict=True):
        assert answer["response"]["status_code"] == status, text
        assert answer["response"]["body"]["error"] == answer["error"]
        assert answer["error"]["param"] == param
    assert [answer["custom_id"] for answer in failed[:3]] == ["stream", "value", "model"]

    rest = answers[len(bad) + 1 :]
    assert [answer["custom_id"] for answer in (first, *rest)] == ["chat-1", "chat-2", "text", "response"]
    for answer in (first, *rest):
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"]["model"] == "bear"
    bodies = [answer["response"]["body"] for answer in (first, *rest)]
    assert [body["object"] for body in bodies] == ["chat.completion", "chat.completion", "text_completion", "response"]
    assert bodies[0]["usage"]["completion_tokens"] == 4
    details = [body["usage"]["prompt_tokens_details"] for body in bodies[:2]]
    assert sorted(detail["cache_write_tokens"] > 0 for detail in details) == [False, True]
    assert len(bodies[2]["choices"]) == 2
    assert len({answer["id"] for answer in answers}) == len(answers)


@pytest.mark.parametrize(
    ("source", "target"), [("none.jsonl", "out.jsonl"), ("in.jsonl", "no/out.jsonl"), ("in.jsonl",) * 2]
)
def test_files_that_cannot_be_used_are_told_before_the_model_loads(tmp_path, monkeypatch, source, target):
    from vllm.entrypoints.args.parser import FlexibleArgumentParser
    from vllm.exceptions import StartupError

    (tmp_path / "in.jsonl").write_text(line("a", **chat("Hi")))
    monkeypatch.chdir(tmp_path)
    parser = FlexibleArgumentParser()
    run_batch.add_arguments(parser)
    args = parser.parse_args(["-i", source, "-o", target, "--model", "/no/such/model"])
    with pytest.raises(StartupError, match=r"\.jsonl"):
        run_batch.run(args)
    assert (tmp_path / "in.jsonl").read_text()
    args.enable_log_outputs = True
    with pytest.raises(StartupError, match="--enable-log-outputs needs --enable-log-requests"):
        run_batch.run(args)


class EchoRunner:
    """Answers each line after the later ones, and counts how many are open at once."""

    def __init__(self) -> None:
        self.open = self.most_open = 0

    async def answer(self, text: bytes) -> dict[str, Any]:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(0.01 / (1 + int(text[:3])))
        self.open -= 1
        return {"line": int(text[:3]), "size": len(text), "error": None}


def test_so_many_requests_are_open_at_once_and_no_more():
    runner, output = EchoRunner(), io.BytesIO()
    lines = io.BytesIO(b"".join(f"{i:03}\n".encode() for i in range(100)))
    assert asyncio.run(answer_file(runner, lines, output, 8)) == (100, 0)  # type: ignore[arg-type]
    assert [json.loads(text)["line"] for text in output.getvalue().splitlines()] == list(range(100))
    assert 1 < runner.most_open <= 8


def test_a_line_that_is_too_long_is_not_read_whole(monkeypatch):
    monkeypatch.setattr(run_batch, "MAX_BODY_BYTES", 100)
    runner, output = EchoRunner(), io.BytesIO()
    lines = io.BytesIO(b"001" + b"x" * 1000 + b"\n" + b"002\n" + b"003" + b"x" * 97 + b"\n" + b"004" + b"x" * 300)
    asyncio.run(answer_file(runner, lines, output, 8))  # type: ignore[arg-type]
    answers = [json.loads(text) for text in output.getvalue().splitlines()]
    assert [(answer["line"], answer["size"]) for answer in answers] == [(1, 101), (2, 4), (3, 101), (4, 101)]

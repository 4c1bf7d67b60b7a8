"""Streaming requests as a benchmark sends them: what came, and when."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from vllm.benchmarks.datasets import Sample

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions", "vllm": "/v1/completions"}
"""Kind of API → its path."""

_MAX_ERROR_CHARS = 500


@dataclass
class Outcome:
    """What became of a request. Times are seconds: `started` of `time.perf_counter()`, the others since then.

    Attributes:
        queued: From when it was due until it was sent, while others held all the connections that were allowed.
        ttft: Until the first piece of the answer.
        itl: Gaps between pieces.
        latency: Until the last piece.
        output_len: Tokens by the server's own count; None if it tells none.
        error: Why it failed; empty if it did not.
    """

    prompt_len: int
    started: float
    queued: float = 0.0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    text: str = ""
    output_len: int | None = None
    error: str = ""

    @property
    def success(self) -> bool:
        return not self.error


@dataclass(frozen=True)
class Target:
    """Where requests go and what each of them carries."""

    url: str
    chat: bool
    model: str
    headers: dict[str, str]
    extra_body: dict[str, Any]

    def body(self, sample: Sample) -> bytes:
        content: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if self.chat:
            content["messages"] = [{"role": "user", "content": sample.prompt}]
            content["max_completion_tokens"] = sample.output_len
        else:
            content["prompt"] = sample.prompt
            content["max_tokens"] = sample.output_len
        return orjson.dumps(content | self.extra_body)


async def send(session: aiohttp.ClientSession, target: Target, sample: Sample) -> Outcome:
    """Sends a request and follows its answer to the end; what goes wrong is told in the outcome."""
    body = target.body(sample)
    outcome = Outcome(sample.prompt_len, time.perf_counter())
    try:
        async with session.post(target.url, data=body, headers=target.headers) as answer:
            if answer.status != 200:
                outcome.error = f"{answer.status}: {(await answer.text())[:_MAX_ERROR_CHARS]}"
                return outcome
            await _follow(answer.content, outcome)
    except (aiohttp.ClientError, OSError, ValueError) as exc:
        outcome.error = f"{type(exc).__name__}: {exc}"
        return outcome
    if not outcome.error and not outcome.ttft:
        outcome.error = "The server answered without a token."
    return outcome


async def _follow(content: aiohttp.StreamReader, outcome: Outcome) -> None:
    rest = b""
    last = 0.0
    texts: list[str] = []
    async for piece in content.iter_any():
        now = time.perf_counter() - outcome.started
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: {"):
                continue
            chunk = orjson.loads(event[6:])
            if "error" in chunk:
                outcome.error = str(chunk["error"])[:_MAX_ERROR_CHARS]
                return
            if chunk.get("usage"):
                outcome.output_len = chunk["usage"].get("completion_tokens")
            if chunk.get("choices"):
                outcome.latency = now
            text = _text(chunk)
            if not text:
                continue
            texts.append(text)
            if outcome.ttft:
                outcome.itl.append(now - last)
            else:
                outcome.ttft = now
            last = now
    outcome.text = "".join(texts)


def _text(chunk: dict[str, Any]) -> str:
    choices = chunk.get("choices")
    if not choices:
        return ""
    delta = choices[0].get("delta")
    if delta is None:
        return choices[0].get("text") or ""
    return (delta.get("content") or "") + (delta.get("reasoning") or "")

"""Streamed chat requests in a closed loop, and when their tokens came: what the benchmarks of servers share."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp

WORDS = (
    "the a one our his each some old new long small green early quiet river house market garden road letter clock "
    "table winter summer morning paper water stone school town bread music number story question answer reason plan "
    "was is has will can may found made took gave kept left held told sent brought near under over after before with "
    "from and but then when where because until between"
)


GREEDY: Mapping[str, Any] = {"temperature": 0}
SAMPLED: Mapping[str, Any] = {"temperature": 1.0, "top_p": 0.95}
"""What many clients send."""


class BenchmarkError(RuntimeError):
    """Something the user should read as one line."""


class Prompt(NamedTuple):
    """The messages of one chat."""

    user: str
    system: str | None = None


@dataclass(frozen=True)
class Sample:
    """One request: seconds from sending it, and the server's token counts."""

    first_token_s: float
    last_token_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None

    @property
    def per_token_s(self) -> float:
        """Of the tokens after the first one, on average."""
        return (self.last_token_s - self.first_token_s) / max(1, self.output_tokens - 1)


class ChatClient:
    """Talks to one server. Lengths and texts by tokens need vLLM's `/tokenize`; all else is OpenAI's API.

    Args:
        url: Base address, with or without `/v1`.
        model: Name of the model, or None for the first one that the server lists.
        output_tokens: Length of an answer.

    Attributes:
        max_model_len: Longest prompt and answer together; None if the server does not say.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str | None, output_tokens: int) -> None:
        self.session = session
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model or ""
        self.output_tokens = output_tokens
        self.max_model_len: int | None = None

    async def connect(self) -> None:
        """Learns the model's name and its longest context."""
        cards = {str(card["id"]): card for card in (await self._json("GET", "/v1/models"))["data"]}
        self.model = self.model or next(iter(cards))
        self.max_model_len = cards.get(self.model, {}).get("max_model_len")

    async def text(self, num_tokens: int, seed: str) -> str:
        """English words that make `num_tokens` tokens; another seed differs from the first word on."""
        draw = random.Random(seed)
        # A word is at least one token, so this many words are enough.
        words = f"{draw.randrange(10**6)} notes: " + " ".join(draw.choices(WORDS.split(), k=num_tokens))
        body = {"model": self.model, "prompt": words, "add_special_tokens": False}
        tokens = (await self._json("POST", "/tokenize", body))["tokens"][:num_tokens]
        return str((await self._json("POST", "/detokenize", {"model": self.model, "tokens": tokens}))["prompt"])

    async def kv_cache_tokens(self) -> int | None:
        """Tokens that the server's KV cache holds, from `vllm:cache_config_info`; None if it does not say."""
        async with self.session.get(f"{self.url}/metrics") as response:
            metrics = await response.text() if response.status == 200 else ""
        info = re.search(r"^vllm:cache_config_info\{(.*)\}", metrics, re.MULTILINE)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', info.group(1))) if info else {}
        try:
            return int(labels["num_gpu_blocks"]) * int(labels["block_size"])
        except (KeyError, ValueError):
            return None

    async def version(self) -> str:
        async with self.session.get(f"{self.url}/version") as response:
            return str((await response.json())["version"]) if response.status == 200 else "unknown"

    async def chat(
        self, prompt: Prompt, output_tokens: int | None = None, sampling: Mapping[str, Any] = GREEDY
    ) -> Sample:
        """One streamed chat request of exactly `output_tokens` output tokens (default: the run's).

        Raises:
            BenchmarkError: The server refused it, failed, or gave another number of tokens.
        """
        expected = output_tokens or self.output_tokens
        messages = [] if prompt.system is None else [{"role": "system", "content": prompt.system}]
        body = {
            "model": self.model,
            "messages": [*messages, {"role": "user", "content": prompt.user}],
            "max_tokens": expected,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **sampling,
        }
        first = last = None
        usage: dict[str, Any] | None = None
        start = time.perf_counter()
        async with self.session.post(f"{self.url}/v1/chat/completions", json=body) as response:
            if response.status != 200:
                raise BenchmarkError(f"/v1/chat/completions: {response.status} {(await response.text())[:500]}")
            async for line in response.content:
                if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    raise BenchmarkError(f"/v1/chat/completions: {event['error']}")
                usage = event.get("usage") or usage
                if any(choice["delta"].get("content") for choice in event["choices"]):
                    last = time.perf_counter()
                    first = first or last
        if first is None or last is None or usage is None:
            raise BenchmarkError("a streamed answer ended without any text or without usage")
        sample = Sample(
            first_token_s=first - start,
            last_token_s=last - start,
            prompt_tokens=int(usage["prompt_tokens"]),
            output_tokens=int(usage["completion_tokens"]),
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        )
        if sample.output_tokens != expected:
            raise BenchmarkError(f"an answer has {sample.output_tokens} tokens instead of {expected}")
        return sample

    async def chats(
        self,
        prompts: Sequence[Prompt],
        concurrency: int,
        output_tokens: int | None = None,
        sampling: Mapping[str, Any] = GREEDY,
    ) -> tuple[list[Sample], float]:
        """A request for each prompt, `concurrency` at a time; returns the samples, in the order of the prompts, and the
        seconds they took."""
        waiting = iter(enumerate(prompts))
        samples: dict[int, Sample] = {}

        async def worker() -> None:
            for index, prompt in waiting:
                samples[index] = await self.chat(prompt, output_tokens, sampling)

        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
        return [samples[index] for index in range(len(prompts))], time.perf_counter() - start

    async def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        async with self.session.request(method, self.url + path, json=body) as response:
            if response.status != 200:
                raise BenchmarkError(f"{path}: {response.status} {(await response.text())[:500]}")
            answer: dict[str, Any] = await response.json()
            return answer


def client_session(api_key: str | None, timeout: float) -> aiohttp.ClientSession:
    """Connections as many as the load has; `timeout` in seconds, of a whole request."""
    return aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=aiohttp.ClientTimeout(total=timeout),
        connector=aiohttp.TCPConnector(limit=0),
    )


def first_error(error: BaseException) -> BaseException:
    """The first of a group of errors that is none itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of some values, interpolated linearly."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * q
    low = math.floor(position)
    high = math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def markdown_table(lines: Sequence[Sequence[object]], num_text_columns: int = 1) -> str:
    """A Markdown table: the first line is the head; columns after the first ones hold numbers, aligned to the right."""
    head, *rows = lines
    rule = [*["---"] * num_text_columns, *["---:"] * (len(head) - num_text_columns)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, rule, *rows))


def say(message: str) -> None:
    """Progress, apart from the result on standard output."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


def positive_int(text: str) -> int:
    """A number of a command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value

#!/usr/bin/env python3
"""Time to first token and output tokens/s with and without a system prompt: cold, warm, after churn, after idle.

Starts a server of its own, or measures the one at --base-url (any server with vLLM's HTTP API). All figures and ratios
of a table come from one run. Phases, each at every --concurrency:

  no system prompt   requests with a user message only; what the ratios are relative to
  cold               requests that arrive together, the first ever to bring a new system prompt of S tokens
  warm               the same system prompt again, other user messages
  after churn        again, after other requests have filled the KV cache
  after idle         again, after --idle seconds without a request (left out when that is 0)

First token: from before the request is sent until the first piece of text arrives. Output tokens/s: of the whole phase.
Cached: the fewest prompt tokens that any request of the phase did not have to compute, as the server reports it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import platform
import random
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from server_process import ServerProcess

WORDS = (
    "the a one our his each some old new long small green early quiet river house market garden road letter clock "
    "table winter summer morning paper water stone school town bread music number story question answer reason plan "
    "was is has will can may found made took gave kept left held told sent brought near under over after before with "
    "from and but then when where because until between"
)

FLOOD_CONCURRENCY = 8
FLOOD_OVERSHOOT = 1.2  # Of the cache's size, so that least recently used blocks go for certain.


class BenchmarkError(RuntimeError):
    """Something the user should read as one line."""


@dataclass(frozen=True)
class Sample:
    """One request: seconds from sending it, and the server's token counts."""

    first_token_s: float
    last_token_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None


@dataclass(frozen=True)
class Row:
    """One line of the table; ratios are to `no system prompt` at the same concurrency."""

    phase: str
    system_tokens: int
    concurrency: int
    requests: int
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_ratio: float
    per_token_p50_ms: float
    output_tokens_per_s: float
    output_ratio: float
    prompt_tokens: int
    cached_tokens: int | None


class Client:
    """Talks to one server.

    Args:
        url: Base address without `/v1`.
        model: Name of the model, or None for the first one that the server lists.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str | None, output_tokens: int) -> None:
        self.session = session
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model or ""
        self.output_tokens = output_tokens
        self.max_model_len = 0

    async def connect(self) -> None:
        """Learns the model's name and its longest context."""
        if not self.model:
            self.model = str((await self._json("GET", "/v1/models"))["data"][0]["id"])
        self.max_model_len = int((await self._tokenize("hello"))["max_model_len"])

    async def text(self, num_tokens: int, seed: str) -> str:
        """English words that make `num_tokens` tokens; another seed differs from the first word on."""
        draw = random.Random(seed)
        # A word is at least one token, so this many words are enough.
        words = f"{draw.randrange(10**6)} notes: " + " ".join(draw.choices(WORDS.split(), k=num_tokens))
        tokens = (await self._tokenize(words))["tokens"][:num_tokens]
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

    async def chat(self, user: str, system: str | None = None, output_tokens: int | None = None) -> Sample:
        """One streamed, greedy chat request of exactly `output_tokens` output tokens (default: the run's)."""
        messages = [{"role": "system", "content": system}] if system is not None else []
        body = {
            "model": self.model,
            "messages": [*messages, {"role": "user", "content": user}],
            "max_tokens": output_tokens or self.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
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
        return Sample(
            first_token_s=first - start,
            last_token_s=last - start,
            prompt_tokens=int(usage["prompt_tokens"]),
            output_tokens=int(usage["completion_tokens"]),
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        )

    async def chats(
        self, users: Sequence[str], concurrency: int, system: str | None = None, output_tokens: int | None = None
    ) -> tuple[list[Sample], float]:
        """One request for each user message, `concurrency` at a time; returns the samples and the seconds they took."""
        waiting = iter(users)
        samples: list[Sample] = []

        async def worker() -> None:
            for user in waiting:
                samples.append(await self.chat(user, system, output_tokens))

        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())
        return samples, time.perf_counter() - start

    async def _tokenize(self, text: str) -> dict[str, Any]:
        return await self._json("POST", "/tokenize", {"model": self.model, "prompt": text, "add_special_tokens": False})

    async def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        async with self.session.request(method, self.url + path, json=body) as response:
            if response.status != 200:
                raise BenchmarkError(f"{path}: {response.status} {(await response.text())[:500]}")
            answer: dict[str, Any] = await response.json()
            return answer


class Benchmark:
    """Runs the phases and keeps the rows."""

    def __init__(self, client: Client, args: argparse.Namespace) -> None:
        self.client = client
        self.args = args
        self.rows: list[Row] = []
        self.baseline: dict[int, Row] = {}
        self._next_user = itertools.count()

    async def run(self) -> None:
        levels: list[int] = self.args.concurrency
        say("warm-up")
        await self.client.chats(await self._users(2), 2)
        for concurrency in levels:
            await self._phase("no system prompt", 0, concurrency, None, self._requests(concurrency))
        for size in self.args.system_tokens:
            systems = {c: await self.client.text(size, f"{self.args.seed} system {size} {c}") for c in levels}
            for concurrency, system in systems.items():
                await self._phase("cold", size, concurrency, system, concurrency)
                await self._phase("warm", size, concurrency, system, self._requests(concurrency))
            await self._flood()
            for concurrency, system in systems.items():
                await self._phase("after churn", size, concurrency, system, self._requests(concurrency))
            if self.args.idle > 0:
                say(f"idle for {self.args.idle:g} s")
                await asyncio.sleep(self.args.idle)
                for concurrency, system in systems.items():
                    await self._phase("after idle", size, concurrency, system, self._requests(concurrency))

    async def _phase(self, name: str, size: int, concurrency: int, system: str | None, requests: int) -> None:
        say(f"{name}, S={size}, {requests} requests, {concurrency} at a time")
        samples, seconds = await self.client.chats(await self._users(requests), concurrency, system)
        ttft = [sample.first_token_s * 1e3 for sample in samples]
        rate = sum(sample.output_tokens for sample in samples) / seconds
        base = self.baseline.get(concurrency)
        cached = [sample.cached_tokens for sample in samples if sample.cached_tokens is not None]
        row = Row(
            phase=name,
            system_tokens=size,
            concurrency=concurrency,
            requests=requests,
            ttft_p50_ms=quantile(ttft, 0.5),
            ttft_p90_ms=quantile(ttft, 0.9),
            ttft_ratio=quantile(ttft, 0.5) / base.ttft_p50_ms if base else 1.0,
            per_token_p50_ms=statistics.median(
                (sample.last_token_s - sample.first_token_s) * 1e3 / max(1, sample.output_tokens - 1)
                for sample in samples
            ),
            output_tokens_per_s=rate,
            output_ratio=rate / base.output_tokens_per_s if base else 1.0,
            prompt_tokens=max(sample.prompt_tokens for sample in samples),
            cached_tokens=min(cached, default=None),
        )
        self.rows.append(row)
        if system is None:
            self.baseline[concurrency] = row

    async def _flood(self) -> None:
        """Other people's requests, as many tokens as the KV cache holds and some more."""
        tokens = self.args.churn_tokens
        if tokens is None:
            capacity = await self.client.kv_cache_tokens()
            if capacity is None:
                raise BenchmarkError("/metrics does not tell the size of the KV cache; give --churn-tokens")
            tokens = math.ceil(capacity * FLOOD_OVERSHOOT)
        # The chat template adds some tokens of its own, and one is generated.
        length = max(1, min(self.args.churn_prompt_tokens, self.client.max_model_len - 128))
        say(f"churn: {math.ceil(tokens / length)} other requests of {length} tokens")
        users = [
            await self.client.text(length, f"{self.args.seed} churn {next(self._next_user)}")
            for _ in range(math.ceil(tokens / length))
        ]
        await self.client.chats(users, FLOOD_CONCURRENCY, output_tokens=1)

    async def _users(self, count: int) -> list[str]:
        """User messages that no request of this run had before."""
        seeds = [f"{self.args.seed} user {next(self._next_user)}" for _ in range(count)]
        return [await self.client.text(self.args.user_tokens, seed) for seed in seeds]

    def _requests(self, concurrency: int) -> int:
        return max(int(self.args.requests), 2 * concurrency)


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of some values, interpolated linearly."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * q
    low = math.floor(position)
    high = math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    head = ["phase", "S", "at a time", "requests", "first token p50 ms", "p90 ms", "× none", "per token ms"]
    head += ["output tokens/s", "× none", "prompt tokens", "cached"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        cells = [row.phase, row.system_tokens, row.concurrency, row.requests, f"{row.ttft_p50_ms:.0f}"]
        cells += [f"{row.ttft_p90_ms:.0f}", f"{row.ttft_ratio:.2f}", f"{row.per_token_p50_ms:.1f}"]
        cells += [f"{row.output_tokens_per_s:.1f}", f"{row.output_ratio:.2f}", row.prompt_tokens]
        cells += ["–" if row.cached_tokens is None else row.cached_tokens]
        lines.append([str(cell) for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def say(message: str) -> None:
    """Progress, apart from the result on standard output."""
    print(f"[{time.strftime('%H:%M:%S')}] {message}", file=sys.stderr, flush=True)


async def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark against a server and returns the report that is printed and written."""
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    timeout = aiohttp.ClientTimeout(total=args.timeout)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:
        client = Client(session, url, args.served_model_name, args.output_tokens)
        await client.connect()
        longest = max(args.system_tokens) + args.user_tokens + args.output_tokens
        if longest >= client.max_model_len:
            raise BenchmarkError(
                f"a system prompt of {max(args.system_tokens)} tokens, the user message and the output make {longest} "
                f"tokens, but the server's max_model_len is {client.max_model_len}"
            )
        benchmark = Benchmark(client, args)
        await benchmark.run()
        return {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": client.model,
            "dtype": args.dtype if args.base_url is None else "as served",
            "server": f"{await client.version()} at {args.base_url or 'localhost, started by this script'}",
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "python": platform.python_version(),
            "kv_cache_tokens": await client.kv_cache_tokens(),
            "rows": [asdict(row) for row in benchmark.rows],
        }


def show(report: dict[str, Any]) -> str:
    """The report as text: what was run, then the table."""
    rows = [Row(**row) for row in report["rows"]]
    lines = [f"{name.replace('_', ' ')}: {value}" for name, value in report.items() if name != "rows"]
    return "\n".join([*lines, "", table(rows)])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", help="measure this running server, e.g. http://localhost:8000")
    server.add_argument("--model", help="model of the server to start (default: the server's own default)")
    server.add_argument("--dtype", default="auto", help="dtype of the server to start (default: auto)")
    server.add_argument("--server-args", default="", help="more flags for the server to start, in one string")
    server.add_argument("--start-timeout", type=float, default=600, help="seconds it may take to start (default: 600)")
    server.add_argument("--served-model-name", help="model to ask for (default: the first one that the server lists)")
    server.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"), help="default: $VLLM_API_KEY")
    work = parser.add_argument_group("workload")
    number = positive_int
    work.add_argument("--system-tokens", type=number, nargs="+", default=[3000], help="sizes S (default: 3000)")
    work.add_argument("--user-tokens", type=number, default=60, help="tokens of a user message (default: 60)")
    work.add_argument("--output-tokens", type=number, default=64, help="tokens of an answer (default: 64)")
    work.add_argument("--concurrency", type=number, nargs="+", default=[1, 8], help="requests at a time (default: 1 8)")
    work.add_argument(
        "--requests", type=number, default=8, help="requests of a phase; at least twice the concurrency (default: 8)"
    )
    work.add_argument("--churn-tokens", type=number, help="tokens of the flood (default: 1.2 × the server's KV cache)")
    work.add_argument(
        "--churn-prompt-tokens", type=number, default=1000, help="tokens of one request of the flood (default: 1000)"
    )
    work.add_argument("--idle", type=float, default=0, help="seconds of silence before `after idle` (default: 0)")
    work.add_argument("--seed", default="0", help="same seed, same prompts (default: 0)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a request may take (default: 600)")
    parser.add_argument("--out", type=Path, help="write the report to this file as JSON")
    args = parser.parse_args()
    if args.base_url and (args.model or args.server_args or args.dtype != "auto"):
        parser.error("--model, --dtype and --server-args are for a server that this script starts; drop --base-url")
    return args


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def main() -> int:
    args = parse_args()
    server = None
    try:
        url = args.base_url
        if url is None:
            flags = ["--dtype", args.dtype, *shlex.split(args.server_args)]
            flags += ["--model", args.model] if args.model else []
            env = {"VLLM_API_KEY": args.api_key} if args.api_key else {}
            log = Path(tempfile.mkdtemp(prefix="benchmark-")) / "server.log"
            say(f"starting a server, log in {log}")
            server = ServerProcess(flags, log, env, args.api_key)
            server.wait_until_healthy(args.start_timeout)
            url = server.url
        report = asyncio.run(measure(url, args))
    except* (BenchmarkError, RuntimeError, aiohttp.ClientError, TimeoutError) as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        print(f"error: {first or type(first).__name__}", file=sys.stderr)
        report = None
    finally:
        if server is not None:
            server.stop()
    if report is None:
        return 1
    print(show(report))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

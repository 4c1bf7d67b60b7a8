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
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from chat_load import (
    BenchmarkError,
    ChatClient,
    Prompt,
    client_session,
    first_error,
    markdown_table,
    positive_int,
    quantile,
    say,
)
from machine_facts import cpu_model, usable_cores
from server_process import ServerProcess

FLOOD_CONCURRENCY = 8
FLOOD_OVERSHOOT = 1.2  # Of the cache's size, so that least recently used blocks go for certain.


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


class Benchmark:
    """Runs the phases and keeps the rows."""

    def __init__(self, client: ChatClient, args: argparse.Namespace) -> None:
        self.client = client
        self.args = args
        self.rows: list[Row] = []
        self.baseline: dict[int, Row] = {}
        self._next_user = itertools.count()

    async def run(self) -> None:
        levels: list[int] = self.args.concurrency
        say("warm-up")
        await self.client.chats(await self._prompts(2), 2)
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
        samples, seconds = await self.client.chats(await self._prompts(requests, system), concurrency)
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
            per_token_p50_ms=statistics.median(sample.per_token_s * 1e3 for sample in samples),
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
        limit = self.client.max_model_len
        length = max(1, min(self.args.churn_prompt_tokens, limit - 128)) if limit else self.args.churn_prompt_tokens
        say(f"churn: {math.ceil(tokens / length)} other requests of {length} tokens")
        prompts = [
            Prompt(await self.client.text(length, f"{self.args.seed} churn {next(self._next_user)}"))
            for _ in range(math.ceil(tokens / length))
        ]
        await self.client.chats(prompts, FLOOD_CONCURRENCY, output_tokens=1)

    async def _prompts(self, count: int, system: str | None = None) -> list[Prompt]:
        """With user messages that no request of this run had before."""
        seeds = [f"{self.args.seed} user {next(self._next_user)}" for _ in range(count)]
        return [Prompt(await self.client.text(self.args.user_tokens, seed), system) for seed in seeds]

    def _requests(self, concurrency: int) -> int:
        return max(int(self.args.requests), 2 * concurrency)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    head: list[object] = [
        "phase",
        "S",
        "at a time",
        "requests",
        "first token p50 ms",
        "p90 ms",
        "× none",
        "per token ms",
    ]
    head += ["output tokens/s", "× none", "prompt tokens", "cached"]
    lines = [head]
    for row in rows:
        cells: list[object] = [row.phase, row.system_tokens, row.concurrency, row.requests, f"{row.ttft_p50_ms:.0f}"]
        cells += [f"{row.ttft_p90_ms:.0f}", f"{row.ttft_ratio:.2f}", f"{row.per_token_p50_ms:.1f}"]
        cells += [f"{row.output_tokens_per_s:.1f}", f"{row.output_ratio:.2f}", row.prompt_tokens]
        cells += ["–" if row.cached_tokens is None else row.cached_tokens]
        lines.append(cells)
    return markdown_table(lines)


async def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark against a server and returns the report that is printed and written."""
    async with client_session(args.api_key, args.timeout) as session:
        client = ChatClient(session, url, args.served_model_name, args.output_tokens)
        await client.connect()
        longest = max(args.system_tokens) + args.user_tokens + args.output_tokens
        if client.max_model_len and longest >= client.max_model_len:
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
            "cores": usable_cores(),
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
        first = first_error(group)
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

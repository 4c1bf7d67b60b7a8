#!/usr/bin/env python3
"""What it costs to bring a system prompt back: from disk after a restart, and from the host while others are served.

Starts servers of its own, of the default model unless --model names another. Two tables, each from one run:

  restart   first token of a request behind a prompt of S tokens: computed; again; from the snapshot of an automatic
            pin, by the first request after a restart; from that of an operator's pin, likewise. And how long each
            server took until it was healthy: an operator's prompt is loaded before that.
  host      gaps between the tokens of streams that run already: alone; while a herd of requests comes in, all of them
            at once and from the same processors; while it waits for its prompt, which must come back from the host; and
            until it is served. A herd whose prompt is on the device waits for nothing: it is there to compare with.

    python benchmarks/benchmark_tiers.py                          # S = 8,000, 50 requests wait for one load
    python benchmarks/benchmark_tiers.py --system-tokens 2000 --only host
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
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
from machine_facts import machine
from server_process import ServerProcess

_USER = "In one sentence, what is this text about?"
_SAVE_TIMEOUT_S = 300
_SETTLE_S = 2.0  # What was computed is copied to the host meanwhile.
_ARRIVAL_S = 0.25  # Reading so many long requests is work of its own, whatever they wait for.


@dataclass(frozen=True)
class Restart:
    """A first token of the restart table; the ratio is to the computed one."""

    case: str
    healthy_s: float
    first_token_ms: float
    ratio: float
    cached_tokens: int | None


@dataclass(frozen=True)
class Gaps:
    """Gaps between the tokens of the running streams while something happens; the ratio is of p99 to `alone`."""

    case: str
    tokens: int
    p50_ms: float
    p99_ms: float
    ratio: float
    herd_first_token_ms: float | None


class Servers:
    """One server at a time, with the flags of the command line and those of a case."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.folder = folder
        self.flags = ["--dtype", args.dtype, "--max-model-len", str(args.max_model_len), *shlex.split(args.server_args)]
        self.flags += ["--model", args.model] if args.model else []
        self.timeout = args.start_timeout
        self.healthy_s = 0.0
        self._running: ServerProcess | None = None

    def start(self, *flags: str) -> str:
        """Stops the one that runs; returns the address of the next one."""
        self.stop()
        begun = time.perf_counter()
        self._running = ServerProcess([*self.flags, *flags], self.folder / "server.log")
        self._running.wait_until_healthy(self.timeout)
        self.healthy_s = time.perf_counter() - begun
        return self._running.url

    def stop(self) -> None:
        if self._running is not None:
            self._running.stop()
            self._running = None


async def connect(session: aiohttp.ClientSession, url: str) -> ChatClient:
    client = ChatClient(session, url, None, 1)
    await client.connect()
    return client


async def measure_restart(servers: Servers, args: argparse.Namespace) -> list[Restart]:
    flags = ("--system-prompt-cache-dir", str(servers.folder / "snapshots"))
    rows: list[Restart] = []

    async def first(client: ChatClient, case: str, system: str) -> None:
        sample = await client.chat(Prompt(_USER, system))
        milliseconds = sample.first_token_s * 1e3
        ratio = milliseconds / rows[0].first_token_ms if rows else 1.0
        rows.append(Restart(case, servers.healthy_s, milliseconds, ratio, sample.cached_tokens))
        say(f"{case}: {milliseconds:.0f} ms")

    async with client_session(None, args.timeout) as session:
        url = servers.start(*flags)
        client = await connect(session, url)
        system = await client.text(args.system_tokens, "restart")
        # The first request of all pays for more than its prompt.
        await client.chat(Prompt("Hello", await client.text(64, "warm up")), 8)
        await first(client, "computed", system)
        await first(client, "again, same server", system)
        await until_saved(session, url, 1)
        url = servers.start(*flags)
        await first(await connect(session, url), "restart, automatic pin", system)
        await pin(session, url, system)
        url = servers.start(*flags)
        await first(await connect(session, url), "restart, operator's pin", system)
    servers.stop()
    return rows


async def pin(session: aiohttp.ClientSession, url: str, system: str) -> None:
    body = {"messages": [{"role": "system", "content": system}]}
    async with session.post(f"{url}/v1/system_prompts", json=body) as response:
        if response.status != 200:
            raise BenchmarkError(f"/v1/system_prompts: {response.status} {(await response.text())[:500]}")
    await until_saved(session, url, 1, "update")


async def until_saved(session: aiohttp.ClientSession, url: str, count: int, op: str = "save") -> None:
    """Waits until snapshots are written: that happens in the background."""
    deadline = time.monotonic() + _SAVE_TIMEOUT_S
    while time.monotonic() < deadline:
        async with session.get(f"{url}/metrics") as response:
            lines = (await response.text()).splitlines()
        saved = [x for x in lines if x.startswith("vllm:system_prompt_snapshot_total") and f'op="{op}"' in x]
        if sum(float(line.rpartition(" ")[2]) for line in saved) >= count:
            return
        await asyncio.sleep(0.2)
    raise BenchmarkError(f"no snapshot was written within {_SAVE_TIMEOUT_S} s")


async def measure_host(servers: Servers, args: argparse.Namespace) -> list[Gaps]:
    # A process of its own sends the herds: writing 50 long requests would else hold up the clocks of the streams.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as sender:
        sender.submit(int)  # Starts it, before anything is timed.
        return await measure_herds(servers, args, sender)


async def measure_herds(servers: Servers, args: argparse.Namespace, sender: ProcessPoolExecutor) -> list[Gaps]:
    # Room for one of the prompts and what the chat template puts around it.
    budget = args.system_tokens + 256
    host = ("--system-prompt-cache-tokens", str(budget), "--system-prompt-host-cache-gib", str(args.host_gib))
    loop = asyncio.get_running_loop()
    async with client_session(None, args.timeout) as session:
        url = servers.start(*host, "--max-num-seqs", str(args.streams + args.herd + 2))
        client = await connect(session, url)
        systems = [await client.text(args.system_tokens, f"host {i}") for i in range(2)]
        for system in (*systems, systems[0]):
            await client.chat(Prompt(_USER, system))
            await asyncio.sleep(_SETTLE_S)
        herd = [[Prompt(f"Question {i}", system) for i in range(args.herd)] for system in systems]
        streams = [asyncio.create_task(token_times(client, i, args.stream_tokens)) for i in range(args.streams)]
        await asyncio.sleep(args.seconds_alone)
        now = time.perf_counter()
        spans: dict[str, list[Span]] = {"alone": [Span(now - args.seconds_alone / 2, now)]}
        # The first herd finds its prompt on the device; each later one sends the other prompt there.
        for number in range(1 + args.loads):
            begun, firsts = await loop.run_in_executor(sender, send_herd, url, herd[number % 2], args.timeout)
            place = "host" if number else "device"
            arrived, first = begun + _ARRIVAL_S, begun + min(firsts)
            if number:
                spans.setdefault("herd comes in", []).append(Span(begun, arrived, firsts))
                # With the first one's first token comes a step that computes much of what the herd has brought.
                spans.setdefault("herd waits for the host", []).append(Span(arrived, first, firsts, before_batch=True))
            whole = spans.setdefault(f"herd until its end, prompt on the {place}", [])
            whole.append(Span(begun, time.perf_counter(), firsts))
            await asyncio.sleep(_SETTLE_S)
        times = await asyncio.gather(*streams)
    servers.stop()
    rows: list[Gaps] = []
    for case, parts in spans.items():
        gaps = [gap for span in parts for stream in times for gap in span.gaps(stream, rows[0].p50_ms if rows else 0)]
        if not all(any(span.gaps(stream, 0) for stream in times) for span in parts):
            raise BenchmarkError("the streams ended before the herds were served; raise --stream-tokens")
        p99 = quantile(gaps, 0.99)
        seconds = [second for span in parts for second in span.first_tokens_s]
        first_ms = quantile(seconds, 0.5) * 1e3 if seconds else None
        ratio = p99 / rows[0].p99_ms if rows else 1.0
        rows.append(Gaps(case, len(gaps), quantile(gaps, 0.5), p99, ratio, first_ms))
    return rows


def send_herd(url: str, prompts: list[Prompt], timeout: float) -> tuple[float, list[float]]:
    """Sends chats all at once. Returns when, and the seconds until the first token of each."""

    async def send() -> tuple[float, list[float]]:
        async with client_session(None, timeout) as session:
            client = await connect(session, url)
            begun = time.perf_counter()
            samples, _ = await client.chats(prompts, len(prompts))
            return begun, [sample.first_token_s for sample in samples]

    return asyncio.run(send())


@dataclass(frozen=True)
class Span:
    """A time of the run.

    Attributes:
        first_tokens_s: Of the requests that came at its beginning.
        before_batch: It ends a step before its `end`.
    """

    begin: float
    end: float
    first_tokens_s: Sequence[float] = ()
    before_batch: bool = False

    def gaps(self, times: Sequence[float], step_ms: float) -> list[float]:
        """Milliseconds between the tokens of a stream that came in this time."""
        end = self.end - step_ms / 1e3 if self.before_batch else self.end
        return [(b - a) * 1e3 for a, b in pairwise(times) if self.begin <= b <= end]


async def token_times(client: ChatClient, index: int, count: int) -> list[float]:
    """When the tokens of a stream came."""
    body = {
        "model": client.model,
        "messages": [{"role": "user", "content": f"Tell me story number {index}."}],
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    times: list[float] = []
    async with client.session.post(f"{client.url}/v1/chat/completions", json=body) as response:
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise BenchmarkError(f"/v1/chat/completions: {event['error']}")
                times.append(time.perf_counter())
    return times


def show(report: dict[str, Any]) -> str:
    """The report as text: what was run, then the tables."""
    parts = ["\n".join(f"{name}: {value}" for name, value in report.items() if name not in ("restart", "host"))]
    if report["restart"]:
        head: list[object] = ["first token", "healthy after s", "ms", "× computed", "cached"]
        rows = [Restart(**row) for row in report["restart"]]
        body = [
            [r.case, f"{r.healthy_s:.1f}", f"{r.first_token_ms:.0f}", f"{r.ratio:.3f}", r.cached_tokens] for r in rows
        ]
        parts.append(markdown_table([head, *body]))
    if report["host"]:
        head = ["gaps of the streams", "tokens", "p50 ms", "p99 ms", "p99 × alone", "herd's first token ms"]
        lines: list[list[object]] = [head]
        for gaps in (Gaps(**row) for row in report["host"]):
            first = "–" if gaps.herd_first_token_ms is None else f"{gaps.herd_first_token_ms:.0f}"
            cells: list[object] = [gaps.case, gaps.tokens, f"{gaps.p50_ms:.1f}", f"{gaps.p99_ms:.1f}"]
            lines.append([*cells, f"{gaps.ratio:.2f}", first])
        parts.append(markdown_table(lines))
    return "\n\n".join(parts)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("restart", "host"), help="one of the tables (default: both)")
    parser.add_argument("--model", help="model of the servers (default: the server's own default)")
    parser.add_argument("--dtype", default="auto", help="dtype of the servers (default: %(default)s)")
    parser.add_argument("--max-model-len", type=positive_int, default=8192, help="default: %(default)s")
    parser.add_argument("--server-args", default="", help="more flags for the servers, in one string")
    parser.add_argument("--system-tokens", type=positive_int, default=8000, help="S (default: %(default)s)")
    parser.add_argument("--herd", type=positive_int, default=50, help="requests that wait (default: %(default)s)")
    parser.add_argument("--loads", type=positive_int, default=3, help="herds that wait (default: %(default)s)")
    parser.add_argument("--streams", type=positive_int, default=4, help="streams that run (default: %(default)s)")
    parser.add_argument(
        "--stream-tokens", type=positive_int, default=2000, help="tokens of each (default: %(default)s)"
    )
    parser.add_argument("--seconds-alone", type=float, default=8, help="before the herds (default: %(default)s)")
    parser.add_argument("--host-gib", type=float, default=2, help="size of the host tier (default: %(default)s)")
    parser.add_argument("--start-timeout", type=float, default=600, help="seconds a start may take (default: 600)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a request may take (default: 1800)")
    parser.add_argument("--out", type=Path, help="write the report to this file as JSON")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        servers = Servers(args, Path(folder))
        report: dict[str, Any] | None = machine()
        restart: list[Restart] = []
        host: list[Gaps] = []
        try:
            restart = [] if args.only == "host" else asyncio.run(measure_restart(servers, args))
            host = [] if args.only == "restart" else asyncio.run(measure_host(servers, args))
        except* (BenchmarkError, RuntimeError, aiohttp.ClientError, TimeoutError) as group:
            first = first_error(group)
            print(f"error: {first or type(first).__name__}", file=sys.stderr)
            report = None
        finally:
            servers.stop()
    if report is None:
        return 1
    report |= {"command": shlex.join(["python", *sys.argv]), "system_tokens": args.system_tokens}
    report |= {"restart": [asdict(row) for row in restart], "host": [asdict(row) for row in host]}
    print(show(report))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

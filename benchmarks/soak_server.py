#!/usr/bin/env python3
"""Hard use of a server over loopback, for a bounded time: does it stay responsive, and does its memory stay flat?

All at once, again and again until the time is over: clients that read their streams slowly, connections that send half
a request and stay, bodies of 10 MB, bursts of connections, clients that leave in the middle. Meanwhile an ordinary
request is made every second; its times, and the memory of the server's processes, are the result.

    python benchmarks/soak_server.py --seconds 600                    # the default model, started here
    python benchmarks/soak_server.py --seconds 60 --slow-readers 64 --connections 500
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from server_process import ServerProcess

_BIG_BODY = 10 * 2**20
_PROBE_TOKENS = 4
_STREAM_TOKENS = 64
_SLOW_READ_BYTES = 256
_SLOW_PAUSE_S = 0.5
_HELD_S = 15.0
# The first part of the run is not compared: pools and caches fill then.
_WARM_UP_SHARE = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="default: %(default)s")
    parser.add_argument("--slow-readers", type=int, default=256, help="default: %(default)s")
    parser.add_argument(
        "--half-open", type=int, default=200, help="half-sent requests that stay (default: %(default)s)"
    )
    parser.add_argument("--connections", type=int, default=2000, help="connections of a burst (default: %(default)s)")
    parser.add_argument("--big-bodies", type=int, default=2, help="10 MB bodies at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the result to this file as JSON")
    parser.add_argument("server_args", nargs="*", help="flags of the server, after --")
    args = parser.parse_args()
    allow_many_files(args.connections + args.slow_readers + args.half_open + 200)
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(args.server_args, Path(folder) / "log")
        try:
            server.wait_until_healthy(300)
            result = asyncio.run(Soak(args, server).run())
        except Exception:
            print(server.log_tail(), file=sys.stderr)
            raise
        finally:
            server.stop()
        result["tracebacks_in_log"] = server.log_path.read_text(errors="replace").count("Traceback")
    for name, value in result.items():
        print(f"{name:28s} {value:12.1f}" if isinstance(value, float) else f"{name:28s} {value}")
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if result["failed_probes"] == 0 and result["tracebacks_in_log"] == 0 else 1)


def allow_many_files(count: int) -> None:
    """The server, a child, inherits the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 2 * count if hard == resource.RLIM_INFINITY else min(hard, 2 * count)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, 1024), hard))


class Soak:
    """The loads, and what is measured while they go on."""

    def __init__(self, args: argparse.Namespace, server: ServerProcess) -> None:
        self.args = args
        self.server = server
        self.ends = time.monotonic() + args.seconds
        self.counts: Counter[str] = Counter()
        self.probes: list[float] = []
        self.memory: list[tuple[float, float]] = []
        self._rng = random.Random(0)

    async def run(self) -> dict[str, Any]:
        args = self.args
        loads = [self._again(self._slow_reader) for _ in range(args.slow_readers)]
        loads += [self._again(self._half_open) for _ in range(args.half_open)]
        loads += [self._again(self._big_body) for _ in range(args.big_bodies)]
        loads += [self._again(self._burst), self._again(self._leaver), self._probe(), self._watch_memory()]
        await asyncio.gather(*loads)
        start, end = self._memory_of(_WARM_UP_SHARE), self._memory_of(0.9)
        return {
            "seconds": args.seconds,
            "probes": len(self.probes),
            "failed_probes": self.counts["failed probe"],
            "probe_s_median": round(statistics.median(self.probes), 3) if self.probes else None,
            "probe_s_worst": round(max(self.probes), 3) if self.probes else None,
            "rss_mib_after_warm_up": start,
            "rss_mib_at_end": end,
            "loads": dict(self.counts),
        }

    def _memory_of(self, share: float) -> float:
        """Median MiB of the tenth of the run that begins at this share of it."""
        first = self.ends - self.args.seconds * (1 - share)
        values = [rss for at, rss in self.memory if first <= at < first + self.args.seconds / 10]
        return statistics.median(values or [rss for _, rss in self.memory])

    async def _again(self, load: Any) -> None:
        await asyncio.sleep(self._rng.random() * min(5, self.args.seconds / 4))
        while time.monotonic() < self.ends:
            try:
                await load()
            except OSError as exc:
                self.counts[f"{load.__name__[1:]}: {type(exc).__name__}"] += 1
                await asyncio.sleep(0.5)

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # A small buffer, so that a reader who is slow holds the server back.
        return await asyncio.open_connection("127.0.0.1", self.server.port, limit=1024)

    async def _post(self, writer: asyncio.StreamWriter, body: bytes) -> None:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()

    def _body(self, tokens: int, stream: bool) -> bytes:
        prompt = f"Number {self._rng.random()}:"
        return json.dumps({"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": stream}).encode()

    async def _slow_reader(self) -> None:
        reader, writer = await self._open()
        try:
            await self._post(writer, self._body(_STREAM_TOKENS, True))
            while await reader.read(_SLOW_READ_BYTES) and time.monotonic() < self.ends:
                await asyncio.sleep(_SLOW_PAUSE_S)
            self.counts["slow streams"] += 1
        finally:
            writer.close()

    async def _half_open(self) -> None:
        _, writer = await self._open()
        try:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            await asyncio.sleep(min(_HELD_S, max(0.0, self.ends - time.monotonic())))
            self.counts["half-sent requests"] += 1
        finally:
            writer.close()

    async def _big_body(self) -> None:
        reader, writer = await self._open()
        try:
            await self._post(writer, json.dumps({"prompt": "word " * (_BIG_BODY // 5), "max_tokens": 1}).encode())
            status = (await reader.readline()).split()[1:2]
            self.counts[f"10 MB bodies answered {status[0].decode() if status else 'nothing'}"] += 1
        finally:
            writer.close()
        await asyncio.sleep(1)

    async def _burst(self) -> None:
        """Many connections at once, each asks for the server's health when all are open."""
        opened = await asyncio.gather(*(self._open() for _ in range(self.args.connections)), return_exceptions=True)
        pairs = [pair for pair in opened if not isinstance(pair, BaseException)]
        self.counts["connections refused"] += len(opened) - len(pairs)
        for _, writer in pairs:
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        lines = await asyncio.gather(*(reader.readline() for reader, _ in pairs), return_exceptions=True)
        self.counts["connections answered"] += sum(line == b"HTTP/1.1 200 OK\r\n" for line in lines)
        self.counts["connections not answered"] += sum(line != b"HTTP/1.1 200 OK\r\n" for line in lines)
        for _, writer in pairs:
            writer.close()
        await asyncio.sleep(5)

    async def _leaver(self) -> None:
        reader, writer = await self._open()
        await self._post(writer, self._body(1000, True))
        await reader.read(100)
        writer.transport.abort()
        self.counts["clients that left"] += 1
        await asyncio.sleep(0.2)

    async def _probe(self) -> None:
        """An ordinary client: one short answer a second."""
        while time.monotonic() < self.ends:
            started = time.monotonic()
            try:
                reader, writer = await self._open()
                await self._post(writer, self._body(_PROBE_TOKENS, False))
                answer = await reader.read(-1)
                writer.close()
                if not answer.startswith(b"HTTP/1.1 200"):
                    raise OSError(f"a probe got {answer[:100]!r}")
                self.probes.append(time.monotonic() - started)
            except OSError as exc:
                print(f"probe: {exc}", file=sys.stderr)
                self.counts["failed probe"] += 1
            await asyncio.sleep(max(0.0, started + 1 - time.monotonic()))

    async def _watch_memory(self) -> None:
        """Resident memory of the server with its engine process."""
        process = psutil.Process(self.server.process.pid)
        while time.monotonic() < self.ends:
            every = [process, *process.children(recursive=True)]
            self.memory.append((time.monotonic(), sum(p.memory_info().rss for p in every) / 2**20))
            await asyncio.sleep(1)


if __name__ == "__main__":
    main()

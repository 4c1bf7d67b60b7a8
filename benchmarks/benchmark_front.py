#!/usr/bin/env python3
"""What streaming costs the API process: its CPU time per token, and how long a token takes to pass through it.

The engine process is replaced by one that makes up tokens at a fixed pace and costs next to nothing; the API process is
the real one, HTTP included. CPU time is counted from when all clients stream until the first of them is done. The delay
of a token runs from when the engine sends its step to when the client has it; that is exact as long as the steps are
further apart than the delays.

    python benchmarks/benchmark_front.py                              # 256 clients, 20 steps/s: 5,120 tokens/s
    python benchmarks/benchmark_front.py --clients 64 --steps-per-s 31
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any, cast

import psutil
import uvloop

from server_process import ServerProcess

_PROMPT = "Write a story."
_SETTLE_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=256, help="streams at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each stream (default: %(default)s)")
    parser.add_argument("--steps-per-s", type=float, default=20, help="steps of the engine (default: %(default)s)")
    parser.add_argument("--model", help="whose tokenizer and chat template are used; the default model if not given")
    parser.add_argument("--completions", action="store_true", help="stream /v1/completions instead of chats")
    parser.add_argument("--out", type=Path, help="write the result to this file as JSON")
    parser.add_argument("--profile", type=Path, help="write a cProfile of the API process's threads to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # The clients share the machine with what is measured: the cheaper their loop, the less of a delay is theirs.
        gc.disable()
        result = uvloop.run(measure(args, Path(folder)))
    for name, value in result.items():
        print(f"{name:28s} {value:12.1f}" if isinstance(value, float) else f"{name:28s} {value:>12}")
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Starts the server, streams, and returns the figures by name."""
    times = folder / "times"
    flags = ["--num-gpu-blocks-override", "65536", "--disable-uvicorn-access-log"]
    flags += ["--model", args.model] if args.model else []
    role = ["front", str(args.steps_per_s), str(times), str(args.profile.resolve()) if args.profile else ""]
    server = ServerProcess(flags, folder / "log", command=[sys.executable, str(Path(__file__).resolve()), *role])
    try:
        server.wait_until_healthy(120)
        return await stream(args, server, times)
    except Exception:
        print(server.log_tail(), file=sys.stderr)
        raise
    finally:
        server.stop()


class Client(asyncio.Protocol):
    """One stream; notes when each of its tokens came, at the least cost."""

    def __init__(self, request: bytes, done: asyncio.Future[None]) -> None:
        self.arrivals: list[float] = []
        self._request = request
        self._done = done
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._head:
            self._head = data
        now = time.monotonic()
        self.arrivals += [now] * data.count(b"data: {")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._head.startswith(b"HTTP/1.1 200"):
            self._done.set_exception(RuntimeError(f"a stream failed: {self._head[:300]!r} {exc}"))
        elif not self._done.done():
            self._done.set_result(None)


async def stream(args: argparse.Namespace, server: ServerProcess, times: Path) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    body: dict[str, Any] = {"model": server.model, "max_tokens": args.tokens, "stream": True}
    body |= {"prompt": _PROMPT} if args.completions else {"messages": [{"role": "user", "content": _PROMPT}]}
    content = json.dumps(body).encode()
    path = "/v1/completions" if args.completions else "/v1/chat/completions"
    request = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode() + content
    futures: list[asyncio.Future[None]] = [loop.create_future() for _ in range(args.clients)]
    clients = [Client(request, future) for future in futures]
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", server.port)  # type: ignore[misc]
    while not all(client.arrivals for client in clients):
        await asyncio.sleep(0.05)
    await asyncio.sleep(_SETTLE_S)
    process = psutil.Process(server.process.pid)

    def counted() -> tuple[int, float, float]:
        cpu = process.cpu_times()
        return sum(len(client.arrivals) for client in clients), cpu.user + cpu.system, time.monotonic()

    first_tokens, first_cpu, first = counted()
    while not any(future.done() for future in futures):
        last_tokens, last_cpu, last = counted()
        await asyncio.sleep(0.1)
    await asyncio.gather(*futures)
    num_tokens, cpu, seconds = last_tokens - first_tokens, last_cpu - first_cpu, last - first
    sent = [float(line) for line in times.read_text().split()]
    delays = sorted(
        (at - sent[bisect.bisect_right(sent, at) - 1]) * 1000
        for client in clients
        for at in client.arrivals
        if first < at < last
    )
    return {
        "clients": args.clients,
        "tokens_per_s": num_tokens / seconds,
        "api_cpu_us_per_token": cpu / num_tokens * 1e6,
        "api_cpu_share": cpu / seconds * 100,
        "delay_ms_median": statistics.median(delays),
        "delay_ms_p99": delays[int(len(delays) * 0.99)],
        "api_rss_mib": process_rss(server),
    }


def process_rss(server: ServerProcess) -> float:
    return psutil.Process(server.process.pid).memory_info().rss / 2**20


# In the server's processes ---------------------------------------------------------------------------------------


def front(steps_per_s: str, times: str, profile: str) -> None:
    """The API server, with `engine` below in place of the engine process."""
    from vllm.engine.async_llm_engine import AsyncLLMEngine
    from vllm.entrypoints.openai import api_server

    AsyncLLMEngine.process_command = (sys.executable, str(Path(__file__).resolve()), "engine", steps_per_s, times)
    if not profile:
        api_server.main()
        return
    import cProfile

    profiler = cProfile.Profile()
    try:
        profiler.runcall(api_server.main)
    finally:
        profiler.dump_stats(profile)


def engine(steps_per_s: float, times: Path) -> None:
    """An engine process that gives every output of every request a token a step, at a fixed pace."""
    import msgspec
    import zmq

    from vllm.engine.messages import (
        AbortRequests,
        CoreProcessArgs,
        EngineInput,
        EngineOutput,
        EngineReady,
        EngineRequest,
        EngineStats,
        StepOutputs,
    )
    from vllm.sampling_params import SamplingParams
    from vllm.step import PositionLogprobs
    from vllm.wire import from_wire

    args = CoreProcessArgs.read(sys.stdin.buffer.readline(), dict)
    context = zmq.Context()
    outputs, inputs = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    outputs.connect(args.output_address)
    inputs.connect(args.input_address)
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(EngineInput, dec_hook=from_wire)
    outputs.send(encoder.encode(EngineReady(num_blocks=65536, pool_budget_tokens=65536)))
    running: dict[tuple[str, int], int] = {}
    params: dict[str, SamplingParams] = {}
    prompts: dict[str, PositionLogprobs] = {}
    rng = random.Random(0)

    def made_up(count: int, top: int) -> PositionLogprobs:
        ids, values = range(1000, 1001 + top), [-i * 0.1 for i in range(top + 1)]
        rows = (array("I", ids), array("d", values), array("I", [1]))
        return PositionLogprobs(top + 1, *(row.tobytes() * count for row in rows))

    next_step = time.monotonic()
    with times.open("w", buffering=1) as log:
        while True:
            wait = next_step - time.monotonic() if running else 1.0
            if inputs.poll(max(0, int(wait * 1000))):
                message = decoder.decode(inputs.recv())
                if isinstance(message, EngineRequest):
                    asked = params[message.request_id] = message.sampling_params
                    for output in range(asked.n):
                        running[message.request_id, output] = asked.max_tokens or 1
                    if asked.prompt_logprobs is not None:
                        prompts[message.request_id] = made_up(len(message.prompt_token_ids) - 1, asked.prompt_logprobs)
                elif isinstance(message, AbortRequests):
                    for request_id, aborted in message.targets:
                        for output in range(params[request_id].n) if aborted is None else (aborted,):
                            running.pop((request_id, output), None)
                continue
            if time.monotonic() < next_step and running:
                continue
            next_step = max(next_step + 1 / steps_per_s, time.monotonic())
            news: list[EngineOutput] = []
            for (request_id, index), left in running.items():
                made = EngineOutput(request_id, index, [rng.randrange(1000, 20000)])
                top = params[request_id].logprobs
                made.logprobs = None if top is None else made_up(1, top)
                made.prompt_logprobs = prompts.pop(request_id, None)
                made.num_cached_tokens, made.first_scheduled_time = 0, time.time()
                made.finish_reason = "length" if left == 1 else None
                news.append(made)
            running = {key: left - 1 for key, left in running.items() if left > 1}
            stats = EngineStats(num_running=len(running), iteration_tokens=len(news))
            message_out = encoder.encode(StepOutputs(outputs=news, stats=stats))
            log.write(f"{time.monotonic()}\n")
            outputs.send(message_out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["front"]:
        _, _, pace, times_file, profile_file, *rest = sys.argv
        sys.argv = [sys.argv[0], *rest]
        front(pace, times_file, profile_file)
    elif sys.argv[1:2] == ["engine"]:
        engine(float(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()

#!/usr/bin/env python3
"""256 concurrent streams over HTTP against the offline figure: the workload `plain 256x(128+256)` of `workloads.py`.

    python benchmarks/benchmark_http.py --offline benchmarks/results/h100.json --out benchmarks/results/h100_http.json

Starts a server of Llama-3.1-8B's shape with random weights, streams completions of token-id prompts from several client
processes, and counts from the first request until the last stream has ended. Every round has prompts of its own: those
of another round would be found in the prefix cache. The median of the rounds is compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
from benchmark_offline import make_model

from chat_load import SAMPLED
from workloads import LLAMA_8B, MAX_MODEL_LEN, MAX_NUM_SEQS, workloads

WORKLOAD = "plain 256x(128+256)"


async def stream(
    session: aiohttp.ClientSession, url: str, prompt: list[int], tokens: int, sampling: Mapping[str, Any]
) -> int:
    """Output tokens that the server says it sent."""
    body = {
        "model": "llama",
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **sampling,
    }
    last = b""
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                last = line
    return int(json.loads(last[6:])["usage"]["completion_tokens"])


async def all_streams(url: str, prompts: list[list[int]], tokens: int, sampling: Mapping[str, Any]) -> int:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as session:
        return sum(await asyncio.gather(*(stream(session, url, prompt, tokens, sampling) for prompt in prompts)))


def client(
    url: str, prompts: list[list[int]], tokens: int, sampling: Mapping[str, Any], start: Any, results: Any
) -> None:
    start.wait()
    counted = asyncio.run(all_streams(url, prompts, tokens, sampling))
    results.put((counted, time.time()))


def run(
    url: str, prompts: list[list[int]], tokens: int, sampling: Mapping[str, Any], num_clients: int
) -> tuple[float, int]:
    """Seconds until the last stream has ended, and output tokens."""
    spawn = multiprocessing.get_context("spawn")
    start, results = spawn.Barrier(num_clients + 1), spawn.Queue()
    shares = [prompts[i::num_clients] for i in range(num_clients)]
    clients = [spawn.Process(target=client, args=(url, share, tokens, sampling, start, results)) for share in shares]
    for process in clients:
        process.start()
    start.wait()
    began = time.time()
    found = [results.get() for _ in clients]
    for process in clients:
        process.join()
    return max(ended for _, ended in found) - began, sum(counted for counted, _ in found)


def wait_until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    while True:
        if server.poll() is not None:
            raise SystemExit(f"The server ended with code {server.returncode} before it was ready.")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--offline", type=Path, help="results of benchmark_offline.py to compare with")
    parser.add_argument("--out", type=Path, help="write the results to this file as JSON")
    parser.add_argument("--clients", type=int, default=8, help="client processes")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        make_model(Path(folder), LLAMA_8B)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        options = ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(MAX_NUM_SEQS), "--dtype", "bfloat16"]
        options += ["--load-format", "dummy", "--served-model-name", "llama", "--port", str(port)]
        options += ["--uvicorn-log-level", "warning", "--seed", "0"]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *options]
        server = subprocess.Popen(command)
        url = f"http://127.0.0.1:{port}"
        results: list[dict[str, Any]] = []
        try:
            wait_until_ready(url, server)
            for seed in range(args.rounds):
                work = next(w for w in workloads(seed) if w.name == WORKLOAD)
                for kind, sampling in (("", {"temperature": 0}), (", top_p", SAMPLED)):
                    seconds, counted = run(url, work.prompts, work.output_tokens, sampling, args.clients)
                    if counted != work.output_tokens * len(work.prompts):
                        raise SystemExit(f"{counted} output tokens instead of {work.output_tokens * len(work.prompts)}")
                    name = f"HTTP {WORKLOAD}{kind}"
                    results.append({"name": name, "seconds": seconds, "out_tok_s": counted / seconds})
                    print(f"{name:40s} {seconds:8.3f} s {counted / seconds:8.0f} output tokens/s", flush=True)
        finally:
            server.terminate()
            server.wait()
    if args.offline is not None:
        rows = json.loads(args.offline.read_text())
        for kind in ("", ", top_p"):
            offline = next(row["out_tok_s"] for row in rows if row["name"] == WORKLOAD + kind)
            median = statistics.median(row["out_tok_s"] for row in results if row["name"] == f"HTTP {WORKLOAD}{kind}")
            share = 100 * median / offline
            print(f"Median {median:.0f}{kind}: {share:.1f} % of the offline figure, {offline:.0f} output tokens/s")
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

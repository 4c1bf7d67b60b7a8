"""`vllm bench serve`: load on a running server, and how long its answers took.

Results have the names that vLLM's benchmark gives them: seconds and tokens in the totals, milliseconds in the
statistics of `ttft` (time to first token), `tpot` (mean time per later token of a request), `itl` (gaps between pieces
of an answer) and `e2el` (end to end).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
from collections.abc import Awaitable, Sequence
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import aiohttp
import numpy as np
from tqdm.asyncio import tqdm

from vllm.benchmarks.client import ENDPOINTS, Outcome, Target, send
from vllm.benchmarks.datasets import Sample, add_dataset_arguments, make_samples
from vllm.exceptions import StartupError
from vllm.transformers_utils.config import resolve_model
from vllm.transformers_utils.tokenizer import Tokenizer, load_tokenizer

_TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
_DETAILS = ("input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors")
_SAMPLING = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "repetition_penalty": float,
}
_WIDTH = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--backend", "--endpoint-type", choices=list(ENDPOINTS), default="openai", help="kind of API")
    group.add_argument("--base-url", help="address without path, in place of --host and --port")
    group.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    group.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    group.add_argument("--endpoint", help="path of the API (default: that of the backend)")
    group.add_argument("--model", help="name of the model's files; the first one of the server if not given")
    group.add_argument("--served-model-name", help="name the server knows the model by (default: --model)")
    group.add_argument("--tokenizer", help="folder, .gguf file or hub id to count tokens with (default: the model's)")
    group.add_argument("--insecure", action="store_true", help="do not check the server's certificate")
    group.add_argument("--trust-remote-code", action="store_true", help="run code that the tokenizer brings")
    group.add_argument("--header", nargs="*", metavar="NAME=VALUE", help="extra request headers")
    group.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON", help="extra fields of each request")
    group.add_argument("--ignore-eos", action="store_true", help="generate all tokens of each request")
    for name, kind in _SAMPLING.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{name} of each request")
    group = parser.add_argument_group("load")
    group.add_argument(
        "--request-rate", type=float, default=float("inf"), help="requests a second; all at once by default"
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="shape of the gamma-distributed gaps: 1 is a Poisson process, less is burstier (default: %(default)s)",
    )
    group.add_argument("--max-concurrency", type=int, help="most requests that are open together")
    group.add_argument("--num-warmups", type=int, default=0, help="requests that are sent first and not counted")
    group.add_argument(
        "--ready-check-timeout-sec", type=int, default=600, help="seconds to wait for the server (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=0, help="of made-up requests and arrival times")
    group.add_argument("--disable-tqdm", action="store_true", help="show no progress")
    group = parser.add_argument_group("results")
    group.add_argument(
        "--percentile-metrics", default="ttft,tpot,itl", help="any of ttft,tpot,itl,e2el (default: %(default)s)"
    )
    group.add_argument("--metric-percentiles", default="99", help="such as 25,50,99.9 (default: %(default)s)")
    group.add_argument(
        "--goodput", nargs="+", metavar="NAME:MS", help="limits in ms, such as ttft:200 tpot:50; requests within count"
    )
    group.add_argument("--save-result", action="store_true", help="write the results to a JSON file")
    group.add_argument("--save-detailed", action="store_true", help="with lengths, times, texts of each request")
    group.add_argument("--append-result", action="store_true", help="add a line to the file instead of replacing it")
    group.add_argument("--result-dir", default=".", help="folder of the file")
    group.add_argument("--result-filename", help="its name (default: backend, rate, model and time)")
    group.add_argument("--label", help="name of the run, in place of the backend's in the file's name")
    group.add_argument("--metadata", nargs="*", metavar="KEY=VALUE", help="written along with the results")
    add_dataset_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark, prints a table and saves what was asked for; returns the exit code.

    Raises:
        StartupError: a value is not allowed, or the server does not answer as it should.
    """
    return asyncio.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    metrics, percentiles = _metrics(args.percentile_metrics), _percentiles(args.metric_percentiles)
    limits = _limits(args.goodput or [])
    metadata = _pairs("--metadata", args.metadata)
    if args.request_rate <= 0 or args.burstiness <= 0:
        raise StartupError("--request-rate and --burstiness must be more than 0.")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise StartupError(f"--max-concurrency must be at least 1, got {args.max_concurrency}.")
    base_url = (args.base_url or f"http://{args.host}:{args.port}").rstrip("/")
    key = os.environ.get("OPENAI_API_KEY") or os.environ.get("VLLM_API_KEY")
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    headers |= _pairs("--header", args.header)
    # A benchmark waits as long as the server needs; the connections are as many as the load has.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=60)
    connector = aiohttp.TCPConnector(limit=0, ssl=not args.insecure)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        card = await _wait_for_model(session, base_url, headers, args.ready_check_timeout_sec)
        model = args.model or card["id"]
        tokenizer = _load_tokenizer(args.tokenizer or args.model or card.get("root") or card["id"], args)
        samples = make_samples(args, tokenizer, args.seed)
        target = Target(
            base_url + (args.endpoint or ENDPOINTS[args.backend]),
            args.backend == "openai-chat",
            args.served_model_name or model,
            headers,
            _extra_body(args),
        )
        await _warm_up(session, target, samples[0], args.num_warmups)
        outcomes, duration = await _load(session, target, samples, args)
    _count_tokens(outcomes, tokenizer)
    result = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": args.backend,
        "backend": args.backend,
        "label": args.label,
        "model_id": model,
        "tokenizer_id": args.tokenizer or model,
        "num_prompts": args.num_prompts,
        **metadata,
        "request_rate": args.request_rate if args.request_rate < float("inf") else "inf",
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        **summarise(outcomes, duration, metrics, percentiles, limits),
    }
    _print(result, args, metrics, percentiles)
    if args.save_result or args.append_result:
        _save(result, args, base_model=model.split("/")[-1])
    return 0 if result["completed"] else 1


async def _wait_for_model(
    session: aiohttp.ClientSession, base_url: str, headers: dict[str, str], timeout: float
) -> dict[str, Any]:
    """The server's first model, once it answers."""
    deadline = perf_counter() + timeout
    while True:
        try:
            async with session.get(f"{base_url}/v1/models", headers=headers) as answer:
                if answer.status == 200:
                    return dict((await answer.json())["data"][0])
                raise StartupError(f"{base_url}/v1/models answers {answer.status}: {(await answer.text())[:300]}")
        except (aiohttp.ClientError, OSError) as exc:
            if perf_counter() >= deadline:
                raise StartupError(f"There is no server at {base_url}: {exc}.") from None
        except (KeyError, IndexError, TypeError, ValueError):
            raise StartupError(f"{base_url}/v1/models lists no model.") from None
        await asyncio.sleep(1)


def _load_tokenizer(name: str, args: argparse.Namespace) -> Tokenizer:
    try:
        return load_tokenizer(resolve_model(name, None, False)[1], args.trust_remote_code)
    except StartupError as exc:
        raise StartupError(f"Tokens are counted with the model's tokenizer; name it with --tokenizer. {exc}") from None


def _extra_body(args: argparse.Namespace) -> dict[str, Any]:
    if not isinstance(args.extra_body, dict):
        raise StartupError("--extra-body must be a JSON object.")
    asked = {name: getattr(args, name) for name in _SAMPLING if getattr(args, name) is not None}
    return asked | ({"ignore_eos": True} if args.ignore_eos else {}) | args.extra_body


async def _warm_up(session: aiohttp.ClientSession, target: Target, sample: Sample, count: int) -> None:
    """Sends one request to see that the server answers, and `count` more."""
    first = await send(session, target, sample)
    if not first.success:
        raise StartupError(f"The first request failed, so the benchmark was not run. {first.error}")
    await asyncio.gather(*(send(session, target, sample) for _ in range(count)))


async def _load(
    session: aiohttp.ClientSession, target: Target, samples: Sequence[Sample], args: argparse.Namespace
) -> tuple[list[Outcome], float]:
    """Sends all requests at their times; returns their outcomes and the seconds that it took."""
    gate: contextlib.AbstractAsyncContextManager[object] = contextlib.nullcontext()
    if args.max_concurrency is not None:
        gate = asyncio.Semaphore(args.max_concurrency)
    arrivals = np.zeros(len(samples))
    if args.request_rate < float("inf"):
        gaps = np.random.default_rng(args.seed).gamma(
            args.burstiness, 1 / (args.request_rate * args.burstiness), len(samples)
        )
        arrivals = np.cumsum(gaps) - gaps[0]
    with tqdm(total=len(samples), disable=args.disable_tqdm) as progress:

        async def one(sample: Sample) -> Outcome:
            due = perf_counter()
            async with gate:
                outcome = await send(session, target, sample)
            outcome.queued = outcome.started - due
            progress.update(1)
            return outcome

        started = perf_counter()
        tasks: list[Awaitable[Outcome]] = []
        for sample, arrival in zip(samples, arrivals, strict=True):
            wait = started + arrival - perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(sample)))
        outcomes = await asyncio.gather(*tasks)
        return outcomes, perf_counter() - started


def _count_tokens(outcomes: list[Outcome], tokenizer: Tokenizer) -> None:
    for outcome in outcomes:
        if outcome.output_len is None:
            outcome.output_len = len(tokenizer.encode(outcome.text, add_special_tokens=False))


def summarise(
    outcomes: list[Outcome],
    duration: float,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    limits: dict[str, float],
) -> dict[str, Any]:
    """Totals, statistics and details of a run, under the names of vLLM's results.

    Args:
        duration: Seconds from the first request to the last answer.
        metrics: Which of `ttft tpot itl e2el` to tell.
        limits: Metric → most milliseconds of a request that counts towards the goodput; empty for none.
    """
    done = [outcome for outcome in outcomes if outcome.success]
    lengths = [outcome.output_len or 0 if outcome.success else 0 for outcome in outcomes]
    tpots = {id(o): (o.latency - o.ttft) / (o.output_len - 1) for o in done if o.output_len and o.output_len > 1}
    values = {
        "ttft": [o.ttft for o in done],
        "tpot": list(tpots.values()),
        "itl": [gap for o in done for gap in o.itl],
        "e2el": [o.latency for o in done],
    }

    def is_good(outcome: Outcome) -> bool:
        times = {"ttft": outcome.ttft, "tpot": tpots.get(id(outcome), 0.0), "e2el": outcome.latency}
        return all(times[name] * 1000 <= limit for name, limit in limits.items())

    total_input = sum(outcome.prompt_len for outcome in done)
    peak_tokens, peak_requests = _peaks(done)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": total_input,
        "total_output_tokens": sum(lengths),
        "request_throughput": len(done) / duration,
        "request_goodput": sum(map(is_good, done)) / duration if limits else None,
        "output_throughput": sum(lengths) / duration,
        "total_token_throughput": (total_input + sum(lengths)) / duration,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
        "rtfx": 0.0,  # of transcriptions, which there are none of
        "latencies": [outcome.latency for outcome in outcomes],
        "queue_times": [outcome.queued for outcome in outcomes],
        "input_lens": [outcome.prompt_len for outcome in outcomes],
        "output_lens": lengths,
        "start_times": [outcome.started for outcome in outcomes],
        "ttfts": [outcome.ttft for outcome in outcomes],
        "itls": [outcome.itl for outcome in outcomes],
        "generated_texts": [outcome.text for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }
    for name in metrics:
        ms = np.array(values[name] or [0.0]) * 1000
        result[f"mean_{name}_ms"] = float(np.mean(ms))
        result[f"median_{name}_ms"] = float(np.median(ms))
        result[f"std_{name}_ms"] = float(np.std(ms))
        for percentile in percentiles:
            result[f"p{percentile:g}_{name}_ms"] = float(np.percentile(ms, percentile))
    return result


def _peaks(done: list[Outcome]) -> tuple[float, int]:
    """Most tokens that came within a second of the run, and most requests that were open together."""
    if not done:
        return 0.0, 0
    first = min(outcome.started for outcome in done)
    tokens = np.zeros(int(max(o.started + o.latency for o in done) - first) + 1)
    changes: list[tuple[float, int]] = []
    for outcome in done:
        pieces = outcome.started - first + outcome.ttft + np.cumsum([0.0, *outcome.itl])
        # Pieces hold several tokens where the server hands them over together.
        np.add.at(tokens, pieces.astype(int), (outcome.output_len or len(pieces)) / len(pieces))
        changes += [(outcome.started, 1), (outcome.started + outcome.latency, -1)]
    open_now = np.cumsum([change for _, change in sorted(changes)])
    return float(tokens.max()), int(open_now.max())


def _print(
    result: dict[str, Any], args: argparse.Namespace, metrics: Sequence[str], percentiles: Sequence[float]
) -> None:
    print(f"{' Serving Benchmark Result ':=^{_WIDTH}}")
    rows: list[tuple[str, Any]] = [
        ("Successful requests:", result["completed"]),
        ("Failed requests:", result["failed"]),
    ]
    if args.max_concurrency is not None:
        rows.append(("Maximum request concurrency:", args.max_concurrency))
    if args.request_rate < float("inf"):
        rows.append(("Request rate configured (RPS):", args.request_rate))
    rows += [
        ("Benchmark duration (s):", result["duration"]),
        ("Total input tokens:", result["total_input_tokens"]),
        ("Total generated tokens:", result["total_output_tokens"]),
        ("Request throughput (req/s):", result["request_throughput"]),
    ]
    if result["request_goodput"] is not None:
        rows.append(("Request goodput (req/s):", result["request_goodput"]))
    rows += [
        ("Output token throughput (tok/s):", result["output_throughput"]),
        ("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"]),
        ("Peak concurrent requests:", float(result["max_concurrent_requests"])),
        ("Total token throughput (tok/s):", result["total_token_throughput"]),
    ]
    for row in rows:
        _print_row(*row)
    for name in metrics:
        print(f"{_TITLES[name]:-^{_WIDTH}}")
        short = name.upper()
        _print_row(f"Mean {short} (ms):", result[f"mean_{name}_ms"])
        _print_row(f"Median {short} (ms):", result[f"median_{name}_ms"])
        for percentile in percentiles:
            _print_row(f"P{percentile:g} {short} (ms):", result[f"p{percentile:g}_{name}_ms"])
    print("=" * _WIDTH)
    for error in sorted(set(filter(None, result["errors"])))[:3]:
        print(f"A request failed: {error}")


def _print_row(name: str, value: float | int) -> None:
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    print(f"{name:<40} {shown:<10}".rstrip())


def _save(result: dict[str, Any], args: argparse.Namespace, base_model: str) -> None:
    if not args.save_detailed:
        result = {key: value for key, value in result.items() if key not in _DETAILS}
    concurrency = f"-concurrency{args.max_concurrency}" if args.max_concurrency is not None else ""
    name = args.result_filename or (
        f"{args.label or args.backend}-{args.request_rate}qps{concurrency}-{base_model}-{result['date']}.json"
    )
    path = Path(args.result_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if args.append_result else "w", encoding="utf-8") as file:
        if args.append_result and file.tell():
            file.write("\n")
        json.dump(result, file)
    print(f"Results are in {path}")


def _metrics(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := set(names) - _TITLES.keys():
        raise StartupError(f"--percentile-metrics takes any of {', '.join(_TITLES)}, got {min(unknown)}.")
    return names


def _percentiles(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= value <= 100 for value in found):
        raise StartupError(f"--metric-percentiles takes numbers from 0 to 100, such as 50,99, got {text}.")
    return found


def _limits(texts: Sequence[str]) -> dict[str, float]:
    try:
        limits = {name: float(ms) for name, _, ms in (text.partition(":") for text in texts)}
    except ValueError:
        limits = {"": 0.0}
    if not limits.keys() <= {"ttft", "tpot", "e2el"}:
        raise StartupError(f"--goodput takes ttft:MS, tpot:MS and e2el:MS, got {' '.join(texts)}.")
    return limits


def _pairs(flag: str, texts: Sequence[str] | None) -> dict[str, str]:
    split: list[tuple[str, str, str]] = [text.partition("=") for text in texts or ()]
    if not all(name and equals for name, equals, _ in split):
        raise StartupError(f"{flag} takes NAME=VALUE pairs, got {' '.join(texts or ())}.")
    return {name: value for name, _, value in split}

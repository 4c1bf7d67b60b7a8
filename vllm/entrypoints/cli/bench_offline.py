"""`vllm bench throughput` and `vllm bench latency`: the engine by itself, in this process."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm

from vllm.benchmarks.datasets import add_dataset_arguments, make_samples
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.args.compatibility_args import add_compatibility_args
from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.entrypoints.llm import LLM
from vllm.exceptions import StartupError
from vllm.inputs import PromptType, TokensPrompt
from vllm.sampling_params import SamplingParams

_PERCENTILES = (10, 25, 50, 75, 90, 99)


def add_throughput_arguments(parser: FlexibleArgumentParser) -> None:
    group = parser.add_argument_group("throughput")
    group.add_argument("--n", type=int, default=1, help="outputs of each prompt (default: %(default)s)")
    group.add_argument("--output-json", type=Path, metavar="FILE", help="write the results to this file")
    group.add_argument("--disable-tqdm", action="store_true", help="show no progress")
    add_dataset_arguments(parser)
    _add_engine_arguments(parser)


def run_throughput(args: argparse.Namespace) -> int:
    """All requests at once; prints requests and tokens a second. Returns the exit code."""
    llm = _engine(args)
    samples = make_samples(args, llm.llm_engine.tokenizer, args.seed or 0)
    longest = llm.llm_engine.vllm_config.model.max_model_len
    if any(sample.prompt_len + sample.output_len > longest for sample in samples):
        raise StartupError(f"Some requests are longer than --max-model-len {longest}; --input-len makes them shorter.")
    params = [SamplingParams(n=args.n, temperature=1.0, ignore_eos=True, max_tokens=s.output_len) for s in samples]
    prompts: list[PromptType] = [sample.prompt for sample in samples]
    started = perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=not args.disable_tqdm)
    elapsed = perf_counter() - started
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    output_tokens = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    total = prompt_tokens + output_tokens
    print(
        f"Throughput: {len(samples) / elapsed:.2f} requests/s, {total / elapsed:.2f} total tokens/s, "
        f"{output_tokens / elapsed:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {prompt_tokens}")
    print(f"Total num output tokens:  {output_tokens}")
    _save(
        args.output_json,
        {
            "elapsed_time": elapsed,
            "num_requests": len(samples),
            "total_num_tokens": total,
            "requests_per_second": len(samples) / elapsed,
            "tokens_per_second": total / elapsed,
        },
    )
    return 0


def add_latency_arguments(parser: FlexibleArgumentParser) -> None:
    group = parser.add_argument_group("latency")
    for name, value, text in (
        ("input-len", 32, "tokens of each prompt"),
        ("output-len", 128, "tokens to generate for each"),
        ("batch-size", 8, "prompts at once"),
        ("n", 1, "outputs of each prompt"),
        ("num-iters-warmup", 10, "batches that are not counted"),
        ("num-iters", 30, "batches that are"),
    ):
        group.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: %(default)s)")
    group.add_argument("--output-json", type=Path, metavar="FILE", help="write the results to this file")
    group.add_argument("--disable-tqdm", action="store_true", help="show no progress")
    _add_engine_arguments(parser)


def run_latency(args: argparse.Namespace) -> int:
    """The same batch again and again; prints seconds from handing it over to its last token. Returns the exit code."""
    if args.num_iters < 1 or args.batch_size < 1 or args.num_iters_warmup < 0:
        raise StartupError("--num-iters and --batch-size must be at least 1, --num-iters-warmup at least 0.")
    llm = _engine(args)
    params = SamplingParams(n=args.n, temperature=1.0, ignore_eos=True, max_tokens=args.output_len)
    rng = np.random.default_rng(args.seed or 0)
    vocab_size = llm.llm_engine.tokenizer.vocab_size

    def seconds() -> float:
        # New prompts each time: none may be found in the prefix cache.
        ids = rng.integers(vocab_size, size=(args.batch_size, args.input_len)).tolist()
        prompts: list[PromptType] = [TokensPrompt(prompt_token_ids=row) for row in ids]
        started = perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return perf_counter() - started

    for _ in tqdm(range(args.num_iters_warmup), desc="Warmup iterations", disable=args.disable_tqdm):
        seconds()
    latencies = [seconds() for _ in tqdm(range(args.num_iters), desc="Bench iterations", disable=args.disable_tqdm)]
    percentiles = dict(zip(_PERCENTILES, np.percentile(latencies, _PERCENTILES).tolist(), strict=True))
    print(f"Avg latency: {np.mean(latencies)} seconds")
    for percentage, value in percentiles.items():
        print(f"{percentage}% percentile latency: {value} seconds")
    _save(
        args.output_json,
        {"avg_latency": float(np.mean(latencies)), "latencies": latencies, "percentiles": percentiles},
    )
    return 0


def _add_engine_arguments(parser: FlexibleArgumentParser) -> None:
    EngineArgs.add_cli_args(parser)
    add_compatibility_args(parser)


def _engine(args: argparse.Namespace) -> LLM:
    # Not asdict: it would take values apart that are dataclasses themselves.
    engine_args = EngineArgs.from_cli_args(args)
    return LLM(**{field.name: getattr(engine_args, field.name) for field in dataclasses.fields(engine_args)})


def _save(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=4), encoding="utf-8")

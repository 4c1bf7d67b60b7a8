#!/usr/bin/env python3
"""What a decode step costs beside the compiled CPU kernels: engine, scheduler, runner and detokenisation together.

    python benchmarks/benchmark_step_overhead.py                                    # 8 sequences
    python benchmarks/benchmark_step_overhead.py --sequences 1 8 32 --system-tokens 3000

The engine runs in this process; the time inside the one call that a step makes into the kernels is taken off the time
of the step. Figures are medians over the steps.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from chat_load import markdown_table, positive_int
from machine_facts import machine
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.ops.cpu.kernels import CompiledSteps
from vllm.sampling_params import RequestOutputKind

_PROMPT_TOKENS = 30
_WARM_UP_STEPS = 10


class KernelClock:
    """Adds up the time inside the kernels."""

    def __init__(self) -> None:
        self.seconds = 0.0
        create = CompiledSteps.__init__

        def timed(steps: CompiledSteps, *args: Any) -> None:
            create(steps, *args)
            run = steps._run

            def call(*arguments: Any) -> None:
                started = time.perf_counter()
                run(*arguments)
                self.seconds += time.perf_counter() - started

            steps._run = call  # type: ignore[assignment]

        CompiledSteps.__init__ = timed  # type: ignore[assignment,method-assign]


def measure(engine: LLMEngine, clock: KernelClock, sequences: int, system_tokens: int, steps: int) -> dict[str, float]:
    """Milliseconds of a decode step, of its kernels and of the rest."""
    draw = random.Random(0)
    system = [draw.randrange(1000, 40000) for _ in range(system_tokens)]
    params = SamplingParams(temperature=0, max_tokens=_WARM_UP_STEPS + steps + 2, ignore_eos=True)
    params.output_kind = RequestOutputKind.DELTA
    for i in range(sequences):
        own = [draw.randrange(1000, 40000) for _ in range(_PROMPT_TOKENS)]
        engine.add_request(f"{sequences}-{i}", system + own, params, num_system_tokens=system_tokens or None)
    # Prompts are computed first; the first step that brings a token of every sequence is one of decoding alone.
    while len(engine.step()) < sequences:
        pass
    whole, kernels = [], []
    for step in range(_WARM_UP_STEPS + steps):
        clock.seconds, started = 0.0, time.perf_counter()
        engine.step()
        if step >= _WARM_UP_STEPS:
            whole.append(time.perf_counter() - started)
            kernels.append(clock.seconds)
    while engine.has_unfinished_requests():
        engine.step()
    rest = [a - b for a, b in zip(whole, kernels, strict=True)]
    figures = {"step_ms": whole, "kernels_ms": kernels, "rest_ms": rest}
    return {name: round(statistics.median(times) * 1e3, 3) for name, times in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the server's own default")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument("--sequences", type=positive_int, nargs="+", default=[8], help="at a time (default: 8)")
    parser.add_argument("--system-tokens", type=int, default=0, help="of their system prompt (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=200, help="that are measured (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the report to this file as JSON")
    args = parser.parse_args()
    clock = KernelClock()
    max_model_len = args.system_tokens + _PROMPT_TOKENS + _WARM_UP_STEPS + args.steps + 8
    options = {"device": "cpu", "dtype": args.dtype, "max_model_len": max_model_len, "kv_cache_memory_bytes": 2**30}
    engine = LLMEngine.from_engine_args(EngineArgs(model=args.model, **options))
    results = [{"sequences": n, **measure(engine, clock, n, args.system_tokens, args.steps)} for n in args.sequences]
    engine.shutdown()
    titles = ["sequences", "step ms", "kernels ms", "rest ms"]
    print(markdown_table([titles, *(list(result.values()) for result in results)], 0))
    if args.out is not None:
        report = {"machine": machine(), "dtype": args.dtype, "system_tokens": args.system_tokens, "results": results}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

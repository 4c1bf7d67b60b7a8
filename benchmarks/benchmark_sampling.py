"""Time of the whole draw on a GPU, for what a batch's rows may ask for, against the time to read the logits once.

    python benchmarks/benchmark_sampling.py --out benchmarks/results/h100_sampling.json
    python benchmarks/benchmark_sampling.py --tune     the search for top_p with other sizes as well

Logits are bfloat16, of Llama-3's vocabulary by default: flat ones, normally distributed as a network with random
weights gives them (top_p 0.95 keeps tens of thousands of tokens), and peaked ones (it keeps some hundred). Times are
medians of graph replays with the L2 cache flushed in between. `read` is what a copy on the same device would take for
the bytes of the logits; `argmax` is torch's, of the same logits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.testing

from vllm.model_executor.layers.sampling_rows import SamplingRows
from vllm.ops.launch import compiling_ahead
from vllm.ops.triton.sampling import CHUNK, PIVOTS, ROUNDS, DrawKernels
from vllm.sampling_params import SamplingParams
from vllm.step import SequenceStart
from vllm.token_ids import token_array

DEVICE = torch.device("cuda")
ROWS = (1, 8, 64, 256)
PROMPT = 300
TOP = 5

PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.1}
BIAS = {"logit_bias": {1000 + 517 * i: 1.5 for i in range(20)}}
ALLOWED = {"allowed_token_ids": list(range(0, 100_000, 7))}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature 1": {},
    "top_p 0.95": {"top_p": 0.95},
    "top_k 50": {"top_k": 50},
    "min_p 0.05": {"min_p": 0.05},
    "penalties": PENALTIES,
    "bias of 20": BIAS,
    "allowed": ALLOWED,
    "mask": {},
    "all together": {"top_p": 0.95, "top_k": 50, "min_p": 0.05, **PENALTIES, **BIAS, **ALLOWED},
    "greedy, logprobs 5": {"temperature": 0},
}


def flat(rows: int, vocab_size: int) -> torch.Tensor:
    return torch.randn(rows, vocab_size, device=DEVICE).bfloat16()


def peaked(rows: int, vocab_size: int) -> torch.Tensor:
    return (4 * torch.randn(rows, vocab_size, device=DEVICE)).bfloat16()


def median_us(run: Callable[[], object]) -> float:
    """Microseconds of one run, replayed as a graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return 1e3 * float(triton.testing.do_bench(graph.replay, warmup=10, rep=60, return_mode="median"))


def copy_rate() -> float:
    """Bytes a second, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2e6 * source.nbytes / median_us(lambda: target.copy_(source))


class Draw:
    """A batch whose rows all ask for the same.

    Args:
        sizes: Of `DrawKernels`.
    """

    def __init__(self, kind: str, logits: torch.Tensor, **sizes: int) -> None:
        count, vocab_size = logits.shape
        params = SamplingParams(**KINDS[kind])
        rows = SamplingRows(count + 1, vocab_size, DEVICE)
        prompt = token_array(range(PROMPT))
        rows.start([SequenceStart(i, prompt, PROMPT, [], (), params, i, ()) for i in range(count)])
        self.logits = logits
        self.kernels = DrawKernels(rows.tables, count, **sizes)
        self.rows = torch.arange(count, device=DEVICE)
        self.num_tokens = torch.full((count,), PROMPT, dtype=torch.int64, device=DEVICE)
        self.token_ids = torch.zeros((count, PROMPT + 1), dtype=torch.int64, device=DEVICE)
        self.drawn = torch.empty(count, dtype=torch.int64, device=DEVICE)
        self.masks = self.mask_rows = None
        if kind in ("mask", "all together"):
            words = np.random.default_rng(0).integers(-(2**31), 2**31, (count, -(-vocab_size // 32)), np.int64)
            self.masks, self.mask_rows = torch.from_numpy(words.astype(np.int32)).to(DEVICE), self.rows
        self.is_cut = bool(rows.is_cut.any())
        self.wants_logprobs = "logprobs" in kind

    def run(self) -> None:
        """What a captured decode step launches for it."""
        batch = (self.logits, self.rows, self.num_tokens, self.token_ids, self.drawn)
        self.kernels.draw(*batch, self.masks, self.mask_rows)
        if self.is_cut:
            self.kernels.restrict(*batch)
        if self.wants_logprobs:
            self.kernels.logprobs(self.logits, self.rows, self.drawn, TOP)


@dataclass
class Result:
    logits: str
    rows: int
    kind: str
    us: float
    read_us: float
    argmax_us: float


def tune(vocab_size: int) -> None:
    print(f"{'top_p 0.95: chunk × pivots × rounds':40} {'rows':>5} {'flat µs':>9} {'peaked µs':>10}")
    for rows in (1, 256):
        shapes = [make(rows, vocab_size) for make in (flat, peaked)]
        for sizes in (
            (CHUNK, PIVOTS, ROUNDS),
            *((chunk, PIVOTS, ROUNDS) for chunk in (2048, 8192)),
            *(
                (CHUNK, pivots, rounds)
                for pivots, rounds in ((4, 3), (4, 4), (5, 3), (6, 3), (8, 2), (8, 3), (12, 2), (32, 1))
            ),
        ):
            chosen = dict(zip(("chunk", "pivots", "rounds"), sizes, strict=True))
            draws = [Draw("top_p 0.95", logits, **chosen) for logits in shapes]
            with compiling_ahead():
                draws[0].run()
            print(f"{sizes!s:40} {rows:5} {median_us(draws[0].run):9.1f} {median_us(draws[1].run):10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--tune", action="store_true", help="also time other sizes of the search")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/benchmark_sampling.py needs an NVIDIA GPU.")
    torch.manual_seed(0)
    name, rate = torch.cuda.get_device_name(), copy_rate()
    print(f"{name}: copy {rate / 1e9:.0f} GB/s; {args.vocab_size} tokens")
    with compiling_ahead():
        warm = Draw("greedy, logprobs 5", flat(1, args.vocab_size))
        warm.is_cut = True
        warm.run()
    print(f"{'logits':8} {'rows':>5}  {'kind':24} {'µs':>9} {'read':>9} {'argmax':>9}")
    results = []
    for make in (flat, peaked):
        for rows in ROWS:
            logits = make(rows, args.vocab_size)
            read = 1e6 * logits.nbytes / rate
            argmax = median_us(lambda logits=logits: logits.argmax(dim=-1))  # type: ignore[misc]
            for kind in KINDS:
                us = median_us(Draw(kind, logits).run)
                result = Result(make.__name__, rows, kind, round(us, 2), round(read, 2), round(argmax, 2))
                results.append(result)
                print(f"{make.__name__:8} {rows:5}  {kind:24} {us:9.1f} {read:9.1f} {argmax:9.1f}", flush=True)
    if args.tune:
        tune(args.vocab_size)
    if args.out:
        report = {
            "device": name,
            "vocab_size": args.vocab_size,
            "copy_gb_per_s": round(rate / 1e9, 1),
            "draws": [asdict(result) for result in results],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Offline throughput of the standing GPU workloads (`workloads.py`): shapes of published networks, random weights, one
GPU.

All requests of a workload are handed over at once; `seconds` runs from then until the last token is back. First tokens
are those of each request, from when the workload (in turn: the request) was handed over. Prompts are token ids, so
nothing is tokenised or detokenised. The engine learns where the system prompt ends, as it does from the chat template
in a server.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm
from chat_load import quantile
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from workloads import MAX_MODEL_LEN, MAX_NUM_SEQS, SCHEMA, SHAPES, Workload, workloads


def compressed(packing: str, **weights: Any) -> dict[str, Any]:
    """A `quantization_config` of compressed-tensors for all linear layers."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def make_model(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint without weights: the configuration, and a tokenizer of bytes and random words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    (folder / "config.json").write_text(json.dumps(config))
    rng = random.Random(0)
    words = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    while len(words) < config["vocab_size"]:
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
        words[rng.choice(("", "Ġ")) + word] = None
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


@dataclass(frozen=True)
class Figures:
    """Of one workload: seconds in all, and of each counted request until its first token."""

    seconds: float
    first_tokens: list[float]


class Bench:
    """Runs workloads on one engine."""

    def __init__(self, engine: vllm.LLMEngine) -> None:
        self._engine = engine
        self._num_requests = 0

    def run(self, workload: Workload) -> Figures:
        """
        Raises:
            RuntimeError: a request got another number of tokens than it asked for.
        """
        started = time.perf_counter()
        if not workload.in_turn:
            first_tokens = self._run(workload, list(range(len(workload.prompts))))
        else:
            first_tokens = [self._run(workload, [i])[0] for i in range(len(workload.prompts))]
        return Figures(time.perf_counter() - started, first_tokens[workload.uncounted :])

    def _run(self, workload: Workload, picked: list[int]) -> list[float]:
        engine, tokens = self._engine, workload.output_tokens
        started = time.perf_counter()
        for i in picked:
            engine.add_request(
                f"{self._num_requests + i}",
                {"prompt_token_ids": workload.prompts[i]},
                self._params(workload, i < workload.num_formed),
                num_system_tokens=workload.system_tokens,
            )
        first: dict[str, float] = {}
        generated = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                first.setdefault(output.request_id, time.perf_counter() - started)
                generated += sum(len(o.token_ids) for o in output.outputs)
        self._num_requests += len(workload.prompts)
        if generated != tokens * len(picked):
            raise RuntimeError(f"{workload.name}: {generated} output tokens instead of {tokens * len(picked)}")
        return list(first.values())

    @staticmethod
    def _params(workload: Workload, formed: bool) -> vllm.SamplingParams:
        sampling = {"temperature": 0.0} | workload.sampling
        form = StructuredOutputsParams(json=SCHEMA) if formed else None
        return vllm.SamplingParams(
            max_tokens=workload.output_tokens,
            min_tokens=workload.output_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            structured_outputs=form,
            **sampling,
        )


_FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "fp8": {},
    "fp8-block": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "int4": compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=128, symmetric=True),
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "mxfp4": compressed("mxfp4-pack-quantized", **_FP4, strategy="group", group_size=32),
    "nvfp4": compressed("nvfp4-pack-quantized", **_FP4, strategy="tensor_group", group_size=16),
}
"""Formats of the weights: what the checkpoint's configuration says of them. fp8 is made of whole weights at load."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this file as JSON")
    parser.add_argument("--only", default="", help="run only the workloads whose name matches this regular expression")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="more engine arguments, as a JSON object")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="format of the weights; whole if not given")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b", help="of the network")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    max_len = min(MAX_MODEL_LEN, shape["max_position_embeddings"])
    results: list[dict[str, Any]] = []

    def note(name: str, seconds: float, output_tokens: int, first_tokens: list[float] | None = None) -> None:
        result = {"name": name, "seconds": seconds, "out_tok_s": output_tokens / seconds}
        line = f"{name:48s} {seconds:9.4f} s {output_tokens / seconds:8.0f} output tokens/s"
        if first_tokens:
            result |= {
                "first_token_p50": statistics.median(first_tokens),
                "first_token_p99": quantile(first_tokens, 0.99),
            }
            line += f"   first token p50 {result['first_token_p50']:7.4f} p99 {result['first_token_p99']:7.4f} s"
        results.append(result)
        print(line, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        values = QUANTIZATIONS[args.quantization] if args.quantization else {}
        make_model(Path(folder), shape | ({"quantization_config": values} if values else {}))
        started = time.perf_counter()
        options: dict[str, Any] = {"max_model_len": max_len, "max_num_seqs": MAX_NUM_SEQS, "dtype": "bfloat16"}
        options |= {"load_format": "dummy", "seed": 0}
        if args.quantization and not values:
            options["quantization"] = args.quantization
        options |= args.engine_args
        engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(model=folder, **options))
        note("start-up", time.perf_counter() - started, 0)
        bench = Bench(engine)
        for workload in workloads(vocab_size=min(128000, shape["vocab_size"])):
            if max(map(len, workload.prompts)) + workload.output_tokens > max_len:
                continue
            if workload.name == "warmup" or re.search(args.only, workload.name):
                figures = bench.run(workload)
                note(
                    workload.name, figures.seconds, workload.output_tokens * len(workload.prompts), figures.first_tokens
                )
                if args.out is not None:
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    args.out.write_text(json.dumps(results, indent=1) + "\n")
        engine.shutdown()


if __name__ == "__main__":
    main()

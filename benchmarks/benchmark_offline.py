#!/usr/bin/env python3
"""Offline throughput of the standing GPU workloads (`workloads.py`): Llama-3.1-8B's shape, random weights, one GPU.

All requests of a workload are handed over at once; `seconds` runs from then until the last token is back. Prompts are
token ids, so nothing is tokenised or detokenised. The engine learns where the system prompt ends, as it does from the
chat template in a server.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import vllm
from vllm.sampling_params import RequestOutputKind
from workloads import LLAMA_8B, MAX_MODEL_LEN, MAX_NUM_SEQS, workloads


def make_model(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint without weights: the configuration, and a tokenizer that has a word for every id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {f"<{i}>": i for i in range(config["vocab_size"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def run(engine: vllm.LLMEngine, name: str, system: list[int] | None, prompts: list[list[int]], tokens: int) -> float:
    """Seconds until every prompt has its `tokens` output tokens."""
    params = vllm.SamplingParams(
        temperature=0,
        max_tokens=tokens,
        min_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    started = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(
            f"{name}-{i}-{started}",
            {"prompt_token_ids": prompt},
            params,
            num_system_tokens=None if system is None else len(system),
        )
    generated = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                generated += sum(len(o.token_ids) for o in output.outputs)
    seconds = time.perf_counter() - started
    if generated != tokens * len(prompts):
        raise RuntimeError(f"{name}: {generated} output tokens instead of {tokens * len(prompts)}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results to this file as JSON")
    parser.add_argument("--only", default="", help="run only the workloads whose name contains this text")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="more engine arguments, as a JSON object")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []

    def note(name: str, seconds: float, output_tokens: int) -> None:
        results.append({"name": name, "seconds": seconds, "out_tok_s": output_tokens / seconds})
        print(f"{name:40s} {seconds:9.4f} s {output_tokens / seconds:10.0f} output tokens/s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), LLAMA_8B)
        started = time.perf_counter()
        options: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS, "dtype": "bfloat16"}
        options |= {"load_format": "dummy", "seed": 0} | args.engine_args
        engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(model=folder, **options))
        note("start-up", time.perf_counter() - started, 0)
        for name, system, prompts, tokens in workloads():
            if args.only in name:
                note(name, run(engine, name, system, prompts, tokens), tokens * len(prompts))
        engine.shutdown()
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What fewer bits cost in accuracy: log-probabilities of a text's tokens, against those of float32 on the CPU.

The text, this repository's own prose unless files are named, is cut into prompts of `--context` tokens. Of each token
after the first: the log-probability of what the text says, and which token the model thinks likeliest.

    python benchmarks/quantization_loss.py --out result.json
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from pathlib import Path

import torch

import vllm

REPOSITORY = Path(__file__).resolve().parents[1]
# The first one is what the others are compared with.
CONFIGURATIONS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8_cpu, float32": {"dtype": "float32", "quantization": "int8_cpu"},
    "int8_cpu, bfloat16": {"dtype": "bfloat16", "quantization": "int8_cpu"},
}


def measure(model: str | None, arguments: dict[str, str], text: str, tokens: int, context: int) -> list[list[float]]:
    """For each token: its log-probability (natural), and the id of the likeliest in its place."""
    llm = vllm.LLM(model, device="cpu", max_model_len=context + 1, seed=0, **arguments)
    ids = llm.get_tokenizer().encode(text, add_special_tokens=False)[:tokens]
    prompts = [ids[i : i + context] for i in range(0, len(ids), context)]
    params = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    found = []
    for output in llm.generate([p for p in prompts if len(p) > 1], params, use_tqdm=False):
        assert output.prompt_logprobs is not None
        for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            assert entry is not None
            likeliest = max(entry, key=lambda t: entry[t].logprob)
            found.append([entry[token].logprob, likeliest])
    llm.llm_engine.shutdown()
    del llm
    gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the default model if not given")
    parser.add_argument("--text", type=Path, nargs="+", help="files of text; the repository's Markdown if not given")
    parser.add_argument("--tokens", type=int, default=8192, help="most tokens of the text (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    files = args.text or sorted(
        p for p in (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")) if "zh" not in p.name
    )
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in files)
    results: dict[str, dict[str, float]] = {}
    reference: torch.Tensor | None = None
    print(f"{'':20}{'mean |Δ|':>12}{'99th %':>12}{'same top-1':>12}{'perplexity':>12}{'ratio':>10}")
    for name, arguments in CONFIGURATIONS.items():
        found = torch.tensor(measure(args.model, arguments, text, args.tokens, args.context), dtype=torch.float64)
        reference = found if reference is None else reference
        difference = (found[:, 0] - reference[:, 0]).abs()
        perplexity = math.exp(-found[:, 0].mean())
        results[name] = {
            "tokens": len(found),
            "mean_absolute_logprob_difference": float(difference.mean()),
            "p99_absolute_logprob_difference": float(difference.quantile(0.99)),
            "same_top_1": float((found[:, 1] == reference[:, 1]).double().mean()),
            "perplexity": perplexity,
            "perplexity_ratio": perplexity / math.exp(-reference[:, 0].mean()),
        }
        _, mean, p99, same, _, ratio = results[name].values()
        print(f"{name:20}{mean:12.5f}{p99:12.5f}{same:12.4f}{perplexity:12.4f}{ratio:10.5f}", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"files": [p.name for p in files], "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

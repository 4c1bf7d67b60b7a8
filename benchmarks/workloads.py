"""The standing GPU workloads, as token ids: any engine that takes token-id prompts can run them.

Llama-3.1-8B's shape (LLAMA_8B), random weights. All requests of a workload are handed over at once, or one after the
other where it is `in_turn`; `seconds` is from then until the last token. Output length is fixed (ignore_eos, min_tokens
== max_tokens).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from chat_load import SAMPLED

LLAMA_8B = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    tie_word_embeddings=False,
    torch_dtype="bfloat16",
    hidden_act="silu",
    bos_token_id=1,
    eos_token_id=2,
    attention_bias=False,
    mlp_bias=False,
)

MAX_MODEL_LEN = 40960
MAX_NUM_SEQS = 256

PARAMETERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "top_p": dict(SAMPLED),
    "top_k": {"temperature": 1.0, "top_k": 50},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
    "seed": {"temperature": 1.0, "seed": 7},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logit_bias": {"logit_bias": {i: 1.0 for i in range(1000, 1020)}},
    "logprobs": {"logprobs": 5},
}
PARAMETERS["all together"] = {name: value for some in PARAMETERS.values() for name, value in some.items()}

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array"}},
        "required": ["name", "age", "tags"],
    },
    "minItems": 64,
}
"""A form that no answer of some hundred tokens completes."""


@dataclass(frozen=True)
class Workload:
    """Requests that are measured together.

    Attributes:
        prompts: Token ids.
        system_tokens: Length of the system prompt that each of them starts with; None for none.
        sampling: What is not greedy, by the names of `SamplingParams`.
        num_formed: So many of the requests follow `SCHEMA`.
        in_turn: One request at a time.
        uncounted: Of requests in turn, the first ones whose first tokens do not count.
    """

    name: str
    prompts: list[list[int]]
    output_tokens: int
    system_tokens: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    num_formed: int = 0
    in_turn: bool = False
    uncounted: int = 0


def workloads(seed: int = 0) -> Iterator[Workload]:
    """In an order that matters: "cold" is the first sight of a system prompt, "warm" and "shared" come after it."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(10, 128000) for _ in range(n)]

    def own(n: int, system: list[int] | None = None) -> list[list[int]]:
        return [(system or []) + ids(n) for _ in range(MAX_NUM_SEQS)]

    yield Workload("warmup", [ids(200) for _ in range(8)], 16)
    yield Workload("plain 256x(1024+256)", own(1024), 256)
    yield Workload("plain 256x(128+256)", own(128), 256)
    for s in (2048, 8192, 32768):
        system = ids(s)
        yield Workload(f"first token cold S={s}", [system + ids(128)], 1, s)
        for _ in range(3):
            yield Workload(f"first token warm S={s}", [system + ids(128)], 1, s)
        for _ in range(2):
            yield Workload(f"shared S={s} 256x(128+256)", own(128, system), 256, s)
        if s == 8192:
            for name, sampling in PARAMETERS.items():
                yield Workload(f"shared S={s} 256x(128+256), {name}", own(128, system), 256, s, sampling)
    for _ in range(3):
        yield Workload("first token S=0", [ids(128)], 1)
    yield Workload("single 128+256", [ids(128)], 256)
    yield Workload("single 128+256, top_p", [ids(128)], 256, sampling=dict(SAMPLED))
    systems = [ids(8192) for _ in range(8)]
    for system in systems:
        yield Workload("first token cold, 8 systems", [system + ids(128)], 1, 8192)
    prompts = [systems[i % 8] + ids(128) for i in range(256)]
    yield Workload("8 systems S=8192 256x(128+256)", prompts, 256, 8192)
    for name, sampling in PARAMETERS.items():
        yield Workload(f"plain 256x(128+256), {name}", own(128), 256, sampling=sampling)
    yield Workload("form, 8 requests", [ids(128) for _ in range(8)], 16, num_formed=8)
    for count in (0, 128):
        yield Workload(f"plain 256x(128+256), {count} under a schema", own(128), 256, num_formed=count)
    for s in (256, 1500):
        prompts = [ids(s) + ids(64) for _ in range(MAX_NUM_SEQS)]
        yield Workload(f"new: 256 prompts of {s} + 64, 64 out", prompts, 64, s)
    systems = [ids(8192) for _ in range(80)]
    prompts = [system + ids(128) for _ in range(2) for system in systems]
    yield Workload("in turn: 80 prompts of 8192, 2nd round", prompts, 1, 8192, in_turn=True, uncounted=80)

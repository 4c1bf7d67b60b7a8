"""The standing GPU workloads, as token ids: any engine that takes token-id prompts can run them.

Shapes of published networks (SHAPES), random weights. All requests of a workload are handed over at once, or one after
the other where it is `in_turn`; `seconds` is from then until the last token. Output length is fixed (ignore_eos,
min_tokens == max_tokens).
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

QWEN3_30B_A3B = LLAMA_8B | dict(
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    num_hidden_layers=48,
    num_key_value_heads=4,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
)
GPT_OSS_20B = LLAMA_8B | dict(
    architectures=["GptOssForCausalLM"],
    model_type="gpt_oss",
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,
    num_local_experts=32,
    num_experts_per_tok=4,
    num_hidden_layers=24,
    num_attention_heads=64,
    head_dim=64,
    sliding_window=128,
    attention_bias=True,
    rope_theta=150000.0,
    rope_scaling=dict(
        rope_type="yarn",
        factor=32.0,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=False,
        original_max_position_embeddings=4096,
    ),
    quantization_config=dict(quant_method="mxfp4"),
)
MIXTRAL_8X7B = LLAMA_8B | dict(
    architectures=["MixtralForCausalLM"],
    model_type="mixtral",
    vocab_size=32000,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=32768,
    rope_theta=1000000.0,
    sliding_window=None,
)
QWEN3_8B = LLAMA_8B | dict(
    architectures=["Qwen3ForCausalLM"],
    model_type="qwen3",
    vocab_size=151936,
    intermediate_size=12288,
    num_hidden_layers=36,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
)
MISTRAL_SMALL_24B = LLAMA_8B | dict(
    architectures=["MistralForCausalLM"],
    model_type="mistral",
    vocab_size=131072,
    hidden_size=5120,
    intermediate_size=32768,
    num_hidden_layers=40,
    rope_theta=1000000000.0,
    sliding_window=None,
)
GEMMA_3_27B = LLAMA_8B | dict(
    architectures=["Gemma3ForCausalLM"],
    model_type="gemma3_text",
    vocab_size=262208,
    hidden_size=5376,
    intermediate_size=21504,
    num_hidden_layers=62,
    num_key_value_heads=16,
    query_pre_attn_scalar=168,
    sliding_window=1024,
    sliding_window_pattern=6,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    rope_local_base_freq=10000.0,
    rope_scaling=dict(rope_type="linear", factor=8.0),
    hidden_activation="gelu_pytorch_tanh",
    tie_word_embeddings=True,
)
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": LLAMA_8B,
    "qwen3-8b": QWEN3_8B,
    "mistral-small-24b": MISTRAL_SMALL_24B,
    "gemma-3-27b": GEMMA_3_27B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "gpt-oss-20b": GPT_OSS_20B,
    "mixtral": MIXTRAL_8X7B,
}
"""Configurations by name. What one H100 (3.35 TB/s, 989 TFLOP/s in bfloat16) cannot do in less, if every step reads
each weight that some token needs and the KV cache once, and computes nothing twice:

                          plain 256x(128+256)   single 128+256   shared S=8192 256x   cold S=8192   warm S=8192
    qwen3-30b-a3b               5.3 s                0.46 s             5.7 s             72 ms         18 ms
    gpt-oss-20b, MXFP4          1.3 s                0.28 s             1.5 s             50 ms          4 ms

A step of 256 rows needs every expert: 60 GB of Qwen3's weights, 12.6 GB of gpt-oss'. So does a chunk of 128 tokens, if
the router spreads them evenly; one row needs 6.1 GB and 3.7 GB. 16 prompts of 8,192 tokens take Qwen3 1.2 s at the
peak of the tensor cores. Mixtral's weights are 93 GB, and run on an H200.
"""

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


def workloads(seed: int = 0, vocab_size: int = 128000) -> Iterator[Workload]:
    """In an order that matters: "cold" is the first sight of a system prompt, "warm" and "shared" come after it.

    Args:
        vocab_size: Token ids are smaller.
    """
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(10, vocab_size) for _ in range(n)]

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
    yield Workload("16 prompts of 8192", [ids(8192) for _ in range(16)], 1)

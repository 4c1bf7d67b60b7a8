"""The standing GPU workloads, as token ids: any engine that takes token-id prompts can run them.

Llama-3.1-8B's shape (LLAMA_8B), random weights. All requests of a workload are handed over at once; `seconds` is from
then until the last token. Output length is fixed (ignore_eos, min_tokens == max_tokens, greedy).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

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


def workloads(seed: int = 0) -> Iterator[tuple[str, list[int] | None, list[list[int]], int]]:
    """Yields (name, system_token_ids or None, prompts, output_tokens); a prompt starts with its system prompt's ids.

    Order matters: "cold" is the first sight of a system prompt, "warm" and "shared" come after it.
    """
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(10, 128000) for _ in range(n)]

    yield "warmup", None, [ids(200) for _ in range(8)], 16
    yield "plain 256x(1024+256)", None, [ids(1024) for _ in range(256)], 256
    yield "plain 256x(128+256)", None, [ids(128) for _ in range(256)], 256
    for s in (2048, 8192, 32768):
        system = ids(s)
        yield f"first token cold S={s}", system, [system + ids(128)], 1
        for _ in range(3):
            yield f"first token warm S={s}", system, [system + ids(128)], 1
        for _ in range(2):
            yield f"shared S={s} 256x(128+256)", system, [system + ids(128) for _ in range(256)], 256
    for _ in range(3):
        yield "first token S=0", None, [ids(128)], 1
    yield "single 128+256", None, [ids(128)], 256
    systems = [ids(8192) for _ in range(8)]
    for system in systems:
        yield "first token cold, 8 systems", system, [system + ids(128)], 1
    yield "8 systems S=8192 256x(128+256)", None, [systems[i % 8] + ids(128) for i in range(256)], 256

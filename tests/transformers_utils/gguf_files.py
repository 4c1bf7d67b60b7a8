"""Makes small GGUF files for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, INNER, LAYERS, VOCAB = 64, 4, 2, 96, 2, 300

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_letters() -> list[str]:
    """GPT-2's letters for the bytes 0 to 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and the merges of a tokenizer that knows bytes, a few words and three control tokens."""
    words = ["he", "ll", "hell", "hello", "12"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_letters(), *words]
    tokens += [f"<unused{i}>" for i in range(VOCAB - len(tokens) - 1)] + ["<tag>"]
    types = [3] * 3 + [1] * (VOCAB - 4) + [4]
    return tokens, types, ["h e", "l l", "he ll", "hell o", "1 2"]


def weights(tied: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights by GGUF name; query and key rows as GGUF orders them."""
    rng = np.random.default_rng(seed)

    def make(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    kv_size = HIDDEN // HEADS * KV_HEADS
    named = {"token_embd.weight": make(VOCAB, HIDDEN), "output_norm.weight": make(HIDDEN)}
    if not tied:
        named["output.weight"] = make(VOCAB, HIDDEN)
    for i in range(LAYERS):
        named |= {
            f"blk.{i}.attn_norm.weight": make(HIDDEN),
            f"blk.{i}.attn_q.weight": make(HIDDEN, HIDDEN),
            f"blk.{i}.attn_k.weight": make(kv_size, HIDDEN),
            f"blk.{i}.attn_v.weight": make(kv_size, HIDDEN),
            f"blk.{i}.attn_output.weight": make(HIDDEN, HIDDEN),
            f"blk.{i}.ffn_norm.weight": make(HIDDEN),
            f"blk.{i}.ffn_gate.weight": make(INNER, HIDDEN),
            f"blk.{i}.ffn_up.weight": make(INNER, HIDDEN),
            f"blk.{i}.ffn_down.weight": make(HIDDEN, INNER),
        }
    return named


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray] | None = None,
    *,
    architecture: str = "llama",
    tokenizer_model: str = "gpt2",
    pre: str | None = "smollm",
    quantise: gguf.GGMLQuantizationType | Mapping[str, gguf.GGMLQuantizationType] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Writes a two-layer network with its tokenizer; `quantise` applies to matrices, or names the type of some
    by the second last part of their names; `extra` holds further numbers."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens, types, merges = vocabulary()
    writer.add_tokenizer_model(tokenizer_model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for key, value in (extra or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, array in (weights() if tensors is None else tensors).items():
        kind = quantise.get(name.split(".")[-2]) if isinstance(quantise, Mapping) else quantise
        if kind is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

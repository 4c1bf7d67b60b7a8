"""What K/V bytes depend on besides the tokens: a snapshot is used only where all of it is the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec

from vllm.config import ModelConfig

FORMAT_VERSION = 4

_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "max_position_embeddings")
_NOT_OF_THE_NETWORK = ("_name_or_path", "transformers_version", "architectures", *_ROPE_KEYS)


class SnapshotIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model, how its KV is laid out, and what turned text into tokens.

    Attributes:
        format_version: Of the files.
        weights / network / rope / tokenizer / chat_template: SHA-256 (hex) of what they name.
        adapter: Digest of the adapter that the KV was computed with; empty for none.
        dtype: Of the computation.
        kv_dtype: Of the K/V bytes.
        arithmetic: Which of several ways to multiply the processor takes, where they round differently.
        layout: How the attention backend orders the bytes inside a block.
        block_bytes: Bytes of a block of one rank in K of every layer, then in V of every layer; those of the full group
            first, then those of the window group.
        num_window_tensors: How many of them are of the window group.
        block_size: Tokens in a block.
        rank, num_ranks: Which share of the KV heads it is.
    """

    format_version: int
    weights: str
    network: str
    rope: str
    tokenizer: str
    chat_template: str
    adapter: str
    dtype: str
    kv_dtype: str
    arithmetic: str
    layout: str
    block_bytes: tuple[int, ...]
    block_size: int
    rank: int
    num_ranks: int
    num_window_tensors: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over all of it."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    def differences(self, other: SnapshotIdentity) -> list[str]:
        """Names of the fields that differ."""
        return [name for name in self.__struct_fields__ if getattr(self, name) != getattr(other, name)]


def snapshot_identity(
    model: ModelConfig,
    *,
    kv_dtype: str,
    arithmetic: str,
    layout: str,
    block_size: int,
    block_bytes: tuple[int, ...],
    rank: int,
    num_ranks: int,
    num_window_tensors: int = 0,
) -> SnapshotIdentity:
    """The identity of the K/V that one rank computes with `model`."""
    shape = model.hf_config.to_dict()
    weights = model.weights_digest
    if model.load_format == "dummy":
        weights = f"dummy {model.seed or 0} {weights}"
    return SnapshotIdentity(
        format_version=FORMAT_VERSION,
        weights=weights,
        network=_digest({k: v for k, v in shape.items() if k not in _NOT_OF_THE_NETWORK}),
        rope=_digest({k: shape.get(k) for k in _ROPE_KEYS}),
        tokenizer=model.tokenizer_digest,
        chat_template=model.chat_template_digest,
        adapter="",
        dtype=model.dtype,
        kv_dtype=kv_dtype,
        arithmetic=arithmetic,
        layout=layout,
        block_bytes=block_bytes,
        block_size=block_size,
        rank=rank,
        num_ranks=num_ranks,
        num_window_tensors=num_window_tensors,
    )


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, default=str, sort_keys=True).encode()).hexdigest()

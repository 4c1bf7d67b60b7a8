"""Draws and log-probabilities by the compiled CPU kernels, for float32 logits; `sampling.py` says what is computed."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int64, c_void_p, pointer

import torch

from vllm.ops.cpu.library import address, kernels, threads
from vllm.ops.sampling import SamplingTables


class TablesStruct(ctypes.Structure):
    """`SamplingTables` of `csrc/cpu/api.h`."""

    _fields_ = [
        ("floats", c_void_p),
        ("ints", c_void_p),
        ("bias_ids", c_void_p),
        ("bias_values", c_void_p),
        ("stop_ids", c_void_p),
        ("bad_tokens", c_void_p),
        ("bad_ends", c_void_p),
        ("allowed", c_void_p),
        ("counts", c_void_p),
        ("max_bias", c_int64),
        ("max_stops", c_int64),
        ("max_bad_tokens", c_int64),
        ("max_bad_sequences", c_int64),
        ("allowed_words", c_int64),
        ("vocab_size", c_int64),
    ]

    @classmethod
    def of(cls, tables: SamplingTables) -> TablesStruct:
        """Points to the tables, which must outlive it."""
        widths = (tables.bias_ids, tables.stop_ids, tables.bad_tokens, tables.bad_ends, tables.allowed, tables.counts)
        return cls(*(address(table) for table in tables), *(table.shape[1] for table in widths))


class SamplingStruct(ctypes.Structure):
    """`Sampling` of `csrc/cpu/api.h`, with its `TokenMasks`."""

    _fields_ = [
        ("tables", POINTER(TablesStruct)),
        ("mask_words", c_void_p),
        ("mask_stride", c_int64),
        ("mask_of", c_void_p),
        ("drawn", c_void_p),
        ("logits", c_void_p),
    ]

    @classmethod
    def of(
        cls,
        tables: TablesStruct,
        drawn: torch.Tensor,
        masks: torch.Tensor | None,
        mask_rows: torch.Tensor | None,
        logits: torch.Tensor | None = None,
    ) -> SamplingStruct:
        """Points to what it is given, which must outlive it; `sample` says what the masks are."""
        struct = cls(pointer(tables), drawn=address(drawn), logits=address(logits))
        if masks is not None and mask_rows is not None:
            if masks.shape[1] * 32 < tables.vocab_size or masks.stride(1) != 1:
                raise ValueError(
                    f"masks of {masks.shape[1]} words do not cover {tables.vocab_size} tokens, or are not contiguous"
                )
            struct.mask_words, struct.mask_stride = address(masks), masks.stride(0)
            struct.mask_of = address(mask_rows)
        return struct


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    num_tokens: torch.Tensor,
    token_ids: torch.Tensor,
    tables: SamplingTables,
    masks: torch.Tensor | None = None,
    mask_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draws a token for each row of the logits, writes it to `token_ids[row, num_tokens]` and counts it where the row
    has penalties.

    Args:
        logits: float32 [N, vocab_size], contiguous; not changed.
        rows: Row of the tables and of `token_ids` for each, each once; int64 [N].
        num_tokens: Tokens of each row so far, prompt and output; int64 [N].
        token_ids: int64 [rows, positions].
        masks: Bit i % 32 of word i // 32 allows token i; int32 [M, at least vocab_size / 32].
        mask_rows: Which row of `masks` each row of the logits obeys, -1 for none; int64 [N].

    Returns int64 [N].
    """
    struct = TablesStruct.of(tables)
    check_logits(logits, (len(rows), struct.vocab_size))
    drawn = torch.empty(len(rows), dtype=torch.int64)
    sampling = SamplingStruct.of(struct, drawn, masks, mask_rows)
    kernels().vsp_sample(
        address(logits),
        c_int64(len(rows)),
        address(rows),
        address(num_tokens),
        address(token_ids),
        c_int64(token_ids.stride(0)),
        byref(sampling),
        threads(),
    )
    return drawn


def logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities under `softmax(logits)`.

    Args:
        logits: float32 [N, vocab_size], contiguous.
        tokens: One of each row; int64 [N].
        k: Most likely tokens wanted of each row, 0 … vocab_size.

    Returns of the tokens the values, float32 [N], and the ranks, 1 for the most likely one, int64 [N]; of the most
    likely ones the values, falling, float32 [N, k], and which they are, of equals the lower first, int64 [N, k].
    """
    count, vocab_size = logits.shape
    check_logits(logits, (len(tokens), vocab_size))
    if not 0 <= k <= vocab_size:
        raise ValueError(f"k is {k}; it is 0 … {vocab_size}, the size of the vocabulary")
    values, ranks = torch.empty(count), torch.empty(count, dtype=torch.int64)
    top_values, top_tokens = torch.empty(count, k), torch.empty(count, k, dtype=torch.int64)
    kernels().vsp_logprobs(
        address(logits),
        c_int64(count),
        c_int64(vocab_size),
        address(tokens),
        c_int64(k),
        address(values),
        address(ranks),
        address(top_values),
        address(top_tokens),
        threads(),
    )
    return values, ranks, top_values, top_tokens


def check_logits(logits: torch.Tensor, shape: tuple[int, int]) -> None:
    if logits.shape != shape or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(
            f"logits must be float32 {list(shape)} and contiguous, not {logits.dtype} {list(logits.shape)}"
        )

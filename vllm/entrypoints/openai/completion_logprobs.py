"""`choices[].logprobs` of text completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.chat.logprobs import clamp, token_name
from vllm.outputs import TokenLogprobs
from vllm.transformers_utils.tokenizer import Tokenizer


def completion_logprobs_json(
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None] | None,
    tokenizer: Tokenizer,
    as_token_ids: bool,
    text_offset: int = 0,
) -> dict[str, Any]:
    """Parallel lists, one entry a token.

    `top_logprobs` holds the most likely tokens and the chosen one, so up to one more than was asked for. The first
    token of an echoed prompt has none.

    Args:
        text_offset: Characters of the choice's text before the first of these tokens.
    """
    tokens: list[str] = []
    offsets: list[int] = []
    chosen: list[float | None] = []
    top: list[dict[str, float] | None] = []
    for token_id, entries in zip(token_ids, logprobs or (), strict=False):
        lp = entries.get(token_id) if entries else None
        name = token_name(token_id, lp, tokenizer, as_token_ids)
        tokens.append(name)
        offsets.append(text_offset)
        text_offset += len(name)
        chosen.append(clamp(lp.logprob) if lp else None)
        top.append(
            {token_name(t, e, tokenizer, as_token_ids): clamp(e.logprob) for t, e in entries.items()}
            if entries
            else None
        )
    return {"text_offset": offsets, "token_logprobs": chosen, "tokens": tokens, "top_logprobs": top}

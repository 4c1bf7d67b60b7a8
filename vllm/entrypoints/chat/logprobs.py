"""Log-probabilities as chat and text completions show them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from vllm.engine.logprobs import PromptLogprobs
from vllm.engine.work_lanes import WorkLanes
from vllm.entrypoints.openai.protocol import clamp
from vllm.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from vllm.transformers_utils.tokenizer import Tokenizer

# Shaped in some milliseconds.
_MANY = 1024
_T = TypeVar("_T")


def num_logprobs(prompts: Iterable[RequestOutput], outputs: Iterable[CompletionOutput]) -> int:
    """Log-probabilities that an answer with these prompts and outputs has to show, about."""
    of_prompts = (item.prompt_logprobs for item in prompts)
    total = sum(rows.num_entries for rows in of_prompts if isinstance(rows, PromptLogprobs))
    return total + sum(len(rows) * len(rows[-1]) for rows in (output.logprobs for output in outputs) if rows)


async def shaped(shape: Callable[[], _T], lanes: WorkLanes, size: int) -> _T:
    """What `shape()` makes of so many log-probabilities; of many, off the event loop."""
    return shape() if size <= _MANY else await lanes.run(shape, size=size)


def chat_logprobs_json(
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs] | None,
    top: int,
    tokenizer: Tokenizer,
    as_token_ids: bool,
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat completion: each token with its bytes and the `top` most likely ones."""

    def entry(token_id: int, lp: Logprob | None) -> dict[str, Any]:
        return {
            "token": _token_name(token_id, lp, tokenizer, as_token_ids),
            "logprob": clamp(lp.logprob) if lp else -9999.0,
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = []
    for token_id, entries in zip(token_ids, logprobs or (), strict=False):
        chosen = entry(token_id, entries.get(token_id))
        chosen["top_logprobs"] = [entry(other, lp) for other, lp in _most_likely(entries, top)]
        content.append(chosen)
    return {"content": content, "refusal": None}


def _most_likely(entries: TokenLogprobs, top: int) -> list[tuple[int, Logprob]]:
    return sorted(entries.items(), key=lambda item: -item[1].logprob)[:top]


def _token_name(token_id: int, lp: Logprob | None, tokenizer: Tokenizer, as_token_ids: bool) -> str:
    if as_token_ids:
        return f"token_id:{token_id}"
    if lp is not None and lp.decoded_token is not None:
        return lp.decoded_token
    return tokenizer.token_text(token_id)


def completion_logprobs_json(
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None] | None,
    tokenizer: Tokenizer,
    as_token_ids: bool,
    text_offset: int = 0,
) -> dict[str, Any]:
    """`choices[].logprobs` of a text completion: parallel lists, one entry a token.

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
        name = _token_name(token_id, lp, tokenizer, as_token_ids)
        tokens.append(name)
        offsets.append(text_offset)
        text_offset += len(name)
        chosen.append(clamp(lp.logprob) if lp else None)
        top.append(
            {_token_name(t, e, tokenizer, as_token_ids): clamp(e.logprob) for t, e in entries.items()}
            if entries
            else None
        )
    return {"text_offset": offsets, "token_logprobs": chosen, "tokens": tokens, "top_logprobs": top}

"""Log-probabilities of tokens: how answers show them, and where the work of it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from vllm.engine.logprobs import PromptLogprobs
from vllm.engine.work_lanes import WorkLanes
from vllm.entrypoints.chat.events import Tokens
from vllm.outputs import Logprob, TokenLogprobs
from vllm.transformers_utils.tokenizer import Tokenizer

# Shaped in some milliseconds.
_MANY = 1024
_T = TypeVar("_T")


def num_logprobs(
    prompts: Iterable[Sequence[TokenLogprobs | None] | None], outputs: Iterable[Sequence[TokenLogprobs] | None]
) -> int:
    """Log-probabilities that an answer with these rows of its prompts and outputs has to show, about."""
    total = sum(rows.num_entries for rows in prompts if isinstance(rows, PromptLogprobs))
    return total + sum(len(rows) * len(rows[-1]) for rows in outputs if rows)


async def shaped(shape: Callable[[], _T], lanes: WorkLanes, size: int) -> _T:
    """What `shape()` makes of so many log-probabilities; of many, off the event loop."""
    return shape() if size <= _MANY else await lanes.run(shape, size=size)


class LogprobWriter:
    """Writes the log-probabilities of an answer: each token with its bytes and the most likely ones at its place.

    Args:
        top: How many of the most likely tokens to show.
        as_token_ids: Name tokens by their ids.
    """

    def __init__(self, tokenizer: Tokenizer, top: int, as_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._as_token_ids = as_token_ids

    def write(self, tokens: Tokens) -> list[dict[str, Any]]:
        """An entry a token, as OpenAI's chats and responses both have them."""
        entries = []
        for token_id, row in zip(tokens.ids, tokens.logprobs or (), strict=False):
            chosen = self._entry(token_id, row.get(token_id))
            chosen["top_logprobs"] = [self._entry(other, lp) for other, lp in _most_likely(row, self._top)]
            entries.append(chosen)
        return entries

    def _entry(self, token_id: int, lp: Logprob | None) -> dict[str, Any]:
        return {
            "token": token_name(token_id, lp, self._tokenizer, self._as_token_ids),
            "logprob": clamp(lp.logprob) if lp else -9999.0,
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


def _most_likely(entries: TokenLogprobs, top: int) -> list[tuple[int, Logprob]]:
    return sorted(entries.items(), key=lambda item: -item[1].logprob)[:top]


def token_name(token_id: int, lp: Logprob | None, tokenizer: Tokenizer, as_token_ids: bool) -> str:
    if as_token_ids:
        return f"token_id:{token_id}"
    if lp is not None and lp.decoded_token is not None:
        return lp.decoded_token
    return tokenizer.token_text(token_id)


def clamp(logprob: float) -> float:
    """JSON has no -Infinity; -9999 stands for it, as in vLLM."""
    return max(logprob, -9999.0)

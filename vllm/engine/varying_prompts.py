"""Tells the operator, in words, where system prompts differ that are otherwise alike."""

from __future__ import annotations

from collections.abc import Iterable

from vllm.logger import init_logger
from vllm.outputs import VaryingSpanInfo
from vllm.transformers_utils.tokenizer import Tokenizer

logger = init_logger(__name__)


def describe_varying(span: VaryingSpanInfo, tokenizer: Tokenizer) -> str:
    """One sentence: where the prompts differ, what stands there, and what to do about it."""
    examples = " or ".join(repr(tokenizer.decode(ids)) if ids else "nothing" for ids in span.examples)
    where = f"after {tokenizer.decode(span.before)!r}" if span.before else "at their start"
    return (
        f"{span.num_prompts} system prompts differ only at token {span.position}, {where}: {examples}. Each is pinned "
        "for itself; moved to the end of the system prompt or into the user's message, that text would let them share "
        "what comes before it."
    )


def log_varying_prompts(spans: Iterable[VaryingSpanInfo], tokenizer: Tokenizer) -> None:
    for span in spans:
        logger.warning("%s", describe_varying(span, tokenizer))

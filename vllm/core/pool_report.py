"""What the pool tells about itself: why a prompt is refused, what would happen to a request, and its figures."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import TYPE_CHECKING, Any

from vllm.core.pinned_prompt import Outcome, prompt_id
from vllm.core.wants import wants_of
from vllm.inputs import CacheMark
from vllm.outputs import SystemPromptPoolInfo
from vllm.sequence import Sequence

if TYPE_CHECKING:
    from vllm.core.system_prompt_pool import SystemPromptPool


def reason(pool: SystemPromptPool, refusal: Outcome, num_tokens: int) -> str:
    """Why a prompt of so many tokens is refused, and what helps."""
    if refusal == Outcome.TOO_SHORT:
        return (
            f"The system prompt has {num_tokens} tokens; --system-prompt-min-tokens asks for at least "
            f"{pool.config.min_tokens}."
        )
    if refusal == Outcome.OVER_BUDGET:
        short = pool.window_shortage(num_tokens)
        if short is not None:
            return (
                f"The layers that read {short.window} tokens would keep the last {short.kept} of the system prompt's, "
                f"but {short.taken} of the {short.budget} tokens that they may keep of pinned prompts are taken; "
                "remove a prompt or raise --system-prompt-cache-tokens."
            )
        used = pool.taken_blocks * pool.block_size
        return (
            f"The system prompt has {num_tokens} tokens, but {used} of the pool's {pool.budget_tokens} tokens are "
            "taken; remove a prompt or raise --system-prompt-cache-tokens."
        )
    if refusal == Outcome.BUSY:
        return "The system prompt is being removed; its last readers still run."
    if pool.config.mode == "declared":
        return "Only prompts that an operator added are pinned (--system-prompt-cache declared)."
    return "The system-prompt pool is off (--system-prompt-cache off)."


def explain(
    pool: SystemPromptPool, seq: Sequence, num_system_tokens: int | None, marks: Several[CacheMark] = ()
) -> dict[str, Any]:
    """What would happen to a request, and why; changes nothing.

    Returns `outcome`, `pinned_tokens` (tokens read from extents of the pool), `id` of the prompt that it would read,
    `refused` (tokens and outcome of what cannot be pinned) and, where a known prompt is left early, `nearest`: its id,
    name and length, `position` of the first token that differs, and the two tokens there.
    """
    in_play = bool(num_system_tokens or marks)
    report: dict[str, Any] = {"outcome": None, "pinned_tokens": 0, "id": None, "refused": [], "nearest": None}
    if pool.config.mode == "off":
        return report | {"outcome": Outcome.DISABLED.value if in_play else None}
    if seq.sampling_params.prompt_logprobs is not None:
        return report | {"outcome": Outcome.PROMPT_LOGPROBS.value if in_play else None}
    decision = pool.decide(seq, wants_of(pool.config, seq, num_system_tokens, marks))
    report["pinned_tokens"] = decision.num_pinned_tokens
    report["refused"] = [
        {"num_tokens": want.num_tokens, "outcome": refusal.value, "reason": reason(pool, refusal, want.num_tokens)}
        for want, refusal in decision.refused
    ]
    if decision.creates:
        want = decision.creates[-1]
        token_ids = seq.token_ids[: want.num_tokens]
        outcome = Outcome.CREATED if pool.is_reused(token_ids, want) else Outcome.PROBATION
        report |= {"outcome": outcome.value, "id": prompt_id(token_ids, want.scope)}
    elif decision.known:
        report |= {"outcome": Outcome.HIT.value, "id": decision.known[-1].id}
    elif decision.refused:
        report["outcome"] = decision.refused[-1][1].value
    report["nearest"] = _nearest(pool, seq, decision.known[-1].num_tokens if decision.known else 0)
    return report


def _nearest(pool: SystemPromptPool, seq: Sequence, at_least: int) -> dict[str, Any] | None:
    """The prompt that a request follows furthest before it differs, if that is further than `at_least`."""
    walk = pool.nearest(seq)
    if walk is None or walk.nearest is None or walk.num_matched <= at_least:
        return None
    prompt, position = walk.nearest, walk.num_matched
    ends = position >= seq.num_prompt_tokens
    return {
        "id": prompt.id,
        "name": prompt.name,
        "num_tokens": prompt.num_tokens,
        "position": position,
        "pinned_token": prompt.token_ids[position] if position < prompt.num_tokens else None,
        "request_token": None if ends else seq.token_ids[position],
    }


def info(pool: SystemPromptPool) -> SystemPromptPoolInfo:
    """The pool's figures."""
    num_bytes = pool.num_bytes
    return SystemPromptPoolInfo(
        mode=pool.config.mode,
        budget_tokens=pool.budget_tokens,
        pinned_tokens=pool.pinned_tokens,
        prompts=pool.num_prompts,
        readers=pool.num_readers,
        tokens_reused=pool.tokens_reused,
        prefills=pool.num_prefills,
        displaced=pool.num_displaced,
        outcomes=dict(pool.outcomes),
        refused=pool.log.refused,
        varying=pool.log.varying,
        pinned_bytes=num_bytes.pinned,
        budget_bytes=num_bytes.budget,
    )

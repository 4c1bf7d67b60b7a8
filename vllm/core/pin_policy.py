"""Who gives way to whom when the pool is full.

What a prompt is worth is how often it is asked for: the prefill that it saves grows with its tokens as its room does,
so tokens cancel out. Requests that may come with a system part are counted, and serve as the clock: a prompt that was
used u times since request a, last at request b, is worth at request n

    min(u / (n - a + 1), 1 / (n - b + 1))

uses a request: its rate so far, but no more than its silence allows, so that a fallen star fades. What leaves the
device and stays on the host is loaded again instead of computed, so only a part of its worth is lost.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator
from enum import IntEnum

from vllm.core.pinned_prompt import PinClass, PinnedPrompt, PromptState

USES_OF_A_PIN = 2
"""The use that ends a prompt's probation."""

# A load takes about so much of the time of a prefill: of 8,192 tokens of Llama-3.1-8B on an H100, 1 GiB over PCIe 5 in
# 25 ms instead of 220 ms.
_PART_OF_A_LOAD = 1 / 8
# A newcomer must be worth so many times what is lost for it. Prompts that come in turn, more of them than fit, are
# worth up to twice as much just when they come as those of which the last use is longest ago; displacing these would
# make each of them leave before its next use.
_TIMES_WORTH = 2.0
# While the host tier is full, what was used once gives way to what was used once after so many requests for each image
# in it. With 1, prompts that come in turn, a few more than fit, would all leave before their next use.
_PATIENCE = 2


class Claim(IntEnum):
    """What a prompt that needs room may displace: prompts on probation; also idle pins that are worth less than it; any
    idle prompt that is not hard."""

    NEW = 0
    REUSED = 1
    HARD = 2


def claim_of(prompt: PinnedPrompt) -> Claim:
    if prompt.pin == PinClass.HARD:
        return Claim.HARD
    return Claim.NEW if prompt.on_probation else Claim.REUSED


def worth(uses: int, first_use: int, last_use: int, now: int) -> float:
    """Uses a request, at the request `now`."""
    return min(uses / (now - first_use + 1), 1 / (now - last_use + 1))


def worth_now(prompt: PinnedPrompt, now: int) -> float:
    return worth(prompt.uses, prompt.first_use, prompt.last_use, now)


def giving_way(
    prompts: Collection[PinnedPrompt],
    claim: Claim,
    pin: PinClass,
    value: float,
    may_leave_again: bool,
    now: int,
    is_on_host: Callable[[PinnedPrompt], bool],
    keep: Iterable[PinnedPrompt] = (),
) -> Iterator[PinnedPrompt]:
    """Prompts that would leave the device at once for one with this claim, in the order in which they go.

    Those go first of which least is lost; for an operator's prompt, what is on probation goes before soft pins, and
    those before automatic ones. A prompt goes after those that continue it on the device.

    Args:
        prompts: All of the pool.
        pin, value: Class and worth of the newcomer.
        may_leave_again: The host has a copy of the newcomer or room for one. A place on the device that one prompt
            after the other can use is not taken for good by one that is worth no more than those.
        now: Number of the latest request.
        keep: Prompts that stay.
    """
    kept = set(keep)

    def loss(prompt: PinnedPrompt) -> float:
        part = _PART_OF_A_LOAD if is_on_host(prompt) else 1.0
        return part * worth_now(prompt, now)

    def may_go(prompt: PinnedPrompt) -> bool:
        if prompt.readers or prompt.doomed or prompt.pin == PinClass.HARD or prompt in kept:
            return False
        if prompt.state != PromptState.PINNED or prompt.is_being_written:
            return False
        if prompt.on_probation:
            return True
        if prompt.is_being_saved or claim == Claim.NEW:
            return False
        if claim == Claim.HARD or (may_leave_again and is_on_host(prompt)):
            return True
        return prompt.pin <= pin and _TIMES_WORTH * worth_now(prompt, now) <= value

    def entry(prompt: PinnedPrompt) -> tuple[int, float, float, str, PinnedPrompt]:
        firmness = 0 if claim != Claim.HARD or prompt.on_probation else 1 + prompt.pin
        return firmness, loss(prompt), prompt.last_used, prompt.id, prompt

    # Counted now: the caller may displace what it has been given before it asks for the next one.
    num_left = {p: p.num_children_on_device for p in prompts if p.children}
    heap = [entry(p) for p in prompts if not num_left.get(p) and may_go(p)]
    heapq.heapify(heap)
    while heap:
        prompt = heapq.heappop(heap)[-1]
        yield prompt
        parent = prompt.parent
        if parent is not None:
            num_left[parent] -= 1
            if not num_left[parent] and may_go(parent):
                heapq.heappush(heap, entry(parent))


def leaving_host(owners: Iterable[PinnedPrompt], is_reused: bool, value: float, now: int) -> Iterator[PinnedPrompt]:
    """Prompts whose images would leave the host tier for that of a newcomer, in the order in which they go.

    What was used once makes no room there but that of others that were used once, long ago.

    Args:
        owners: Whose images are in the tier and not in use.
        is_reused, value: Of the newcomer.
    """
    ordered = sorted(owners, key=lambda p: worth_now(p, now))
    for prompt in ordered:
        if is_reused:
            gives_way = _TIMES_WORTH * worth_now(prompt, now) <= value
        else:
            gives_way = prompt.on_probation and now - prompt.last_use > _PATIENCE * len(ordered)
        if gives_way:
            yield prompt

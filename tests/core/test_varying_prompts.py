"""System prompts that differ in a short span are noticed once, and others are left alone."""

from __future__ import annotations

import random

from vllm.core.varying_prompts import VaryingPrompts
from vllm.token_ids import token_array

HEAD, TAIL = list(range(100, 140)), list(range(200, 260))


def see(watch, token_ids):
    return watch.see(str(token_ids), token_array(token_ids))


def test_a_short_span_is_told_once_and_counted_on():
    watch = VaryingPrompts()
    assert see(watch, [*HEAD, 1, 2, *TAIL]) is None
    span = see(watch, [*HEAD, 3, *TAIL])
    assert (span.position, span.num_shared, span.examples) == (40, 100, [[1, 2], [3]])
    assert span.before == HEAD[-12:]
    for other in ([4, 5, 6], [7], [], [7]):
        assert see(watch, [*HEAD, *other, *TAIL]) is None
    (listed,) = watch.spans
    assert listed.num_prompts == 5 and len(listed.examples) == 3


def test_the_span_widens_to_what_varies():
    watch = VaryingPrompts()
    see(watch, [*HEAD, 2, 0, 2, 6, *TAIL])
    assert see(watch, [*HEAD, 2, 0, 2, 7, *TAIL]).position == 43
    see(watch, [*HEAD, 1, 9, 9, 9, *TAIL])
    assert [span.position for span in watch.spans] == [40]


def test_other_prompts_are_no_template():
    watch = VaryingPrompts()
    rng = random.Random(0)
    for prompt in (
        [*HEAD, *range(500, 530), *TAIL],
        [*HEAD, *range(600, 630), *TAIL],
        HEAD[:31],
        [*HEAD[:30], 5],
        [rng.randrange(1000) for _ in range(100)],
        [rng.randrange(1000) for _ in range(100)],
    ):
        assert see(watch, prompt) is None
        assert see(watch, prompt) is None
    assert watch.spans == []


def test_a_span_is_found_wherever_it_is():
    """Of long prompts, two windows are looked at before they are compared."""
    rng = random.Random(1)
    for length in (*range(132, 190, 7), 500, 501, 502, 503):
        prompt = [rng.randrange(1000) for _ in range(length)]
        for size, other in ((1, 1), (24, 24), (24, 0), (0, 24), (3, 20)):
            for position in {0, 1, length // 4, length // 2, 3 * length // 4, length - size}:
                watch = VaryingPrompts()
                see(watch, prompt)
                start = min(position, length - size)
                found = see(watch, [*prompt[:start], *range(2000, 2000 + other), *prompt[start + size :]])
                assert found is not None and found.num_shared >= length - size, (length, size, other, start)

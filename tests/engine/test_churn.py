"""A thousand requests over forty system prompts, many of them aborted: nothing leaks and nothing is computed twice."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.engine.helpers import Request, add, assert_nothing_held, greedy, run, tokens
from vllm.engine.llm_engine import LLMEngine

NUM_REQUESTS, NUM_PROMPTS = 1000, 40


@pytest.mark.usefixtures("pipeline_depth")
@pytest.mark.nightly
def test_a_thousand_requests_with_random_aborts(make_tiny: Callable[..., LLMEngine]) -> None:
    rng = random.Random(0)

    def random_ids(low: int, high: int) -> list[int]:
        return [rng.randrange(100, 40_000) for _ in range(rng.randint(low, high))]

    prompts = [random_ids(5, 70) for _ in range(NUM_PROMPTS)]
    requests, lengths = [], []
    for i in range(NUM_REQUESTS):
        system = prompts[i % NUM_PROMPTS]
        requests.append(Request([*system, *random_ids(1, 40)], len(system)))
        lengths.append(rng.randint(1, 24))
    order = list(range(NUM_REQUESTS))
    rng.shuffle(order)

    # When all are pinned, 40 blocks are left for up to 48 requests of up to four blocks each.
    num_pinned = sum(-(-len(system) // 16) for system in prompts)
    engine = make_tiny(
        max_model_len=256,
        num_gpu_blocks_override=num_pinned + 40,
        system_prompt_cache_tokens=num_pinned * 16,
        max_num_seqs=48,
        max_num_batched_tokens=256,
    )
    scheduler = engine.core.scheduler
    finished: dict[int, list[int]] = {}
    in_flight: set[int] = set()
    num_aborted = 0
    while order or engine.has_unfinished_requests():
        for _ in range(min(len(order), rng.choice([0, 0, 5, 20, 60]))):
            i = order.pop()
            add(engine, str(i), requests[i], greedy(lengths[i]))
            in_flight.add(i)
        for output in engine.step():
            i = int(output.request_id)
            finished[i] = list(output.outputs[0].token_ids)
            in_flight.remove(i)
        while in_flight and rng.random() < 0.35:
            i = rng.choice(sorted(in_flight))
            in_flight.remove(i)
            engine.abort_request(str(i))
            num_aborted += 1
            scheduler.check_integrity()

    while engine.core.has_work():
        assert engine.step() == []
    assert_nothing_held(engine)
    pool = engine.core.pool
    assert len(finished) + num_aborted == NUM_REQUESTS and num_aborted > 50 and not in_flight
    assert all(len(finished[i]) == lengths[i] for i in finished)
    assert (pool.num_prefills, pool.num_prompts) == (NUM_PROMPTS, NUM_PROMPTS)
    # What nobody waits for any more before its turn has come is dropped, and created when it comes again.
    assert pool.outcomes["probation"] == NUM_PROMPTS and pool.outcomes["created"] < 5
    assert pool.outcomes["hit"] + pool.outcomes["created"] == NUM_REQUESTS - NUM_PROMPTS
    assert scheduler.num_preemptions > 0

    plain = make_tiny(max_model_len=256, system_prompt_cache="off", enable_prefix_caching=False)
    sample = rng.sample(sorted(finished), 50)
    outputs = run(plain, [requests[i] for i in sample], [greedy(lengths[i]) for i in sample])
    assert tokens(outputs) == [finished[i] for i in sample]

    for info in engine.list_system_prompts():
        engine.remove_system_prompt(info.id)
    assert scheduler.blocks.num_free_blocks == num_pinned + 40
    scheduler.check_integrity()

"""Whose turn it is: the priority of requests counts where the operator says so, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.helpers import Request, add, finish, greedy
from vllm.engine.llm_engine import LLMEngine

PRIORITIES = {"late": 5, "none": 0, "first": -5}


@pytest.mark.parametrize(
    ("policy", "order"), [({}, ["late", "none", "first"]), ("priority", ["first", "none", "late"])], ids=str
)
def test_priority_counts_only_under_its_policy(
    make_tiny: Callable[..., LLMEngine], policy: Any, order: list[str]
) -> None:
    engine = make_tiny(max_num_seqs=1, **({"scheduling_policy": policy} if policy else {}))
    for request_id, priority in PRIORITIES.items():
        # Its second output forks from the first, and has the same place.
        add(engine, request_id, Request([1, 2, 3]), greedy(3, n=2), priority=priority)
    assert list(finish(engine)) == order


@pytest.mark.parametrize(("policy", "preempted"), [("fcfs", "new"), ("priority", "old")])
def test_who_gives_way_when_memory_is_short(make_tiny: Callable[..., LLMEngine], policy: str, preempted: str) -> None:
    engine = make_tiny(
        scheduling_policy=policy, max_model_len=128, num_gpu_blocks_override=9, enable_prefix_caching=False
    )
    add(engine, "old", Request([1] * 16), greedy(100), priority=5)
    engine.step()
    add(engine, "new", Request([2] * 16), greedy(100), priority=0)
    scheduler = engine.core.scheduler
    while not scheduler.num_preemptions:
        assert engine.has_unfinished_requests()
        engine.step()
    assert [seq.request_id for seq in scheduler.running] == [{"new": "old", "old": "new"}[preempted]]
    assert {len(output.outputs[0].token_ids) for output in finish(engine).values()} == {100}

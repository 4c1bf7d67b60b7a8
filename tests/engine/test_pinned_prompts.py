"""A system prompt is computed once, by itself, and stays, whatever else the engine has to do."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from tests.engine.helpers import Request, add, assert_nothing_held, finish, greedy, run, tokens
from vllm.engine.llm_engine import LLMEngine
from vllm.inputs import CacheMark
from vllm.step import StepPlan
from vllm.worker.running_step import RunningStep

MakeEngine = Callable[..., LLMEngine]


def ids(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100, 40_000) for _ in range(count)]


def asking(system: list[int], seed: int, count: int = 10) -> Request:
    """A request whose own part is no full block, so that only its system prompt can be cached."""
    return Request([*system, *ids(seed, count)], len(system))


def recorded_plans(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """The plans that the engine executes from now on."""
    plans: list[StepPlan] = []
    submit = engine.core.executor.submit

    def record(plan: StepPlan) -> RunningStep:
        plans.append(plan)
        return submit(plan)

    monkeypatch.setattr(engine.core.executor, "submit", record)
    return plans


def prefilled(engine: LLMEngine, plan: StepPlan) -> int:
    """Tokens of system prompts' own prefills that a plan computes."""
    first = engine.vllm_config.scheduler.max_num_seqs
    return sum(count for row, count in zip(plan.rows, plan.counts, strict=True) if row >= first)


def pinned_kv(engine: LLMEngine) -> list[torch.Tensor]:
    """K and V of the only pinned prompt, every layer."""
    (prompt,) = engine.core.list_system_prompts()
    (extent,) = prompt.extents
    cache = engine.core.executor._worker.runner.cache
    slots = cache.extent_slots(extent.start, prompt.num_tokens)
    return [tensor[slots].clone() for tensor in (*cache.k_caches, *cache.v_caches)]


@pytest.mark.parametrize("length", [1, 15, 16, 50])
def test_the_first_request_pays_and_every_later_one_reads_exactly_the_prompt(
    make_tiny: MakeEngine, length: int
) -> None:
    engine = make_tiny()
    system = ids(1, length)
    cached = [run(engine, [asking(system, 10 + i)], greedy(3))[0].num_cached_tokens for i in range(4)]
    assert cached == [0, length, length, length]
    assert engine.core.pool.num_prefills == 1


def test_a_flood_and_preemption_leave_a_pinned_prompt_as_it_was(
    make_tiny: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_tiny(max_model_len=256, num_gpu_blocks_override=40)
    system = ids(1, 50)
    probe = asking(system, 2)
    before = [run(engine, [probe], greedy(20)) for _ in range(2)][1]
    kv = pinned_kv(engine)
    plans = recorded_plans(engine, monkeypatch)
    # 36 blocks are left; 30 requests of five blocks fill them, with and without the system prompt.
    flood = [Request(ids(100 + i, 70)) for i in range(15)] + [asking(system, 200 + i, 70) for i in range(15)]
    outputs = run(engine, flood, greedy(12))
    assert engine.core.scheduler.num_preemptions > 0
    assert engine.core.scheduler.blocks.num_cached_blocks > 20
    assert all(map(torch.equal, kv, pinned_kv(engine)))
    assert [o.num_cached_tokens for o in outputs[15:]] == [50] * 15
    for plan in plans:
        assert not prefilled(engine, plan), "no token of the prompt is computed again"
        for seq in plan.started:
            at = plan.rows.index(seq.row)
            assert plan.starts[at] >= sum(extent.num_tokens for extent in seq.prefix)
    after = run(engine, [probe], greedy(20))
    assert after[0].num_cached_tokens == 50
    assert tokens(after) == tokens(before)
    assert engine.core.pool.num_prefills == 1
    assert_nothing_held(engine)


def test_fifty_simultaneous_cold_requests_cause_one_prefill(
    make_tiny: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_tiny()
    plans = recorded_plans(engine, monkeypatch)
    system = ids(1, 45)
    outputs = run(engine, [asking(system, i) for i in range(50)], greedy(2))
    assert sorted(o.num_cached_tokens for o in outputs) == [0] + [45] * 49
    assert sum(prefilled(engine, plan) for plan in plans) == 45
    assert sum(plan.num_tokens for plan in plans) == 45 + 50 * 10 + 50
    assert engine.core.pool.outcomes == {"probation": 1, "hit": 49}


def test_abort_of_the_request_that_brought_a_prompt_does_not_lose_it(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    system = ids(1, 45)
    add(engine, "first", asking(system, 1), greedy(5))
    add(engine, "second", asking(system, 2), greedy(5))
    engine.abort_request("first")
    outputs = finish(engine)
    assert list(outputs) == ["second"] and outputs["second"].num_cached_tokens == 45
    assert engine.core.pool.num_prefills == 1
    assert_nothing_held(engine)


def test_room_for_a_prompt_is_made_by_moving_blocks_in_use(
    make_tiny: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(pin: bool) -> tuple[dict[str, list[int]], list[StepPlan]]:
        engine = make_tiny(max_model_len=256, num_gpu_blocks_override=64, system_prompt_cache="auto" if pin else "off")
        plans = recorded_plans(engine, monkeypatch)
        # 16 requests of four blocks take all 64; a third of them end soon.
        for i in range(16):
            add(engine, str(i), Request(ids(i, 50)), greedy(2 if i % 3 == 0 else 14))
        outputs = {}
        for _ in range(4):
            outputs |= {o.request_id: o for o in engine.step()}
        add(engine, "late", asking(ids(99, 70), 98), greedy(14))
        outputs |= finish(engine)
        assert engine.core.scheduler.num_preemptions == 0
        assert_nothing_held(engine)
        return {request_id: list(o.outputs[0].token_ids) for request_id, o in outputs.items()}, plans

    moved, plans = serve(pin=True)
    still, _ = serve(pin=False)
    assert any(plan.moves for plan in plans)
    assert len(moved) == 17
    assert moved == still


def test_kv_of_a_prompt_is_the_same_bits_whoever_is_served_meanwhile(make_tiny: MakeEngine) -> None:
    system = ids(1, 150)
    limits = {"max_num_batched_tokens": 48, "max_num_seqs": 8}
    idle = make_tiny(**limits)
    idle.add_system_prompt(system)
    busy = make_tiny(**limits)
    for i in range(12):
        add(busy, str(i), Request(ids(10 + i, 5 + 9 * i)), greedy(40))
    for _ in range(3):
        busy.step()
    add(busy, "late", asking(system, 3), greedy(5))
    finish(busy)
    assert busy.core.pool.num_prefills == 1
    assert all(map(torch.equal, pinned_kv(idle), pinned_kv(busy)))
    assert pinned_kv(idle)[0].abs().sum() > 0


def test_namespaces_share_pinned_prompts_and_nothing_else(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    system = ids(1, 45)
    request = asking(system, 2, 40)

    def cached(salt: str | None, request: Request = request) -> int:
        return run(engine, [request], greedy(2), cache_salt=salt)[0].num_cached_tokens

    # Own parts have 40 tokens: two full blocks.
    assert cached("a") == 0
    assert cached("a") == 45 + 32
    assert cached("b") == 45
    assert cached("b") == 45 + 32
    assert cached(None) == 45
    plain = Request(ids(7, 40))
    assert [cached(salt, plain) for salt in ("a", "b", None, "a", "b", None)] == [0, 0, 0, 32, 32, 32]
    assert engine.core.pool.num_prefills == 1


SYSTEM, SENT, UNSENT, LONG = ids(1, 45), ids(2, 80), ids(3, 80), ids(4, 1100)


@pytest.mark.parametrize(
    ("asked", "other", "marks"),
    [
        (Request([*SYSTEM, *SENT, 7], 45), Request([*SYSTEM, *UNSENT, 7], 45), []),
        (Request([*SYSTEM, *SENT, 7], 45), Request([*SYSTEM, *UNSENT, 7], 45), [CacheMark(45 + 64, 300.0)]),
        (Request([*LONG, *SENT]), Request([*UNSENT, *LONG]), []),
    ],
    ids=["own part", "marked part", "shared head"],
)
def test_nothing_that_a_namespace_sends_changes_the_work_for_another(
    make_tiny: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    asked: Request,
    other: Request,
    marks: list[CacheMark],
) -> None:
    def work(earlier: Request, salt: str) -> tuple[object, ...]:
        """All that the ranks are told to do, and what usage says, for `asked` in the namespace `salt`."""
        engine = make_tiny(max_model_len=2048)
        run(engine, [asking(SYSTEM, 9)], greedy(2))
        for end in (8, 9):
            run(engine, [earlier._replace(token_ids=[*earlier.token_ids, end])], greedy(2), cache_salt="a", marks=marks)
        plans = recorded_plans(engine, monkeypatch)
        (output,) = run(engine, [asked], greedy(2), cache_salt=salt, marks=marks)
        steps = [(p.starts, p.counts, prefilled(engine, p), len(p.transfers)) for p in plans]
        return steps, output.num_cached_tokens, output.num_cache_write_tokens

    seen_by_b = work(asked, "b")
    assert seen_by_b == work(other, "b")
    assert seen_by_b != work(asked, "a"), "within a namespace it does change"


def test_own_blocks_behind_different_system_prompts_are_not_shared(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    suffix = ids(5, 40)
    requests = [Request([*system, *suffix], len(system)) for system in (ids(1, 32), ids(2, 32))]
    assert [run(engine, [r], greedy(2))[0].num_cached_tokens for r in (*requests, *requests)] == [0, 0, 64, 64]


def test_an_unpinned_prompt_still_uses_the_prefix_cache(make_tiny: MakeEngine) -> None:
    engine = make_tiny(system_prompt_cache="off")
    request = asking(ids(1, 45), 2, 10)
    outputs = [run(engine, [request], greedy(2))[0] for _ in range(2)]
    assert [o.num_cached_tokens for o in outputs] == [0, 48]
    engine.reset_prefix_cache()
    assert run(engine, [request], greedy(2))[0].num_cached_tokens == 0

"""Prompts that the device has no room for wait on the host, and come back while others are served."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engine.helpers import Request, add, assert_nothing_held, finish, greedy, run, tokens
from tests.engine.test_pinned_prompts import asking, ids, recorded_plans
from vllm.core import prompt_tiers
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.llm_engine import LLMEngine
from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.cuda import CudaPlatform
from vllm.step import ExtentCopy, HostImage, StepPlan

MakeEngine = Callable[..., LLMEngine]

BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4  # K and V, 2 layers, 16 slots, 2 heads of 16, float32
SYSTEMS = [ids(i, 40 + i) for i in range(6)]  # Three blocks each.


@pytest.fixture
def make_tiered(make_tiny: MakeEngine) -> MakeEngine:
    """Engines whose budget has room for two of the prompts, and whose host tier for `host` blocks."""

    def make(host: int = 64, **args: object) -> LLMEngine:
        flags = {"system_prompt_cache_tokens": 6 * 16, "system_prompt_host_cache_gib": host * BLOCK_BYTES / 2**30}
        return make_tiny(**(flags | args))

    return make


def settle(engine: LLMEngine) -> None:
    while engine.core.has_work():
        engine.step()


def states(engine: LLMEngine) -> list[str]:
    return sorted(p.state for p in engine.list_system_prompts())


@pytest.mark.usefixtures("pipeline_depth")
def test_more_prompts_than_the_budget_are_each_computed_once(make_tiered: MakeEngine) -> None:
    engine = make_tiered()
    first = [run(engine, [asking(system, 7)], greedy(12))[0] for system in SYSTEMS]
    settle(engine)
    assert states(engine) == ["host"] * 4 + ["probation"] * 2
    for round_ in range(3):
        again = [run(engine, [asking(system, 7)], greedy(12))[0] for system in SYSTEMS[:: 1 - 2 * (round_ % 2)]]
        again = again[:: 1 - 2 * (round_ % 2)]
        assert [o.num_cached_tokens for o in again] == [len(s) for s in SYSTEMS]
        assert tokens(again) == tokens(first)
        assert_nothing_held(engine)
    assert engine.core.pool.num_prefills == len(SYSTEMS)
    assert set(engine.core.pool.outcomes) == {"probation", "hit"}
    assert states(engine) == ["host"] * 4 + ["pinned"] * 2


def test_a_herd_waits_for_one_load_and_nobody_waits_with_it(
    make_tiered: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_tiered(max_num_seqs=64)
    engine.core.pool.tiers.copy_blocks = 1
    monkeypatch.setattr(prompt_tiers, "_TIMES_OF_A_LOAD", 1)
    for system in SYSTEMS[:3]:
        run(engine, [asking(system, 7)], greedy(2))
    settle(engine)
    assert engine.core.pool.get(engine.list_system_prompts()[0].id).state == "host"
    for i in range(4):
        add(engine, f"running-{i}", Request(ids(80 + i, 20)), greedy(40))
    for _ in range(3):
        engine.step()
    plans = recorded_plans(engine, monkeypatch)
    for i in range(50):
        add(engine, f"herd-{i}", asking(SYSTEMS[0], i), greedy(2))
    outputs = finish(engine)
    assert [o.num_cached_tokens for i, o in outputs.items() if i.startswith("herd")] == [40] * 50
    loads = [plan for plan in plans if any(not t.to_host for t in plan.transfers)]
    assert [sum(t.count for t in plan.transfers) for plan in loads] == [1, 1, 1], "a slice a step"
    assert all(len(plan.rows) >= 4 for plan in loads), "who runs gets a token in every step"
    assert engine.core.pool.num_prefills == 3
    assert_nothing_held(engine)


def test_a_prompt_that_is_being_read_stays_and_the_other_runs_unpinned(make_tiered: MakeEngine) -> None:
    engine = make_tiered()
    expected = [tokens(run(engine, [asking(s, 7)], greedy(12)))[0] for s in SYSTEMS[:3]]
    settle(engine)
    for i, system in enumerate(SYSTEMS[1:3]):
        add(engine, f"reader-{i}", asking(system, 7), greedy(12))
    engine.step()
    add(engine, "late", asking(SYSTEMS[0], 7), greedy(12))
    outputs = finish(engine)
    assert [list(outputs[i].outputs[0].token_ids) for i in ("late", "reader-0", "reader-1")] == expected
    assert engine.core.pool.outcomes["busy"] == 1
    assert run(engine, [asking(SYSTEMS[0], 8)], greedy(2))[0].num_cached_tokens == 40, "it was not lost"
    assert engine.core.pool.num_prefills == 3
    assert_nothing_held(engine)


def test_without_room_on_the_host_either_a_prompt_runs_unpinned(make_tiered: MakeEngine) -> None:
    engine = make_tiered(host=9)
    cached = []
    for _ in range(3):
        for system in SYSTEMS:
            cached.append(run(engine, [asking(system, 7)], greedy(2))[0].num_cached_tokens)
            engine.reset_prefix_cache()
            settle(engine)
    # Three come back from the host one after the other; the place that is left goes to one that stays. The others do
    # not drive these out only to be driven out themselves before they come again.
    assert states(engine) == ["host", "host", "pinned", "pinned"]
    assert cached[12:] == [40, 41, 42, 43, 0, 0]
    assert engine.core.pool.num_prefills == 7
    assert_nothing_held(engine)


def test_operators_prompts_never_leave_the_device(make_tiered: MakeEngine) -> None:
    engine = make_tiered()
    engine.add_system_prompt(SYSTEMS[0])
    for system in SYSTEMS[1:] * 2:
        run(engine, [asking(system, 7)], greedy(2))
    settle(engine)
    (hard,) = [p for p in engine.list_system_prompts() if p.pin == "hard"]
    assert hard.state == "pinned"
    # One that waits on the host is brought back for an operator, and stays.
    (waiting, *_) = [p for p in engine.list_system_prompts() if p.state == "host"]
    system = next(s for s in SYSTEMS if len(s) == waiting.num_tokens)
    assert engine.add_system_prompt(system).state == "pinned"
    assert engine.core.pool.num_prefills == len(SYSTEMS)
    run(engine, [asking(SYSTEMS[-1], 7)], greedy(2))
    assert [p.state for p in engine.list_system_prompts() if p.pin == "hard"] == ["pinned"] * 2


def test_a_prompt_on_the_host_can_be_removed_and_aborted(make_tiered: MakeEngine) -> None:
    engine = make_tiered()
    for system in SYSTEMS[:4]:
        run(engine, [asking(system, 7)], greedy(2))
    settle(engine)
    (first, second) = [p.id for p in engine.list_system_prompts() if p.state == "host"]
    engine.remove_system_prompt(first)
    system = next(s for s in SYSTEMS if len(s) == engine.core.pool.get(second).num_tokens)
    add(engine, "gone", asking(system, 7), greedy(12))
    engine.step()
    engine.abort_request("gone")
    engine.remove_system_prompt(second)
    settle(engine)
    assert len(engine.list_system_prompts()) == 2
    assert engine.core.pool.tiers.host.pinned_blocks <= 6
    for prompt in engine.list_system_prompts():
        engine.remove_system_prompt(prompt.id)
    assert engine.core.pool.tiers.host.pinned_blocks == 0
    assert_nothing_held(engine)


def test_a_prompt_that_continues_one_on_the_host_brings_it_back(make_tiered: MakeEngine) -> None:
    engine = make_tiered(system_prompt_cache_tokens=8 * 16)
    for system in SYSTEMS[:3]:
        run(engine, [asking(system, 7)], greedy(2))
    settle(engine)
    assert states(engine) == ["host", "probation", "probation"]
    longer = [*SYSTEMS[0], *ids(90, 20)]
    outputs = [run(engine, [asking(longer, 7)], greedy(12))[0] for _ in range(2)]
    assert [o.num_cached_tokens for o in outputs] == [40, 60]
    assert tokens(outputs[:1]) == tokens(outputs[1:])
    assert_nothing_held(engine)


def test_the_host_tier_takes_a_share_of_free_memory_beside_a_gpu_only() -> None:
    free = CudaPlatform().available_host_memory_bytes()
    assert 0.3 * free < EngineArgs("m")._host_bytes(CudaPlatform()) < 0.5 * free
    assert EngineArgs("m")._host_bytes(CpuPlatform()) == 0
    assert EngineArgs("m", system_prompt_cache="off")._host_bytes(CudaPlatform()) == 0
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    for text, value in (("auto", "auto"), ("1.5", 1.5)):
        assert parser.parse_args(["--system-prompt-host-cache-gib", text]).system_prompt_host_cache_gib == value
    with pytest.raises(SystemExit):
        parser.parse_args(["--system-prompt-host-cache-gib", "much"])


@pytest.mark.parametrize("order", [("moves", "copies", "cleared"), ("cleared",), ("moves",)])
def test_nothing_of_a_step_comes_before_the_copies_of_the_step_before(
    make_tiered: MakeEngine, monkeypatch: pytest.MonkeyPatch, order: tuple[str, ...]
) -> None:
    worker = make_tiered().core.executor._worker
    transfers, cache = worker.transfers, worker.runner.cache
    join, late = transfers.join, []

    def join_late() -> None:
        """As a device that carries out copies at the last moment."""
        transfers._copy_blocks(late)
        late.clear()
        join()

    monkeypatch.setattr(transfers, "_copy", lambda copies, behind: late.extend(copies))
    monkeypatch.setattr(transfers, "join", join_late)
    k_cache = cache.k_caches[0].view(cache.num_blocks, -1)
    for block in range(8):
        k_cache[block] = block
    image = HostImage("sp-a", 2, 0)
    worker.submit(StepPlan(transfers=[ExtentCopy(image, ((3, 2),), 0, 2, to_host=True)]))
    changes = {"moves": [(0, 3)], "copies": [(1, 4)], "cleared": [3, 4]}
    worker.submit(StepPlan(**{name: changes[name] for name in order}))
    worker.submit(StepPlan(transfers=[ExtentCopy(image, ((6, 2),), 0, 2, to_host=False)]))
    worker.submit(StepPlan(moves=[(6, 10), (7, 11)]))
    assert k_cache[10:12, 0].tolist() == [3.0, 4.0]

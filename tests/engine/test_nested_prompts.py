"""Requests whose system prompts nest read a chain of extents, and answer as if there were no pool."""

from __future__ import annotations

from collections.abc import Callable

from tests.engine.helpers import assert_nothing_held, finish, greedy
from vllm.engine.llm_engine import LLMEngine
from vllm.inputs import CacheMark
from vllm.sampling_params import RequestOutputKind

MakeEngine = Callable[..., LLMEngine]

# Lengths that end within blocks: every link begins at a fresh one.
TOOLS, SYSTEM, TURN = list(range(100, 153)), list(range(300, 337)), list(range(500, 527))
ENDS = [len(TOOLS), len(TOOLS + SYSTEM), len(TOOLS + SYSTEM + TURN)]
PROMPTS = [
    [*TOOLS, *SYSTEM, *TURN, 7],
    [*TOOLS, *SYSTEM, *TURN, 8, 9, 10],
    [*TOOLS, *SYSTEM, 11, 12],
    [*TOOLS, *range(700, 760), 13],
    [*TOOLS, *SYSTEM, *TURN, *range(800, 830)],
    [20, 21, 22],
]


def answers(engine: LLMEngine, name: str, *, marked: bool) -> list[tuple[list[int], int, int]]:
    """Tokens, cached and written prompt tokens of each prompt, all of them sent at once."""
    params = greedy(12)
    params.output_kind = RequestOutputKind.FINAL_ONLY
    for i, prompt in enumerate(PROMPTS):
        shared = next((j for j, (a, b) in enumerate(zip(prompt, PROMPTS[0], strict=False)) if a != b), ENDS[2])
        marks = [CacheMark(end, 300.0) for end in ENDS if end <= shared and end < len(prompt)] if marked else []
        engine.add_request(f"{name}{i}", prompt, params, num_system_tokens=None, marks=marks)
    outputs = finish(engine)
    found = [outputs[f"{name}{i}"] for i in range(len(PROMPTS))]
    return [(list(o.outputs[0].token_ids), o.num_cached_tokens, o.num_cache_write_tokens) for o in found]


def test_chains_change_no_token_and_are_computed_once(make_tiny: MakeEngine, pipeline_depth: int) -> None:
    plain = answers(make_tiny(system_prompt_cache="off", enable_prefix_caching=False), "off", marked=False)
    # Chunks of 32 tokens: a link takes several steps.
    engine = make_tiny(max_num_batched_tokens=32, max_num_seqs=16)
    first, again = answers(engine, "a", marked=True), answers(engine, "b", marked=True)
    want = [tokens for tokens, _, _ in plain]
    assert [tokens for tokens, _, _ in first] == [tokens for tokens, _, _ in again] == want
    assert [written for _, _, written in first] == [ENDS[2], 0, 0, 0, 0, 0]
    assert [cached for _, cached, _ in first] == [0, ENDS[2], ENDS[1], ENDS[0], ENDS[2], 0]
    assert [written for _, _, written in again] == [0] * 6
    assert engine.core.pool.num_prefills == 3
    chain = sorted(engine.list_system_prompts(), key=lambda p: p.num_tokens)
    assert [p.parent for p in chain] == [None, chain[0].id, chain[1].id]
    assert sum(p.num_blocks for p in chain) == 4 + 3 + 2
    assert_nothing_held(engine)


def test_a_child_of_a_declared_prompt_is_read_after_its_parent_was_removed(make_tiny: MakeEngine) -> None:
    plain = answers(make_tiny(system_prompt_cache="off", enable_prefix_caching=False), "off", marked=False)
    engine = make_tiny()
    parent = engine.add_system_prompt(TOOLS)
    child = engine.add_system_prompt([*TOOLS, *SYSTEM])
    assert child.parent == parent.id
    assert engine.remove_system_prompt(parent.id).state == "removing"
    assert [tokens for tokens, _, _ in answers(engine, "a", marked=False)] == [tokens for tokens, _, _ in plain]
    assert engine.remove_system_prompt(child.id).state == "removed"
    assert engine.list_system_prompts() == []
    assert engine.core.scheduler.blocks.num_schedulable_blocks == engine.core.num_blocks

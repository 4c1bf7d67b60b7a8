"""Adding, listing and removing system prompts on an engine and on `LLM`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.helpers import Request, add, assert_nothing_held, finish, greedy, run, tokens
from vllm import LLM
from vllm.core.system_prompt_pool import SystemPromptRefusedError
from vllm.engine.llm_engine import LLMEngine
from vllm.exceptions import VLLMValidationError

MakeEngine = Callable[..., LLMEngine]

TEXT = "You are the keeper of a lighthouse. Answer every question with the name of a ship.\n"
CHAT = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Which colour has snow?"}]


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> Iterator[LLM]:
    llm = LLM(str(tiny_model_dir), dtype="float32", max_model_len=512, num_gpu_blocks_override=512, seed=0)
    yield llm
    llm.llm_engine.shutdown()


def test_text(llm: LLM) -> None:
    info = llm.add_system_prompt(TEXT, name="keeper")
    assert (info.name, info.state, info.source, info.hits, info.readers) == ("keeper", "pinned", "declared", 0, 0)
    assert info.num_blocks == -(-info.num_tokens // 16) and info.expires is None
    outputs = llm.generate([TEXT + "Who are you?", TEXT + "?"], greedy(2), use_tqdm=False)
    assert [o.num_cached_tokens for o in outputs] == [info.num_tokens] * 2
    whole = len(llm.get_tokenizer().encode(TEXT))
    assert whole - 2 <= info.num_tokens <= whole
    (listed,) = [i for i in llm.list_system_prompts() if i.id == info.id]
    assert (listed.hits, listed.readers) == (2, 0)
    assert llm.remove_system_prompt(info.id).state == "removed"
    assert info.id not in [i.id for i in llm.list_system_prompts()]


def test_messages(llm: LLM) -> None:
    info = llm.add_system_prompt(CHAT)
    (output,) = llm.chat(CHAT, greedy(2), use_tqdm=False)
    assert output.num_cached_tokens == info.num_tokens
    assert llm.add_system_prompt(CHAT[:1]).id == info.id, "what follows the system message does not matter"
    llm.remove_system_prompt(info.id)


def test_chats_pin_their_system_prompt(llm: LLM) -> None:
    prefills = llm.llm_engine.core.pool.num_prefills
    other = [CHAT[0], {"role": "user", "content": "And coal?"}]
    outputs = llm.chat([CHAT, other, CHAT], greedy(2), use_tqdm=False)
    (info,) = llm.list_system_prompts()
    assert info.source == "auto"
    assert [o.num_cached_tokens for o in outputs] == [0, info.num_tokens, info.num_tokens]
    assert llm.llm_engine.core.pool.num_prefills == prefills + 1
    llm.remove_system_prompt(info.id)


def test_token_ids_and_adding_twice(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    first = engine.add_system_prompt(list(range(100, 140)), name="a")
    again = engine.add_system_prompt(list(range(100, 140)), name="b")
    assert (first.id, first.num_tokens, again.id, again.name) == (again.id, 40, first.id, "b")
    assert len(engine.list_system_prompts()) == engine.core.pool.num_prefills == 1
    request = Request(list(range(100, 150)))
    assert run(engine, [request], greedy(2))[0].num_cached_tokens == 40


def test_removal_waits_for_the_last_reader(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    ids = list(range(100, 140))
    want = tokens(run(engine, [Request([*ids, 7, 8], 40)], greedy(12)))
    (info,) = engine.list_system_prompts()
    add(engine, "reader", Request([*ids, 7, 8], 40), greedy(12))
    for _ in range(4):
        engine.step()
    assert engine.remove_system_prompt(info.id).state == "removing"
    assert engine.list_system_prompts()[0].readers == 1
    add(engine, "late", Request([*ids, 7, 8], 40), greedy(12))
    outputs = finish(engine)
    assert [list(outputs[name].outputs[0].token_ids) for name in ("reader", "late")] == want * 2
    assert outputs["late"].num_cached_tokens == 0, "a prompt that is being removed takes no new readers"
    assert engine.list_system_prompts() == []
    assert_nothing_held(engine)
    assert engine.core.scheduler.blocks.num_schedulable_blocks == engine.core.num_blocks


def test_adding_while_requests_run_loses_none_of_their_news(make_tiny: MakeEngine) -> None:
    engine = make_tiny(max_num_batched_tokens=16, max_num_seqs=4)
    want = tokens(run(engine, [Request([5, 6, 7])], greedy(20)))
    engine.add_request("r", [5, 6, 7], greedy(20))
    engine.step()
    info = engine.add_system_prompt(list(range(100, 300)))
    assert info.state == "pinned"
    news = engine.step()
    assert len(news) > 10, "what the running request got meanwhile"
    last = finish(engine)["r"]
    assert list(last.outputs[0].token_ids) == want[0]


def test_over_budget(make_tiny: MakeEngine) -> None:
    engine = make_tiny(system_prompt_cache_tokens=64)
    engine.add_system_prompt(list(range(100, 130)))
    with pytest.raises(SystemPromptRefusedError) as caught:
        engine.add_system_prompt(list(range(200, 240)))
    assert str(caught.value) == (
        "The system prompt has 40 tokens, but 32 of the pool's 64 tokens are taken; "
        "remove a prompt or raise --system-prompt-cache-tokens."
    )
    # A request with such a prompt runs all the same.
    outputs = run(engine, [Request([*range(200, 240), 7], 40)] * 2, greedy(3))
    assert all(len(t) == 3 for t in tokens(outputs))
    assert engine.core.pool.outcomes["over_budget"] == 2


def test_without_contiguous_room_a_prompt_lies_in_pieces(make_tiny: MakeEngine) -> None:
    def prompt(start: int, num_blocks: int) -> list[int]:
        return list(range(start, start + 15 * num_blocks))

    engine = make_tiny(max_model_len=64, num_gpu_blocks_override=12, system_prompt_cache_tokens=128)
    singles = {11 - i: engine.add_system_prompt(prompt(1000 * i, 1)) for i in range(8)}
    for block in (11, 9, 7, 5):
        engine.remove_system_prompt(singles[block].id)
    engine.add_system_prompt(prompt(20_000, 2))  # No hole fits: it goes to blocks 2 and 3.
    for block in (8, 4):
        engine.remove_system_prompt(singles[block].id)
    extents = engine.core.pool.blocks.extents
    assert sorted(e.start for several in extents.values() for e in several) == [2, 6, 10]
    # Four of the eight blocks of the budget are left, but no more than three of them side by side.
    big = prompt(30_000, 4)
    key = engine.add_system_prompt(big).id
    assert [e.num_blocks for e in engine.core.pool.blocks.extents[key]] == [3, 1]
    (output,) = run(engine, [Request([*big, 7], len(big))], greedy(6))
    assert output.num_cached_tokens == len(big)
    plain = make_tiny(max_model_len=64, num_gpu_blocks_override=12, system_prompt_cache="off")
    assert tokens([output]) == tokens(run(plain, [Request([*big, 7], len(big))], greedy(6)))
    finish(engine)
    assert_nothing_held(engine)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "The system prompt has 0 tokens; it must have from 1 to 510"),
        ("", "The system prompt has 0 tokens"),
        (list(range(100, 700)), "The system prompt has 600 tokens"),
        ([1, -1], r"The prompt holds -1; token ids of this model are integers from 0 to \d+"),
        ([1, 10**6], "The prompt holds 1000000; token ids"),
        ([{"role": "assistant", "content": "hi"}], "These messages have no system part that can be pinned"),
    ],
)
def test_what_cannot_be_pinned(llm: LLM, prompt: object, message: str) -> None:
    with pytest.raises(VLLMValidationError, match=message):
        llm.add_system_prompt(prompt)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-1, 10**6, 2**32, 2**80, True, False, 1.0, "1", None, [1]])
@pytest.mark.parametrize("before", [[], [0, 1, 5], [7] * 300])
def test_what_is_no_token_is_named(llm: LLM, before: list[int], wrong: object) -> None:
    prompt = [*before, wrong, 3]
    with pytest.raises(VLLMValidationError, match=rf"The prompt holds {re.escape(repr(wrong))}; token ids of this"):
        llm.generate({"prompt_token_ids": prompt}, greedy(1), use_tqdm=False)  # type: ignore[typeddict-item]


def test_what_is_no_token_is_named_behind_a_known_system_prompt(make_tiny: MakeEngine) -> None:
    engine, head = make_tiny(), [5] * 40
    first, second = (run(engine, [Request([*head, 9], len(head))], greedy(2))[0] for _ in range(2))
    assert tokens([first]) == tokens([second]) and second.prompt_token_ids == [*head, 9]
    with pytest.raises(VLLMValidationError, match="The prompt holds -1; token ids of this"):
        run(engine, [Request([*head, -1], len(head))], greedy(2))


def test_every_token_of_the_vocabulary_may_be_in_a_prompt(llm: LLM) -> None:
    last = llm.llm_engine.vllm_config.model.vocab_size - 1
    prompt = [0, 1, 2, last, 0]
    (output,) = llm.generate(prompt, greedy(1), use_tqdm=False)
    assert output.prompt_token_ids == prompt and output.prompt_token_ids is not prompt


def test_a_list_may_be_used_for_the_next_prompt_while_the_first_one_waits(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    first, second = list(range(100, 140)), list(range(300, 340))
    want = [output.outputs[0].token_ids for output in run(engine, [Request(first), Request(second)], greedy(4))]
    prompt = first.copy()
    add(engine, "a", Request(prompt), greedy(4))
    prompt[:] = second
    add(engine, "b", Request(prompt), greedy(4))
    prompt.clear()
    outputs = finish(engine)
    assert [outputs[key].outputs[0].token_ids for key in "ab"] == want
    assert [outputs[key].prompt_token_ids for key in "ab"] == [first, second]


def test_unknown_id(llm: LLM) -> None:
    with pytest.raises(VLLMValidationError, match="There is no system prompt 'sp-0'"):
        llm.remove_system_prompt("sp-0")


def test_declared_mode(make_tiny: MakeEngine) -> None:
    engine = make_tiny(system_prompt_cache="declared")
    request = Request([*range(100, 140), 7], 40)
    run(engine, [request], greedy(2))
    assert engine.list_system_prompts() == []
    engine.reset_prefix_cache()
    engine.add_system_prompt(list(range(100, 140)))
    assert run(engine, [request], greedy(2))[0].num_cached_tokens == 40


def test_off(make_tiny: MakeEngine) -> None:
    engine = make_tiny(system_prompt_cache="off")
    with pytest.raises(SystemPromptRefusedError, match=r"The system-prompt pool is off \(--system-prompt-cache off\)"):
        engine.add_system_prompt([1, 2, 3])


def test_min_tokens(make_tiny: MakeEngine) -> None:
    engine = make_tiny(system_prompt_min_tokens=20)
    with pytest.raises(SystemPromptRefusedError, match="--system-prompt-min-tokens asks for at least 20"):
        engine.add_system_prompt(list(range(100, 119)))
    run(engine, [Request(list(range(100, 140)), 19), Request(list(range(200, 240)), 20)], greedy(2))
    assert [info.num_tokens for info in engine.list_system_prompts()] == [20]


def test_ttl(make_tiny: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_tiny()
    now = [1000.0]
    pool = engine.core.pool
    for owner in (pool, pool._life, pool._router):
        monkeypatch.setattr(owner, "_clock", lambda: now[0])
    info = engine.add_system_prompt(list(range(100, 140)), ttl=60.0)
    assert info.expires == 1060.0
    now[0] = 1050.0
    run(engine, [Request([*range(100, 140), 7])], greedy(2))
    now[0] = 1100.0
    run(engine, [Request([7, 8])], greedy(2))
    assert engine.list_system_prompts()[0].expires == 1110.0
    now[0] = 1111.0
    run(engine, [Request([7, 8])], greedy(2))
    assert engine.list_system_prompts() == []

"""A beam search finds what scoring every continuation finds, by itself and with a model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.engine.helpers import Request, assert_nothing_held, finish, greedy, run
from vllm import LLM
from vllm.engine.beam_search import BeamSearch
from vllm.engine.llm_engine import LLMEngine
from vllm.engine.messages import StepOutputs
from vllm.engine.search_state import Search
from vllm.exceptions import VLLMValidationError
from vllm.outputs import Logprob
from vllm.sampling_params import BeamSearchParams

PROMPT = [464, 3290, 318, 257, 845, 1263, 5044]
OTHER = [1212, 318, 262]


def naive_search(
    next_logprobs: Any, prompt: list[int], width: int, max_tokens: int, ends: set[int], penalty: float
) -> list[tuple[float, float, list[int]]]:
    """(score, log-probability, tokens) of the best sequences. Never stops early and keeps all that has ended."""
    active, ended = [(0.0, list(prompt))], []
    for _ in range(max_tokens):
        candidates = []
        for total, tokens in active:
            row = sorted(next_logprobs(tokens).items(), key=lambda entry: -entry[1])[: 2 * width]
            for token, logprob in row:
                extended = (total + logprob, [*tokens, token])
                (ended if token in ends else candidates).append(extended)
        active = sorted(candidates, key=lambda entry: -entry[0])[:width]
    scored = []
    for total, tokens in ended + active:
        length = len(tokens) - (tokens[-1] in ends and len(tokens) > len(prompt))
        scored.append((total / length**penalty, total, tokens))
    return sorted(scored, key=lambda entry: -entry[0])[:width]


def search_table(
    table: list[list[float]], width: int, max_tokens: int, ends: set[int], penalty: float
) -> list[tuple[float, list[int]]]:
    """The search over a model whose next token depends on the last one alone."""
    config: Any = SimpleNamespace(max_logprobs=2 * width, max_model_len=1000, eos_token_ids=tuple(ends))
    params = BeamSearchParams(beam_width=width, max_tokens=max_tokens, length_penalty=penalty)
    search = BeamSearch(config, None, [0], params)  # type: ignore[arg-type]
    while search.active:
        before, rows = search.active, []
        for sequence in search.active:
            row = sorted(enumerate(table[sequence.tokens[-1]]), key=lambda entry: -entry[1])
            rows.append({token: Logprob(logprob) for token, logprob in row[: 2 * width]})
        search.advance(rows)
        assert [before[i].tokens for i in search.origins] == [sequence.tokens[:-1] for sequence in search.active]
    return [(sequence.cum_logprob, sequence.tokens) for sequence in search.best()]


def random_table(seed: int, size: int) -> list[list[float]]:
    logits = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)) * 2
    return torch.log_softmax(logits, -1).tolist()


@given(seed=st.integers(0, 10**6), width=st.integers(1, 4), penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]))
@settings(max_examples=60, deadline=None)
def test_stopping_early_changes_nothing(seed, width, penalty):
    table = random_table(seed, 9)
    found = search_table(table, width, 8, {3}, penalty)
    expected = naive_search(lambda tokens: dict(enumerate(table[tokens[-1]])), [0], width, 8, {3}, penalty)
    assert found == [(total, tokens) for _, total, tokens in expected]


def test_a_wide_beam_finds_the_most_likely_of_all_continuations():
    table = random_table(5, 4)
    every = []
    for tokens in itertools.product(range(4), repeat=3):
        total = sum(table[a][b] for a, b in itertools.pairwise((0, *tokens)))
        every.append((total, [0, *tokens]))
    found = search_table(table, 16, 3, set(), 1.0)
    assert found[0][1] == max(every)[1]
    # All sixteen prefixes of two tokens are kept, so the sixteen best of all are found.
    assert [total for total, _ in found] == pytest.approx([total for total, _ in sorted(every, reverse=True)[:16]])


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Path) -> Iterator[LLM]:
    llm = LLM(str(tiny_model_dir), dtype="float32", max_model_len=128, num_gpu_blocks_override=256, seed=0)
    yield llm
    llm.llm_engine.shutdown()


@pytest.fixture(scope="module")
def next_logprobs(tiny_model_dir: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)

    @torch.inference_mode()
    def of(tokens: list[int]) -> dict[int, float]:
        logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1], -1)
        values, ids = logprobs.topk(20)
        return dict(zip(ids.tolist(), values.tolist(), strict=True))

    return of


@pytest.mark.parametrize("penalty", [1.0, 0.0])
def test_scores_are_those_of_transformers_probabilities(llm, next_logprobs, penalty):
    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True, length_penalty=penalty)
    outputs = llm.beam_search([{"prompt_token_ids": PROMPT}, OTHER], params)
    for prompt, output in zip((PROMPT, OTHER), outputs, strict=True):
        expected = naive_search(next_logprobs, prompt, 3, 6, set(), penalty)
        assert [sequence.tokens for sequence in output.sequences] == [tokens for _, _, tokens in expected]
        for sequence, (_, total, _) in zip(output.sequences, expected, strict=True):
            assert sequence.cum_logprob == pytest.approx(total, abs=1e-3)
            assert (sequence.finish_reason, len(sequence.logprobs)) == ("length", 6)
            assert sequence.text == llm.get_tokenizer().decode(sequence.tokens)


def test_a_sequence_that_ends_competes_by_its_own_length(llm, next_logprobs):
    plain = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True)
    best = llm.beam_search(PROMPT, plain)[0].sequences[0]
    end = best.tokens[len(PROMPT) + 2]
    params = BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True, stop_token_ids=[end])
    sequences = llm.beam_search(PROMPT, params)[0].sequences
    expected = naive_search(next_logprobs, PROMPT, 3, 6, {end}, 1.0)
    assert [sequence.tokens for sequence in sequences] == [tokens for _, _, tokens in expected]
    ended = [sequence for sequence in sequences if sequence.stop_reason == end]
    assert ended
    assert all(sequence.tokens[-1] == end and sequence.finish_reason == "stop" for sequence in ended)


def test_parameters_are_checked_as_those_of_other_requests(llm):
    assert BeamSearchParams(beam_width=2, max_tokens=3, stop="abc").stop == ["abc"]
    with pytest.raises(VLLMValidationError, match=r"min_tokens must not exceed max_tokens \(3\), got 4"):
        BeamSearchParams(beam_width=2, max_tokens=3, min_tokens=4)
    with pytest.raises(VLLMValidationError, match="stop_token_ids holds token id 10000000"):
        llm.beam_search(PROMPT, BeamSearchParams(beam_width=2, max_tokens=3, stop_token_ids=[10_000_000]))


def test_a_stop_string_ends_a_sequence(llm):
    plain = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
    best = llm.beam_search(PROMPT, plain)[0].sequences[0]
    stop = llm.get_tokenizer().decode(best.tokens[len(PROMPT) + 1 : len(PROMPT) + 3])
    params = BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True, stop=[stop])
    sequences = llm.beam_search(PROMPT, params)[0].sequences
    (stopped,) = [sequence for sequence in sequences if sequence.stop_reason == stop]
    assert stopped.tokens == best.tokens[: len(PROMPT) + 3]


def test_many_stop_strings_over_several_tokens_cut_the_right_beam(llm):
    plain = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
    tokenizer, config = llm.llm_engine.tokenizer, llm.llm_engine.vllm_config.model
    best = llm.beam_search(PROMPT, plain)[0].sequences[0]
    text = tokenizer.decode(best.tokens[len(PROMPT) :])
    stop = tokenizer.decode(best.tokens[len(PROMPT) + 2 : len(PROMPT) + 6])
    stops = [f"{i} never" * 20 for i in range(255)] + [stop]
    for min_tokens in (0, 7):
        params = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True, stop=stops, min_tokens=min_tokens)
        sequences = llm.beam_search(PROMPT, params)[0].sequences
        own = [sequence for sequence in sequences if best.tokens[: len(sequence.tokens)] == sequence.tokens]
        if min_tokens:
            # Complete before it counts: the text stays as it is.
            assert [sequence.stop_reason for sequence in own] == [None]
            assert own[0].output.text == text
        else:
            assert [sequence.stop_reason for sequence in own] == [stop]
            assert own[0].output.text == text[: text.index(stop)]
            assert BeamSearch(config, tokenizer, PROMPT, params).output_text(own[0]) == own[0].output.text


def test_end_tokens_give_way_until_there_are_min_tokens(llm, next_logprobs):
    # The likeliest tokens of every step of the search are ends, more of them than a step reports.
    ends: set[int] = set()
    for _ in range(3):
        params = BeamSearchParams(
            beam_width=2, max_tokens=3, ignore_eos=True, stop_token_ids=sorted(ends), min_tokens=3 if ends else 0
        )
        sequences = llm.beam_search(PROMPT, params)[0].sequences
        assert sequences
        for sequence in sequences:
            assert len(sequence.tokens) == len(PROMPT) + 3
            assert not ends & set(sequence.tokens[len(PROMPT) :])
            for row in sequence.logprobs:
                assert list(row.values()) == sorted(row.values(), key=lambda entry: -entry.logprob)
        ends |= next_logprobs(PROMPT).keys()
        for sequence in sequences:
            for i in range(3):
                ends |= next_logprobs(sequence.tokens[: len(PROMPT) + i]).keys()
    params = BeamSearchParams(beam_width=2, max_tokens=5, ignore_eos=True, stop_token_ids=sorted(ends), min_tokens=2)
    sequences = llm.beam_search(PROMPT, params)[0].sequences
    assert sequences and all(len(sequence.tokens) >= len(PROMPT) + 3 for sequence in sequences)


def test_a_search_ends_at_the_end_of_the_context(llm):
    prompt = (PROMPT * 20)[:125]
    output = llm.beam_search(prompt, BeamSearchParams(beam_width=2, max_tokens=50, ignore_eos=True))[0]
    assert [len(sequence.tokens) for sequence in output.sequences] == [128, 128]


def test_few_prompts_at_a_time_give_the_same(llm):
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    together = llm.beam_search([PROMPT, OTHER, "One"], params)
    assert llm.beam_search([PROMPT, OTHER, "One"], params, concurrency_limit=2) == together
    assert math.isfinite(together[2].sequences[0].cum_logprob)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": 11}, "beam_width"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"length_penalty": 1e6}, "length_penalty"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_what_a_search_cannot_do_is_refused(llm, fields, param):
    with pytest.raises(VLLMValidationError) as caught:
        llm.beam_search(PROMPT, BeamSearchParams(**{"beam_width": 2, "max_tokens": 3} | fields))
    assert caught.value.param == param


def computed_tokens(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the tokens that each step of the engine computes, as its counters say."""
    counts: list[int] = []
    step = engine.core.step

    def counted() -> StepOutputs:
        news = step()
        assert news.stats is not None
        counts.append(news.stats.iteration_tokens)
        return news

    monkeypatch.setattr(engine.core, "step", counted)
    return counts


@pytest.fixture
def make_llm(make_tiny: Callable[..., LLMEngine]) -> Callable[..., LLM]:
    """`make_llm(**flags)` returns an `LLM` of the tiny model whose engine is shut down after the test."""

    def make(**flags: Any) -> LLM:
        llm = LLM.__new__(LLM)
        llm.llm_engine, llm._request_ids = make_tiny(**flags), map(str, itertools.count())
        return llm

    return make


def test_what_a_beam_has_computed_is_never_computed_again(make_llm, pipeline_depth, monkeypatch):
    llm = make_llm(enable_prefix_caching=False)
    counts = computed_tokens(llm.llm_engine, monkeypatch)
    prompt = (PROMPT * 10)[:67]
    output = llm.beam_search(prompt, BeamSearchParams(beam_width=3, max_tokens=40, ignore_eos=True))[0]
    assert [count for count in counts if count] == [67] + [3] * 39, "one row a beam"
    assert [len(sequence.tokens) for sequence in output.sequences] == [67 + 40] * 3
    finish(llm.llm_engine)
    assert_nothing_held(llm.llm_engine)


def test_beams_are_those_of_transformers_generate(llm, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([PROMPT])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=4,
        num_return_sequences=4,
        max_new_tokens=20,
        do_sample=False,
        length_penalty=0.0,
        pad_token_id=0,
    )
    params = BeamSearchParams(beam_width=4, max_tokens=20, ignore_eos=True, length_penalty=0.0)
    assert [sequence.tokens for sequence in llm.beam_search(PROMPT, params)[0].sequences] == found.tolist()


@pytest.mark.parametrize(
    "flags",
    [
        {"max_num_seqs": 2},
        {"max_num_seqs": 3, "max_num_batched_tokens": 32},
        {"max_model_len": 96, "num_gpu_blocks_override": 9},
        {"max_model_len": 96, "num_gpu_blocks_override": 9, "enable_prefix_caching": False},
    ],
    ids=["fewer rows than beams", "few tokens a step", "no room for two searches", "nothing cached"],
)
def test_a_search_finds_the_same_where_rows_or_blocks_are_short(llm, make_llm, pipeline_depth, flags):
    params = BeamSearchParams(beam_width=4, max_tokens=30, ignore_eos=True)
    prompts = [(PROMPT * 6)[:40], OTHER, (OTHER * 10)[:21]]
    expected = [[sequence.tokens for sequence in llm.beam_search(p, params)[0].sequences] for p in prompts]
    small = make_llm(**flags)
    outputs = small.beam_search(prompts, params)
    assert [[sequence.tokens for sequence in output.sequences] for output in outputs] == expected
    finish(small.llm_engine)
    assert_nothing_held(small.llm_engine)


def test_a_search_that_is_left_at_any_moment_leaves_nothing_behind(make_tiny, pipeline_depth):
    engine = make_tiny(max_model_len=128, num_gpu_blocks_override=24)
    params = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
    for num_steps in range(14):
        for i, prompt in enumerate([*PROMPT, i] for i in range(3)):
            beams = BeamSearch(engine.vllm_config.model, engine.tokenizer, prompt, params)
            own = beams.sampling_params()
            search = Search(beams, own, lambda _: [])
            engine.add_request(f"{num_steps}-{i}", prompt, own, search=search, num_system_tokens=5)
        for _ in range(num_steps):
            engine.step()
            engine.core.scheduler.check_integrity()
        engine.abort_request([f"{num_steps}-{i}" for i in range(3)])
        engine.core.scheduler.check_integrity()
        finish(engine)
        assert_nothing_held(engine)


def test_other_requests_run_beside_a_search(make_tiny, pipeline_depth):
    engine = make_tiny(max_num_seqs=4)
    (alone,) = run(engine, [Request(OTHER)], greedy(20))
    beams = BeamSearch(
        engine.vllm_config.model, engine.tokenizer, PROMPT, BeamSearchParams(beam_width=4, max_tokens=12)
    )
    own = beams.sampling_params()
    engine.add_request("search", PROMPT, own, search=Search(beams, own, lambda _: []))
    (beside,) = run(engine, [Request(OTHER)], greedy(20))
    assert beside.outputs[0].token_ids == alone.outputs[0].token_ids
    assert len(beams.best()) == 4 and not beams.active
    assert_nothing_held(engine)

"""Seeds, `n` and log-probabilities through the whole engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.helpers import Request, add, assert_nothing_held, finish, greedy, run, tokens
from vllm.engine.llm_engine import LLMEngine
from vllm.outputs import TokenLogprobs
from vllm.sampling_params import SamplingParams

MakeEngine = Callable[..., LLMEngine]

PROMPT = Request([464, 3290, 318, 257, 845, 1263, 5044])
# Few candidates, each with a chance: where thousands are almost impossible, the rounding of another batch shape may
# move a border between two of them over the number that was drawn.
HOT = {"temperature": 0.4, "max_tokens": 24, "ignore_eos": True}
SEEDED = [
    SamplingParams(temperature=0.3, seed=1, max_tokens=8, ignore_eos=True),
    SamplingParams(seed=2, top_k=50, **HOT),
    SamplingParams(seed=3, top_p=0.9, **HOT),
    SamplingParams(seed=4, min_p=0.01, presence_penalty=1.0, **HOT),
    SamplingParams(seed=5, repetition_penalty=1.2, frequency_penalty=0.5, top_k=30, **HOT),
    SamplingParams(seed=-6, logit_bias={77: 5.0}, top_k=10, top_p=0.95, **HOT),
]
SAMPLED = {"top_k": 30, **HOT}


def ids(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100, 40_000) for _ in range(count)]


@pytest.mark.usefixtures("pipeline_depth")
def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_after_preemption(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    alone = [tokens(run(engine, [PROMPT], params))[0] for params in SEEDED]
    assert len({tuple(t) for t in alone}) == len(SEEDED)
    assert tokens(run(engine, [PROMPT] * len(SEEDED), SEEDED)) == alone

    crowd = [Request(ids(i, 20)) for i in range(20)]
    others = [SamplingParams(temperature=1.0, max_tokens=20 + i, top_k=i, ignore_eos=True) for i in range(20)]
    mixed = run(engine, [*crowd, *[PROMPT] * len(SEEDED)], [*others, *SEEDED])
    assert tokens(mixed)[20:] == alone

    # Five blocks for a request's 31 tokens of two blocks each: the later ones are preempted again and again.
    small = make_tiny(max_model_len=64, num_gpu_blocks_override=5)
    assert tokens(run(small, [PROMPT] * len(SEEDED), SEEDED)) == alone
    assert small.core.scheduler.num_preemptions > 0
    assert_nothing_held(small)


def test_without_a_seed_requests_differ_and_the_engine_seed_repeats_them(make_tiny: MakeEngine) -> None:
    params = SamplingParams(**SAMPLED)
    first, second = (tokens(run(make_tiny(seed=11), [PROMPT] * 4, params)) for _ in range(2))
    assert first == second
    assert len({tuple(t) for t in first}) == 4
    assert tokens(run(make_tiny(seed=12), [PROMPT] * 4, params)) != first
    fresh = [tokens(run(make_tiny(seed=None), [PROMPT], params)) for _ in range(2)]
    assert fresh[0] != fresh[1]


@pytest.mark.parametrize(
    ("length", "system_len"), [(1, None), (15, None), (16, None), (17, None), (40, None), (6, 5), (21, 5), (22, 5)]
)
def test_n_outputs_are_those_of_n_seeds(make_tiny: MakeEngine, length: int, system_len: int | None) -> None:
    engine = make_tiny()
    request = Request(ids(1, length), system_len)
    alone = [tokens(run(engine, [request], SamplingParams(seed=100 + i, **SAMPLED)))[0] for i in range(5)]
    engine.reset_prefix_cache()
    (output,) = run(engine, [request], SamplingParams(n=5, seed=100, **SAMPLED))
    assert [o.index for o in output.outputs] == list(range(5))
    assert [list(o.token_ids) for o in output.outputs] == alone
    assert len({tuple(t) for t in alone}) == 5
    assert_nothing_held(engine)


@pytest.mark.usefixtures("pipeline_depth")
def test_n_outputs_under_memory_pressure(make_tiny: MakeEngine) -> None:
    want = [list(o.token_ids) for o in run(make_tiny(), [PROMPT], SamplingParams(n=8, seed=1, **SAMPLED))[0].outputs]
    engine = make_tiny(max_model_len=64, num_gpu_blocks_override=5)
    (output,) = run(engine, [PROMPT], SamplingParams(n=8, seed=1, **SAMPLED))
    assert [list(o.token_ids) for o in output.outputs] == want
    assert engine.core.scheduler.num_preemptions > 0
    assert_nothing_held(engine)


def test_bad_words_are_not_written(make_tiny: MakeEngine) -> None:
    engine = make_tiny()
    (before,) = run(engine, [PROMPT], greedy(12))
    word = engine.tokenizer.decode(before.outputs[0].token_ids[4:6])
    (after,) = run(engine, [PROMPT], greedy(12, bad_words=[word]))
    assert word in before.outputs[0].text and word not in after.outputs[0].text
    assert after.outputs[0].token_ids[:4] == before.outputs[0].token_ids[:4]


# Log-probabilities -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path) -> Callable[[list[int]], torch.Tensor]:
    """`reference(ids)` returns transformers' log-softmax at every position; float64 [len(ids), vocabulary]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)

    def logprobs(token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([token_ids])).logits[0].double().log_softmax(dim=-1)

    return logprobs


def assert_are_logprobs(entries: list[TokenLogprobs], token_ids: list[int], want: torch.Tensor, top: int) -> None:
    """`entries[i]` tells of `token_ids[i]` and of the `top` most likely ones, as `want[i]` has them."""
    assert len(entries) == len(token_ids) == len(want)
    for entry, token, row in zip(entries, token_ids, want, strict=True):
        assert next(iter(entry)) == token
        assert set(entry) == {token, *row.topk(top).indices.tolist()}
        for t, found in entry.items():
            assert found.logprob == pytest.approx(float(row[t]), abs=1e-4)
            # Among tens of thousands of unlikely tokens some are as near as rounding.
            assert found.rank is not None
            assert int((row > row[t] + 1e-4).sum()) + 1 <= found.rank <= int((row > row[t] - 1e-4).sum())
            assert found.decoded_token is not None


@pytest.mark.usefixtures("pipeline_depth")
@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 4}], ids=["whole", "chunked"])
def test_logprobs_equal_those_of_transformers(
    make_tiny: MakeEngine, reference: Callable[[list[int]], torch.Tensor], limits: dict[str, int]
) -> None:
    engine = make_tiny(**limits)
    requests = [Request(ids(i, n)) for i, n in enumerate((1, 2, 45, 70))]
    settings = [
        greedy(6, logprobs=5, prompt_logprobs=3),
        SamplingParams(temperature=2.0, top_k=30, seed=1, max_tokens=6, ignore_eos=True, logprobs=0, prompt_logprobs=0),
        greedy(6, logprobs=2, prompt_logprobs=4),
        greedy(6, logprobs=1),
    ]
    for request, params, output in zip(requests, settings, run(engine, requests, settings), strict=True):
        done = output.outputs[0]
        want = reference([*request.token_ids, *done.token_ids])
        size = len(request.token_ids)
        assert done.logprobs is not None and done.cumulative_logprob is not None
        assert params.logprobs is not None
        assert_are_logprobs(done.logprobs, list(done.token_ids), want[size - 1 : -1], params.logprobs)
        total = sum(entry[token].logprob for entry, token in zip(done.logprobs, done.token_ids, strict=True))
        assert done.cumulative_logprob == pytest.approx(total)
        if params.prompt_logprobs is None:
            assert output.prompt_logprobs is None
            continue
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        entries = [entry for entry in output.prompt_logprobs[1:] if entry is not None]
        assert_are_logprobs(entries, request.token_ids[1:], want[: size - 1], params.prompt_logprobs)


def test_prompt_logprobs_are_computed_whatever_is_cached(
    make_tiny: MakeEngine, reference: Callable[[list[int]], torch.Tensor]
) -> None:
    engine = make_tiny(max_num_batched_tokens=32, max_num_seqs=8)
    request = Request(ids(1, 90), 45)
    usual = run(engine, [request], greedy(4))
    assert run(engine, [request], greedy(4))[0].num_cached_tokens == 45 + 32
    want = reference(request.token_ids)
    for _ in range(2):
        for one in (request, Request(request.token_ids)):
            (output,) = run(engine, [one], greedy(4, prompt_logprobs=2))
            assert output.num_cached_tokens == 0
            assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 90
            entries = [entry for entry in output.prompt_logprobs[1:] if entry is not None]
            assert_are_logprobs(entries, request.token_ids[1:], want[:-1], 2)
            assert tokens([output]) == tokens(usual)


@pytest.mark.usefixtures("pipeline_depth")
def test_prompt_logprobs_after_preemption(
    make_tiny: MakeEngine, reference: Callable[[list[int]], torch.Tensor]
) -> None:
    engine = make_tiny(max_model_len=128, num_gpu_blocks_override=8, max_num_batched_tokens=16, max_num_seqs=4)
    requests = [Request(ids(i, 60)) for i in range(4)]
    for i, request in enumerate(requests):
        add(engine, str(i), request, greedy(20, prompt_logprobs=1))
    outputs = finish(engine)
    assert engine.core.scheduler.num_preemptions > 0
    for i, request in enumerate(requests):
        found = outputs[str(i)].prompt_logprobs
        assert found is not None
        entries = [entry for entry in found[1:] if entry is not None]
        assert_are_logprobs(entries, request.token_ids[1:], reference(request.token_ids)[:-1], 1)


def test_prompt_logprobs_of_n_outputs_come_once(make_tiny: MakeEngine) -> None:
    (output,) = run(make_tiny(), [PROMPT], SamplingParams(n=3, seed=1, prompt_logprobs=0, logprobs=0, **SAMPLED))
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(PROMPT.token_ids)
    assert [len(o.logprobs or []) for o in output.outputs] == [24] * 3

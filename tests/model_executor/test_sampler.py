"""Draws against what numpy says their distribution should be, and their independence of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vllm.model_executor.layers.sampler import LogprobTensors, Sampler, uniform
from vllm.sampling_params import SamplingParams
from vllm.step import SequenceStart

VOCAB = 16
DRAWS = 20_000
LOGITS = torch.tensor([2.0, -1.0, 0.5, 3.0, 2.9, -4.0, 1.0, 0.0, 1.5, 2.5, -0.5, 0.2, -2.0, 1.2, 0.7, -3.0])


class Bench:
    """A sampler with rows of our own, and the tokens of each."""

    def __init__(self, vocab: int = VOCAB) -> None:
        self.sampler = Sampler(64, vocab, torch.device("cpu"))
        self.token_ids = torch.zeros(64, 200, dtype=torch.int64)
        self.num_tokens = np.zeros(64, np.int64)

    def start(
        self,
        row: int,
        params: SamplingParams,
        prompt: tuple[int, ...] = (0,),
        output: tuple[int, ...] = (),
        stop: tuple[int, ...] = (),
        seed: int = 7,
    ) -> None:
        ids = [*prompt, *output]
        self.token_ids[row, : len(ids)] = torch.tensor(ids)
        self.num_tokens[row] = len(ids)
        self.sampler.start(SequenceStart(row, ids, len(prompt), [], (), params, seed, stop))

    def draw(self, logits: torch.Tensor, rows: list[int]) -> list[int]:
        """One token for each row, which then belongs to it."""
        index = np.array(rows)
        drawn, _ = self.sampler.sample(logits.clone(), index, self.num_tokens[index], self.token_ids)
        for row, token in zip(rows, drawn.tolist(), strict=True):
            self.token_ids[row, self.num_tokens[row]] = token
            self.num_tokens[row] += 1
        return drawn.tolist()

    def frequencies(self, row: int, logits: torch.Tensor = LOGITS, draws: int = DRAWS) -> np.ndarray:
        """Of each token among many first draws of a row: one batch in which it stands many times, each time as if it
        had another number of output tokens."""
        counts = self.num_tokens[row] + np.arange(draws)
        drawn, _ = self.sampler.sample(logits.repeat(draws, 1), np.full(draws, row), counts, self.token_ids)
        return np.bincount(drawn.numpy(), minlength=len(logits)) / draws


def penalised(logits: np.ndarray, params: SamplingParams, prompt: tuple[int, ...], output: list[int]) -> np.ndarray:
    logits = logits.copy()
    for token in {*prompt, *output}:
        r = params.repetition_penalty
        logits[token] = logits[token] / r if logits[token] > 0 else logits[token] * r
    for token in set(output):
        logits[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    return logits


def probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Temperature, then top_k, then top_p over what is left, then min_p."""
    logits = logits.astype(np.float64) / params.temperature
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = p[order]
    if params.top_k:
        kept[params.top_k :] = 0
        kept /= kept.sum()
    before = np.cumsum(kept) - kept
    kept[(before >= params.top_p) | (kept < params.min_p * kept[0])] = 0
    result = np.zeros_like(p)
    result[order] = kept / kept.sum()
    return result


def assert_drawn_from(frequencies: np.ndarray, want: np.ndarray) -> None:
    assert set(np.flatnonzero(frequencies)) <= set(np.flatnonzero(want))
    seen = want > 0
    chi_square = DRAWS * np.sum((frequencies[seen] - want[seen]) ** 2 / want[seen])
    # Mean k, variance 2k: six standard deviations, and the seed is fixed.
    k = max(1, seen.sum() - 1)
    assert chi_square < k + 6 * np.sqrt(2 * k), (chi_square, k)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": VOCAB + 5},
        {"top_p": 0.01},
        {"top_p": 0.6},
        {"top_p": 0.95, "temperature": 1.7},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"top_k": 8, "top_p": 0.8, "min_p": 0.2, "temperature": 1.3},
    ],
    ids=str,
)
def test_distribution(params: dict[str, Any]) -> None:
    bench = Bench()
    bench.start(3, SamplingParams(**params))
    want = probabilities(LOGITS.numpy(), SamplingParams(**params))
    frequencies = bench.frequencies(3)
    assert_drawn_from(frequencies, want)
    likely = want > 20 / DRAWS
    assert (frequencies[likely] > 0).all(), "nothing is filtered that should stay"


def test_draws_are_the_inverse_of_the_cumulative_distribution() -> None:
    bench = Bench()
    bench.start(0, SamplingParams(temperature=0.8), seed=123)
    drawn = [bench.draw(LOGITS.unsqueeze(0), [0])[0] for _ in range(100)]
    cumulative = probabilities(LOGITS.numpy(), SamplingParams(temperature=0.8)).cumsum()
    noise = uniform(np.full(100, 123, np.uint64), np.arange(100))
    assert drawn == np.searchsorted(cumulative, noise, side="right").tolist()


def test_top_k_wider_than_a_partial_sort() -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    bench = Bench(5000)
    bench.start(0, SamplingParams(top_k=2000))
    kept = set(logits.topk(2000).indices.tolist())
    drawn = set(np.flatnonzero(bench.frequencies(0, logits, draws=2000)))
    assert drawn <= kept
    assert len(drawn) > 500


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_greedy(temperature: float) -> None:
    bench = Bench()
    bench.start(0, SamplingParams(temperature=temperature, top_k=3, top_p=0.5))
    assert bench.draw(LOGITS.unsqueeze(0), [0]) == [3]


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -1.0},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_penalties(params: dict[str, Any]) -> None:
    prompt, output = (3, 4, 5, 5), [9, 9, 3, 1]
    bench = Bench()
    bench.start(2, SamplingParams(**params), prompt, tuple(output))
    want = penalised(LOGITS.numpy(), SamplingParams(**params), prompt, output)
    assert_drawn_from(bench.frequencies(2), probabilities(want, SamplingParams(**params)))


def test_penalties_follow_the_output_beside_requests_without() -> None:
    settings = [
        SamplingParams(temperature=0, presence_penalty=1.2),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, frequency_penalty=0.9, repetition_penalty=1.1),
    ]
    bench = Bench()
    outputs: list[list[int]] = [[], [], []]
    for row, params in enumerate(settings):
        bench.start(row, params, prompt=(3, 8))
    for _ in range(12):
        drawn = bench.draw(LOGITS.repeat(3, 1), [0, 1, 2])
        for params, output, token in zip(settings, outputs, drawn, strict=True):
            assert token == penalised(LOGITS.numpy(), params, (3, 8), output).argmax()
            output.append(token)
    assert len(set(outputs[0])) > 3 and set(outputs[1]) == {3}


def test_a_row_forgets_the_request_before() -> None:
    bench = Bench()
    everything = SamplingParams(
        presence_penalty=2.0, repetition_penalty=2.0, logit_bias={5: 50.0}, allowed_token_ids=[5, 6], top_k=2
    )
    bench.start(0, everything, prompt=(3, 4), output=(3, 3, 3))
    bench.start(0, SamplingParams())
    assert_drawn_from(bench.frequencies(0), probabilities(LOGITS.numpy(), SamplingParams()))
    bench.start(0, SamplingParams(presence_penalty=1.0), prompt=(1,), output=(2,))
    want = penalised(LOGITS.numpy(), SamplingParams(presence_penalty=1.0), (1,), [2])
    assert_drawn_from(bench.frequencies(0), probabilities(want, SamplingParams()))


def test_logit_bias() -> None:
    bench = Bench()
    bench.start(0, SamplingParams(logit_bias={3: -100.0, 5: 6.5, 0: 1.0}))
    biased = LOGITS.numpy().copy()
    biased[[3, 5, 0]] += [-100.0, 6.5, 1.0]
    frequencies = bench.frequencies(0)
    assert frequencies[3] == 0
    want = probabilities(biased, SamplingParams())
    want[3] = 0
    assert_drawn_from(frequencies, want)


def test_allowed_token_ids() -> None:
    bench = Bench()
    bench.start(0, SamplingParams(allowed_token_ids=[1, 5, 7], logit_bias={1: 1.0, 3: 50.0}))
    masked = np.full(VOCAB, -np.inf, np.float32)
    masked[[1, 5, 7]] = LOGITS.numpy()[[1, 5, 7]]
    masked[1] += 1.0
    assert_drawn_from(bench.frequencies(0), probabilities(masked, SamplingParams()))


def test_bad_words() -> None:
    bench = Bench()
    params = SamplingParams(temperature=0, bad_words=["x"], bad_words_token_ids=[[3], [9, 4], [7, 7, 0]])
    for row, output in enumerate([(), (9,), (7, 7), (7,), (4, 9)]):
        bench.start(row, params, prompt=(9,), output=output)
    # 3 never; 4 only unless 9 precedes it in the output (in the prompt it does not count); then 9.
    assert bench.draw(LOGITS.repeat(5, 1), [0, 1, 2, 3, 4]) == [4, 9, 4, 4, 9]
    favoured = LOGITS.clone()
    favoured[0] = 9.0
    bench.start(2, params, prompt=(9,), output=(7, 7))
    bench.start(3, params, prompt=(7,), output=(7,))
    assert bench.draw(favoured.repeat(2, 1), [2, 3]) == [4, 0]


def test_min_tokens() -> None:
    bench = Bench()
    bench.start(0, SamplingParams(temperature=0, min_tokens=3, max_tokens=9), prompt=(1, 2), stop=(3, 4))
    assert [bench.draw(LOGITS.unsqueeze(0), [0])[0] for _ in range(4)] == [9, 9, 9, 3]


MIXTURE = [
    SamplingParams(),
    SamplingParams(top_k=3),
    SamplingParams(temperature=0),
    SamplingParams(top_p=0.7, temperature=1.4),
    SamplingParams(presence_penalty=1.0, top_k=10),
    SamplingParams(min_p=0.1, logit_bias={2: 3.0}),
    SamplingParams(temperature=0.3, bad_words=["x"], bad_words_token_ids=[[3]]),
    SamplingParams(top_k=VOCAB - 1),
]


@pytest.mark.parametrize("mine", MIXTURE, ids=str)
def test_a_seeded_row_draws_the_same_in_any_company(mine: SamplingParams) -> None:
    alone = Bench()
    alone.start(0, mine, seed=5)
    want = [alone.draw(LOGITS.unsqueeze(0), [0])[0] for _ in range(40)]
    crowd = Bench()
    for row, params in enumerate(MIXTURE):
        crowd.start(row, params, seed=100 + row)
    crowd.start(20, mine, seed=5)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(40):
        rows = [*rng.permutation(len(MIXTURE))[: rng.integers(0, len(MIXTURE))].tolist(), 20]
        rng.shuffle(rows)
        at = rows.index(20)
        logits = torch.from_numpy(rng.normal(size=(len(rows), VOCAB))).float()
        logits[at] = LOGITS
        found.append(crowd.draw(logits, rows)[at])
    assert found == want


def test_a_row_that_starts_again_goes_on_where_it_was() -> None:
    for params in MIXTURE:
        bench = Bench()
        bench.start(0, params, prompt=(1, 2), seed=9)
        want = [bench.draw(LOGITS.unsqueeze(0), [0])[0] for _ in range(20)]
        bench = Bench()
        bench.start(0, params, prompt=(1, 2), seed=9)
        head = [bench.draw(LOGITS.unsqueeze(0), [0])[0] for _ in range(8)]
        bench.start(4, params, prompt=(1, 2), output=tuple(head), seed=9)
        assert head + [bench.draw(LOGITS.unsqueeze(0), [4])[0] for _ in range(12)] == want, params


def test_uniform_numbers() -> None:
    counters = np.arange(100_000)
    for seed in (0, 1, 2**63, 2**64 - 1):
        noise = uniform(np.full(len(counters), seed, np.uint64), counters)
        assert noise.min() >= 0 and noise.max() < 1
        assert abs(noise.mean() - 0.5) < 0.005 and abs(noise.var() - 1 / 12) < 0.002
        assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.02
    first = uniform(np.arange(100_000, dtype=np.uint64), np.zeros(100_000))
    assert abs(first.mean() - 0.5) < 0.005, "neighbouring seeds differ"
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.02


def test_logprobs_are_those_of_the_model() -> None:
    bench = Bench()
    params = SamplingParams(temperature=0.4, top_k=2, logit_bias={7: 5.0}, presence_penalty=1.0, logprobs=3)
    bench.start(0, SamplingParams())
    bench.start(1, params, prompt=(3,), output=(3,))
    bench.start(2, SamplingParams(logprobs=0, temperature=0))
    logits = torch.stack([LOGITS, LOGITS, LOGITS.flip(0)])
    rows = np.array([0, 1, 2])
    drawn, asked = bench.sampler.sample(logits.clone(), rows, bench.num_tokens[rows], bench.token_ids)
    assert asked is not None
    found = asked.by_row()
    assert found.keys() == {1, 2}
    want = logits.double().log_softmax(dim=-1)
    for i, top in ((1, 3), (2, 0)):
        entry, token = found[i], int(drawn[i])
        best = want[i].argsort(descending=True).tolist()
        assert entry.token_ids == [[token, *best[:top]]]
        assert entry.ranks == [best.index(token) + 1]
        np.testing.assert_allclose(entry.logprobs[0], want[i][entry.token_ids[0]].numpy(), atol=1e-5)


def test_no_logprobs_unless_asked_for() -> None:
    bench = Bench()
    bench.start(0, SamplingParams())
    rows = np.array([0])
    assert bench.sampler.sample(LOGITS.unsqueeze(0), rows, bench.num_tokens[rows], bench.token_ids)[1] is None


def test_logprobs_of_several_positions_of_a_row() -> None:
    logprobs = torch.stack([LOGITS, LOGITS.flip(0), LOGITS]).log_softmax(dim=-1)
    found = LogprobTensors.at(logprobs, torch.tensor([9, 3, 3]), [0, 2, 0], [4, 1, 4]).by_row()
    assert found[4].token_ids == [[9], [3]] and found[4].ranks == [3, 1]
    assert found[1].token_ids == [[3, 12, 11]] and found[1].ranks == [1 + int(LOGITS.gt(LOGITS[12]).sum())]
    assert found[4].logprobs[1] == pytest.approx([float(logprobs[0, 3])])
    assert LogprobTensors.at(logprobs[:0], torch.tensor([], dtype=torch.int64), [], []).by_row() == {}

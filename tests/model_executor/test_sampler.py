"""The sampler on a CPU: draws of the reference against numpy, their independence of the batch, log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vllm.model_executor.layers.sampler import LogprobTensors, Sampler, TokenMasks
from vllm.ops.sampling import uniform
from vllm.sampling_params import SamplingParams
from vllm.step import PositionLogprobs, SequenceStart
from vllm.token_ids import token_array

VOCAB = 16
DRAWS = 200
LOGITS = torch.tensor([2.0, -1.0, 0.5, 3.0, 2.9, -4.0, 1.0, 0.0, 1.5, 2.5, -0.5, 0.2, -2.0, 1.2, 0.7, -3.0])


class Bench:
    """A sampler with rows of our own, and the tokens of each."""

    def __init__(self, vocab: int = VOCAB) -> None:
        self.sampler = Sampler(64, vocab, torch.device("cpu"))
        self.token_ids = torch.zeros(65, DRAWS + 100, dtype=torch.int64)
        self.num_tokens = np.zeros(64, np.int64)
        self.prompts: dict[int, int] = {}

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
        self.num_tokens[row], self.prompts[row] = len(ids), len(prompt)
        self.sampler.start([SequenceStart(row, token_array(ids), len(prompt), [], (), params, seed, stop)])

    def draw(self, logits: torch.Tensor, rows: list[int], masks: TokenMasks | None = None) -> list[int]:
        """One token for each row, which then belongs to it."""
        index = np.array(rows)
        before = logits.clone()
        drawn = self.sampler.draw(logits, index, self.num_tokens[index], self.token_ids, masks).tolist()
        assert torch.equal(logits, before)
        assert self.token_ids[rows, self.num_tokens[index]].tolist() == drawn
        self.num_tokens[index] += 1
        return drawn

    def assert_draws_from(self, row: int, want: np.ndarray, logits: torch.Tensor = LOGITS, seed: int = 7) -> None:
        """First draws of a row, each as if it had another number of output tokens: by inversion of the cumulative
        distribution `want`."""
        first = self.num_tokens[row]
        counts = self.sampler.rows.tables.counts[row].clone()
        drawn = []
        for i in range(DRAWS):
            drawn += self.draw(logits.unsqueeze(0), [row])
            self.sampler.rows.tables.counts[row] = counts
            assert self.num_tokens[row] == first + i + 1
        noise = [uniform(seed, int(first) - self.prompts[row] + i) for i in range(DRAWS)]
        assert drawn == np.searchsorted(want.cumsum(), noise, side="right").tolist()


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
    bench.assert_draws_from(3, probabilities(LOGITS.numpy(), SamplingParams(**params)))


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
    bench.assert_draws_from(2, probabilities(want, SamplingParams(**params)))


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
    bench.assert_draws_from(0, probabilities(LOGITS.numpy(), SamplingParams()))
    bench.start(0, SamplingParams(presence_penalty=1.0), prompt=(1,), output=(2,))
    want = penalised(LOGITS.numpy(), SamplingParams(presence_penalty=1.0), (1,), [2])
    bench.assert_draws_from(0, probabilities(want, SamplingParams()))


def test_logit_bias() -> None:
    bench = Bench()
    bench.start(0, SamplingParams(logit_bias={3: -100.0, 5: 6.5, 0: 1.0}))
    biased = LOGITS.numpy().copy()
    biased[[3, 5, 0]] += [-100.0, 6.5, 1.0]
    bench.assert_draws_from(0, probabilities(biased, SamplingParams()))


def test_allowed_token_ids() -> None:
    bench = Bench()
    bench.start(0, SamplingParams(allowed_token_ids=[1, 5, 7], logit_bias={1: 1.0, 3: 50.0}, top_k=9))
    masked = np.full(VOCAB, -np.inf, np.float32)
    masked[[1, 5, 7]] = LOGITS.numpy()[[1, 5, 7]]
    masked[1] += 1.0
    bench.assert_draws_from(0, probabilities(masked, SamplingParams()))


def test_masks_go_before_what_parameters_allow() -> None:
    bench = Bench()
    bench.start(0, SamplingParams(allowed_token_ids=[1, 2], temperature=0))
    bench.start(1, SamplingParams(allowed_token_ids=[1, 5], temperature=0), stop=(5,))
    bench.start(2, SamplingParams(allowed_token_ids=[1, 5], min_tokens=3, max_tokens=9, temperature=0), stop=(5, 6))
    bench.start(3, SamplingParams(temperature=0))
    mask = np.array([[1 << 5 | 1 << 6]], np.int32)
    masks = TokenMasks(np.array([0, 1, 2]), mask.repeat(3, axis=0))
    # None of the mask's tokens is allowed; one is; one is, but banned; no mask.
    assert bench.draw(LOGITS.repeat(4, 1), [0, 1, 2, 3], masks) == [5, 5, 5, 3]


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
    count = 20_000
    for seed in (0, 1, 2**63, 2**64 - 1):
        noise = np.array([uniform(seed, counter) for counter in range(count)])
        assert noise.min() >= 0 and noise.max() < 1
        assert abs(noise.mean() - 0.5) < 0.01 and abs(noise.var() - 1 / 12) < 0.004
        assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.03
    first = np.array([uniform(seed, 0) for seed in range(count)])
    assert abs(first.mean() - 0.5) < 0.01, "neighbouring seeds differ"
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.03


def numbers(memory: bytes, kind: str = "I") -> list[float]:
    return memoryview(memory).cast(kind).tolist()


def test_logprobs_are_those_of_the_model() -> None:
    bench = Bench()
    params = SamplingParams(temperature=0.4, top_k=2, logit_bias={7: 5.0}, presence_penalty=1.0, logprobs=3)
    bench.start(0, SamplingParams())
    bench.start(1, params, prompt=(3,), output=(3,))
    bench.start(2, SamplingParams(logprobs=0, temperature=0))
    logits = torch.stack([LOGITS, LOGITS, LOGITS.flip(0)])
    rows = np.array([0, 1, 2])
    drawn = bench.sampler.draw(logits, rows, bench.num_tokens[rows], bench.token_ids)
    asked = bench.sampler.logprobs(logits, rows, drawn)
    assert asked is not None
    found = asked.by_row(asked.table.numpy())
    assert found.keys() == {1, 2}
    want = logits.double().log_softmax(dim=-1)
    for i, top in ((1, 3), (2, 0)):
        entry, token = found[i], int(drawn[i])
        best = want[i].argsort(descending=True).tolist()
        assert entry.width == 1 + top and numbers(entry.ranks) == [best.index(token) + 1]
        token_ids = numbers(entry.token_ids)
        assert token_ids == [token, *best[:top]]
        np.testing.assert_allclose(numbers(entry.logprobs, "d"), want[i][token_ids].numpy(), atol=1e-5)


def test_no_logprobs_unless_asked_for() -> None:
    bench = Bench()
    bench.start(0, SamplingParams())
    assert bench.sampler.logprobs(LOGITS.unsqueeze(0), np.array([0]), torch.tensor([3])) is None


def test_logprobs_of_several_positions_of_a_row() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    part = Bench().sampler.prompt_logprobs(logits, torch.tensor([9, 3, 3]), 2)
    found = LogprobTensors([4, 1, 4], [0, 2, 0], part.table).by_row(part.table.numpy())
    assert numbers(found[4].token_ids) == [9, 3] and numbers(found[4].ranks) == [3, 1]
    assert numbers(found[1].token_ids) == [3, 12, 11] and found[1].width == 3
    assert numbers(found[1].ranks) == [1 + int(LOGITS.gt(LOGITS[12]).sum())]
    assert numbers(found[4].logprobs, "d")[1] == pytest.approx(float(LOGITS.double().log_softmax(dim=-1)[3]))


def test_log_probabilities_of_chunks_are_joined() -> None:
    none, one, two = (
        PositionLogprobs(w, b"a" * 4 * w * p, b"b" * 8 * w * p, b"c" * 4 * p) for w, p in ((1, 0), (3, 1), (3, 2))
    )
    joined = PositionLogprobs.joined([none, one, two])
    assert (len(joined), joined.width) == (3, 3) and joined.token_ids == one.token_ids + two.token_ids
    assert len(PositionLogprobs.joined([])) == 0


def test_a_row_beyond_the_tables_is_padding() -> None:
    bench = Bench()
    assert bench.sampler.rows.is_greedy.shape == (65,)
    assert bench.sampler.takes_most_likely([64])
    assert bench.sampler.draw(LOGITS.unsqueeze(0), np.array([64]), np.array([1]), bench.token_ids).tolist() == [3]

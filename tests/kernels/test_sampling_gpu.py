"""The draw on a GPU over a vocabulary of real size: its distribution, what exactly it keeps, and that nothing of a
request makes the host wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.kernel_inputs import DEVICE
from tests.kernels.sampling_rows import Rows, mask_of
from vllm.model_executor.layers.sampler import Sampler, TokenMasks
from vllm.ops import sampling
from vllm.ops.sampling import LATER, NO_MASK, FloatColumn, IntColumn
from vllm.ops.triton.sampling import _CUT
from vllm.sampling_params import SamplingParams
from vllm.step import SequenceStart
from vllm.token_ids import token_array

pytestmark = pytest.mark.gpu

VOCAB = 128_256
BATCH = 256
CALLS = 400

# Tokens with a chance, all over the vocabulary; the first of them is 11.
LIKELY = list(range(11, VOCAB, 1289))
PENALTIES = {"presence_penalty": 0.4, "frequency_penalty": 0.2, "repetition_penalty": 1.3}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 1.7},
    "top_k": {"top_k": 30},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all three": {"temperature": 1.3, "top_k": 60, "top_p": 0.9, "min_p": 0.02},
    "penalties": {"prompt": tuple(LIKELY[10:30]), "output": (*LIKELY[:5], *LIKELY[:3]), **PENALTIES},
    "bias": {"logit_bias": {LIKELY[0]: 2.0, LIKELY[50]: -1.0, 5: 30.0}},
    "allowed": {"allowed_token_ids": LIKELY[::2], "top_k": 20},
    "mask": {},
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_distribution(kind: str) -> None:
    """Pearson's chi-square of 102,400 draws: 256 seeds, 400 tokens of each."""
    scores = torch.full((VOCAB,), -30.0, device=DEVICE)
    scores[LIKELY] = randn(len(LIKELY))
    logits = scores.bfloat16().repeat(BATCH, 1)
    bench = Rows(BATCH, VOCAB)
    for row in range(BATCH):
        bench.start(row, seed=row, **KINDS[kind])
    bench.token_ids = torch.zeros((BATCH + 2, CALLS + 100), dtype=torch.int64, device=DEVICE)
    tables, first = bench.rows.tables, int(bench.num_tokens[0])
    masks = mask_rows = None
    if kind == "mask":
        masks = mask_of(LIKELY[::3], VOCAB).unsqueeze(0)
        mask_rows = torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)

    want = sampling.adjusted(logits[0].float(), 0, first, bench.token_ids, tables)
    if kind == "mask":
        outside = torch.full((VOCAB,), -torch.inf, device=DEVICE)
        outside[LIKELY[::3]] = 0.0
        want = want + outside
    want = want / tables.floats[0, FloatColumn.TEMPERATURE]
    _, top_p, min_p, *_ = tables.floats[0].tolist()
    cut = sampling.cut_of(want, int(tables.ints[0, IntColumn.TOP_K]), top_p, min_p)
    expected = BATCH * CALLS * torch.softmax(torch.where(want >= cut, want, -torch.inf).double(), 0)

    counts, observed = tables.counts.clone(), torch.zeros(VOCAB, device=DEVICE, dtype=torch.float64)
    for call in range(CALLS):
        num_tokens = torch.full((BATCH,), first + call, dtype=torch.int64, device=DEVICE)
        drawn = bench.draw(logits, list(range(BATCH)), num_tokens, masks, mask_rows)
        observed += torch.bincount(torch.tensor(drawn, device=DEVICE), minlength=VOCAB)
        tables.counts.copy_(counts)
    assert observed[expected < 1e-9].sum() == 0
    likely = expected > 5
    freedom = int(likely.sum()) - 1
    assert freedom > 5
    statistic = float(((observed - expected)[likely] ** 2 / expected[likely]).sum())
    # 1 of 10,000 is higher (Wilson and Hilferty, 1931); the seeds are always the same.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3


CUTS: list[dict[str, Any]] = [
    *({"top_k": k} for k in (1, 2, 50, 1000, 100_000, VOCAB - 1)),
    *({"top_p": p} for p in (1e-4, 0.1, 0.5, 0.9, 0.95, 0.999)),
    *({"min_p": p} for p in (0.001, 0.1, 1.0)),
    {"top_p": 0.95, "temperature": 0.3},
    {"top_p": 0.95, "temperature": 100.0},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 50_000, "top_p": 0.9, "min_p": 0.01, "temperature": 1.5},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["flat", "peaked", "two values"])
def test_what_is_kept_is_exact(shape: str, dtype: torch.dtype) -> None:
    """As the cut of the reference keeps it. Only where the weight at the border is nearer to top_p than float32 tells
    may it be the next score."""
    scores = randn(len(CUTS), VOCAB, seed=3)
    if shape == "peaked":
        scores *= 4
    if shape == "two values":
        scores = (scores > 0.5).float()
    logits = scores.to(dtype)
    bench = Rows(len(CUTS), VOCAB)
    for row, params in enumerate(CUTS):
        bench.start(row, **params)
    bench.draw(logits, list(range(len(CUTS))))
    near = 0
    for row, params in enumerate(CUTS):
        x = logits[row].float()
        asked = SamplingParams(**params)
        scaled = x / asked.temperature
        kept = x >= float(bench.kernels._state[row, _CUT.value])
        want = scaled >= sampling.cut_of(
            scaled, asked.top_k, float(np.float32(asked.top_p)), float(np.float32(asked.min_p))
        )
        if torch.equal(kept, want):
            continue
        between = x[kept != want]
        assert asked.top_p < 1 and len(between.unique()) == 1, params
        weights = torch.exp((scaled - scaled.max()).double())
        base = weights.sum() if not asked.top_k else weights[scaled >= scaled.topk(asked.top_k).values[-1]].sum()
        border = min(float(weights[kept].sum()), float(weights[want].sum())) / float(base)
        assert abs(border - asked.top_p) < 1e-6, params
        near += 1
    assert near <= 1


MIXTURE: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"top_k": 40},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 1000, "top_p": 0.5, "min_p": 0.001, "temperature": 0.7},
    {"prompt": (1, 2, 3), **PENALTIES},
    {"logit_bias": {7: 9.0, VOCAB - 1: 8.0}},
    {"allowed_token_ids": list(range(0, VOCAB, 11)), "top_p": 0.9},
    {"min_tokens": 5, "max_tokens": 60, "stops": (7, 8), "temperature": 0.5},
    {"bad_words": ["x"], "bad_words_token_ids": [[7], [8, 9]], "top_k": 5},
]


def mixed_rows(count: int) -> Rows:
    bench = Rows(count, VOCAB)
    for row in range(count):
        bench.start(row, seed=row, **MIXTURE[row % len(MIXTURE)])
    return bench


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_a_row_of_every_kind_in_one_batch(spread: float) -> None:
    bench, rows, differ = mixed_rows(len(MIXTURE)), list(range(len(MIXTURE))), 0
    for step in range(8):
        logits = (spread * randn(len(rows), VOCAB, seed=step)).bfloat16()
        want = bench.expected(logits, rows)
        drawn = bench.draw(logits, rows)
        # The rounding of a sum may move a border between two tokens over the number that was drawn.
        differ += sum(a != b for a, b in zip(drawn, want, strict=True))
        bench.advance(rows, drawn)
    assert differ <= 1


def test_a_seed_draws_the_same_in_any_company() -> None:
    count = 200
    bench, alone = mixed_rows(count), mixed_rows(count)
    logits = randn(count, VOCAB, seed=9).bfloat16()
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    drawn = bench.draw(logits[rows].contiguous(), rows)
    again = [alone.draw(logits[row : row + 1].contiguous(), [row])[0] for row in rows[:60]]
    assert drawn[:60] == again
    for size in (2, 17):
        fresh = mixed_rows(count)
        assert fresh.draw(logits[rows[:size]].contiguous(), rows[:size]) == drawn[:size]


def test_replays_draw_what_calls_draw() -> None:
    """The graph was captured over rows that ask for nothing; other rows, tokens and masks come later."""
    count = len(MIXTURE) + 3
    called, replayed = mixed_rows(len(MIXTURE)), Rows(len(MIXTURE), VOCAB)
    padding = called.token_ids.shape[0] - 1
    logits = torch.zeros(count, VOCAB, dtype=torch.bfloat16, device=DEVICE)
    rows = torch.full((count,), padding, device=DEVICE)
    positions, drawn = torch.zeros_like(rows), torch.zeros_like(rows)
    later = torch.full_like(rows, NO_MASK)

    def launch() -> None:
        batch = (logits, rows, positions, replayed.token_ids, drawn)
        replayed.kernels.draw(*batch, mask_rows=later, shift=1)
        replayed.kernels.restrict(*batch, shift=1)

    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for row, params in enumerate(MIXTURE):
        replayed.start(row, seed=row, **params)
    masks = mask_of(list(range(5, VOCAB, 7)), VOCAB).unsqueeze(0)
    for step in range(5):
        order = torch.randperm(len(MIXTURE), generator=torch.Generator().manual_seed(step)).tolist()
        logits[:] = randn(count, VOCAB, seed=step).bfloat16()
        rows[: len(order)] = torch.tensor(order, device=DEVICE)
        positions[: len(order)] = torch.from_numpy(replayed.num_tokens[order] - 1).to(DEVICE)
        # The last two are drawn under a mask, after the replay.
        later[len(order) - 2 : len(order)] = LATER
        graph.replay()
        mask_rows = torch.full_like(rows, LATER)
        mask_rows[len(order) - 2 : len(order)] = 0
        batch = (logits, rows, positions, replayed.token_ids, drawn)
        replayed.kernels.draw(*batch, masks, mask_rows, shift=1)
        replayed.kernels.restrict(*batch, shift=1)
        mask_rows = torch.full((len(order),), NO_MASK, device=DEVICE)
        mask_rows[-2:] = 0
        want = called.draw(logits[: len(order)], order, masks=masks, mask_rows=mask_rows)
        assert drawn[: len(order)].tolist() == want, step
        assert drawn[len(order) :].tolist() == logits[len(order) :].argmax(dim=-1).tolist()
        called.advance(order, want)
        replayed.advance(order, want)
        assert torch.equal(called.rows.tables.counts, replayed.rows.tables.counts)


def test_nothing_that_rows_ask_for_makes_the_host_wait() -> None:
    sampler = Sampler(64, VOCAB, DEVICE)
    token_ids = torch.zeros((65, 64), dtype=torch.int64, device=DEVICE)
    logits = randn(len(MIXTURE), VOCAB).bfloat16()
    rows = np.arange(len(MIXTURE))
    sampler.take_memory(logits, token_ids, 5)
    words = np.full((1, -(-VOCAB // 32)), -1, np.int32)

    def step(seed: int) -> None:
        starts = []
        for row, params in enumerate(MIXTURE):
            asked = {key: value for key, value in params.items() if key not in ("prompt", "stops")}
            ids = token_array([1, 2, 3])
            asked["logprobs"] = 3
            starts.append(SequenceStart(row, ids, 3, [], (), SamplingParams(**asked), seed, (7,)))
        sampler.start(starts)
        drawn = sampler.draw(logits, rows, np.full(len(rows), 3), token_ids, TokenMasks(np.array([2]), words))
        assert sampler.logprobs(logits, rows, drawn) is not None
        sampler.prompt_logprobs(logits[:2], token_ids[0, :2], 4)

    step(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")

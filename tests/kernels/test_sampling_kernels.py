"""The kernels of the draw against the plain reference, over small vocabularies of odd sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.kernel_inputs import DEVICE, randn
from tests.kernels.sampling_rows import Rows, mask_of
from vllm.ops.sampling import LATER, NO_MASK

VOCAB, CHUNK = 173, 64
SEARCH = {"chunk": CHUNK, "pivots": 3, "rounds": 1}
DTYPES = [torch.float32, torch.bfloat16]

RESTRICTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 1e-5},
    {"temperature": 100.0},
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 50},
    {"top_k": VOCAB - 1},
    {"top_k": VOCAB},
    {"top_p": 1e-6},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 0.9999},
    {"top_p": 0.9, "temperature": 100.0},
    {"top_p": 0.9, "temperature": 1e-5},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"min_p": 0.01, "temperature": 3.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 3, "top_p": 0.999, "min_p": 0.5},
    {"top_k": 100, "top_p": 0.7, "min_p": 0.02, "temperature": 1.5},
]


def flat(rows: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return randn(rows, VOCAB, dtype=dtype, seed=seed)


def peaked(rows: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A few tokens have nearly all of the weight."""
    return (4 * randn(rows, VOCAB, seed=seed)).to(dtype)


def tied(rows: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Few distinct scores, zeros of both signs among them."""
    scores = randn(rows, VOCAB, seed=seed).round()
    return torch.where((scores == 0) & (randn(rows, VOCAB, seed=1) > 0), -0.0, scores).to(dtype)


def gappy(rows: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Half of the tokens at -inf, all of a chunk and all but one token of the last row among them."""
    scores = randn(rows, VOCAB, dtype=dtype, seed=seed)
    scores[:, ::2] = float("-inf")
    scores[:, CHUNK : 2 * CHUNK] = float("-inf")
    scores[-1] = float("-inf")
    scores[-1, 150] = -3.0
    return scores


SHAPES = [flat, peaked, tied, gappy]


def check_restrictions(logits: torch.Tensor, restrictions: list[dict[str, Any]], **search: int) -> None:
    bench = Rows(len(restrictions), VOCAB, **search)
    for row, params in enumerate(restrictions):
        bench.start(row, seed=row, **params)
    rows = list(range(len(restrictions)))
    assert bench.draw(logits, rows) == bench.expected(logits, rows)


@pytest.mark.parametrize("first", [0, 1])
def test_restrictions(first: int) -> None:
    """Every other one in each dtype, over scores of different shapes."""
    restrictions = RESTRICTIONS[first::2]
    shapes = [make(len(restrictions), DTYPES[first]) for make in SHAPES]
    logits = torch.stack([shapes[i % len(shapes)][i] for i in range(len(restrictions))])
    check_restrictions(logits, restrictions, **SEARCH)


@pytest.mark.nightly
@pytest.mark.parametrize("pivots", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", SHAPES)
def test_restrictions_of_every_shape(make: Any, dtype: torch.dtype, pivots: int) -> None:
    for seed in range(3):
        check_restrictions(make(len(RESTRICTIONS), dtype, seed), RESTRICTIONS, chunk=CHUNK, pivots=pivots, rounds=2)


def test_one_token_is_left_and_all_are_equal() -> None:
    bench = Rows(4, VOCAB, **SEARCH)
    for row, params in enumerate(({"top_p": 0.5}, {"top_k": 7}, {"min_p": 0.9}, {})):
        bench.start(row, seed=row, **params)
    rows = [0, 1, 2, 3]
    equal = torch.zeros(4, VOCAB, device=DEVICE)
    assert bench.draw(equal, rows) == bench.expected(equal, rows)
    alone = torch.full((4, VOCAB), float("-inf"), device=DEVICE)
    alone[:, 77] = -1000.0
    assert bench.draw(alone, rows) == [77] * 4


def test_a_small_vocabulary_is_one_chunk() -> None:
    bench = Rows(3, 7, **SEARCH)
    for row, params in enumerate(({}, {"top_k": 3, "top_p": 0.9}, {"temperature": 0})):
        bench.start(row, seed=row, **params)
    logits = randn(3, 7)
    for _ in range(4):
        want = bench.expected(logits, [0, 1, 2])
        assert bench.draw(logits, [0, 1, 2]) == want
        bench.advance([0, 1, 2], want)


# Tokens 0 to 9 are drawn most of the time.
LIKELY = torch.full((VOCAB,), -5.0)
LIKELY[:10] = torch.tensor([2.0, -1.0, 0.5, 3.0, 2.9, 1.0, 0.0, 1.5, 2.5, -0.5])

ADJUSTMENTS: list[dict[str, Any]] = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.7},
    {"repetition_penalty": 1.8, "prompt": (3, 4, 130)},
    {"presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 0.7, "prompt": (1, 2), "output": (5, 5)},
    {"logit_bias": {3: -100.0, 5: 6.5, 64: 9.0, 172: 8.0}},
    {"allowed_token_ids": [0, 1, 63, 64, 172], "top_k": 50},
    {"min_tokens": 3, "max_tokens": 60, "stops": (3, 4, 8)},
    {"bad_words": ["x"], "bad_words_token_ids": [[3], [4, 8], [7, 7, 0], [8, 8, 8, 8], [5, 3, 4, 0]]},
    {
        "presence_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {0: 1.0, 9: 2.0},
        "allowed_token_ids": list(range(0, VOCAB, 3)),
        "min_tokens": 5,
        "max_tokens": 60,
        "stops": (3,),
        "bad_words": ["x"],
        "bad_words_token_ids": [[0, 9], [9]],
        "top_k": 60,
        "top_p": 0.9,
        "min_p": 0.001,
        "temperature": 1.3,
    },
]


def test_a_batch_in_which_every_row_asks_for_something_else() -> None:
    """Drawn from one after the other as a server does, beside greedy and plain rows; the rows trade places."""
    settings = [*ADJUSTMENTS, {}, {"temperature": 0}]
    bench = Rows(len(settings), VOCAB, **SEARCH)
    for row, params in enumerate(settings):
        bench.start(row, seed=row, **params)
    for step in range(4):
        rows = torch.randperm(len(settings), generator=torch.Generator().manual_seed(step)).tolist()
        logits = (LIKELY.to(DEVICE) + randn(len(rows), VOCAB, seed=step)).bfloat16()
        want = bench.expected(logits, rows)
        assert bench.draw(logits, rows) == want, step
        bench.advance(rows, want)


def test_bad_words_are_compared_with_the_output_alone() -> None:
    bench = Rows(7, VOCAB, **SEARCH)
    words = [[3], [9, 4], [7, 7, 0], [1, 2, 3, 4, 5, 6]]
    outputs = [(), (9,), (7, 7), (7,), (4, 9), (0, 1, 2, 3, 4, 5), (2, 3, 4, 5)]
    for row, output in enumerate(outputs):
        prompt = (0, 7) if row == 3 else (0, 9)
        bench.start(
            row, prompt, output, temperature=0, bad_words=["x"], bad_words_token_ids=words, logit_bias={0: 1.0, 6: 1.5}
        )
    rows = list(range(7))
    logits = LIKELY.repeat(7, 1).to(DEVICE)
    # 0 and 6 are at 3.0 and 1.5, 4 at 2.9, 8 at 2.5.
    assert bench.draw(logits, rows) == [0, 0, 4, 0, 0, 0, 0] == bench.expected(logits, rows)
    logits[:, 6] = 9.0
    assert bench.draw(logits, rows) == [6, 6, 6, 6, 6, 0, 6]


def test_many_bad_words_and_one_as_long_as_the_table() -> None:
    bench = Rows(3, VOCAB, **SEARCH)
    bench.start(0, temperature=0, bad_words=["x"], bad_words_token_ids=[[i % 10] for i in range(512)])
    bench.start(1, temperature=0, bad_words=["x"], bad_words_token_ids=[[2] * 2048])
    bench.start(
        2, (2,), (5,) * 40, temperature=0, bad_words=["x"], bad_words_token_ids=[[5] * 40 + [3], [5] * 41 + [4]]
    )
    logits = LIKELY.repeat(3, 1).to(DEVICE)
    assert bench.draw(logits, [0, 1, 2]) == [10, 3, 4]


def test_masks_forbid_more_than_any_parameter() -> None:
    bench = Rows(6, VOCAB, **SEARCH)
    asked = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}
    bench.start(0, allowed_token_ids=[1, 2, 3], **asked)
    bench.start(1, bad_words=["x"], bad_words_token_ids=[[100], [101]], **asked)
    bench.start(2, allowed_token_ids=[1, 100], stops=(100,), min_tokens=2, max_tokens=9, **asked)
    bench.start(3, logit_bias={100: -100.0, 101: -100.0}, temperature=0)
    bench.start(4)
    bench.start(5, temperature=0)
    masks = torch.stack([mask_of([100, 101], VOCAB), mask_of([172], VOCAB)])
    logits = randn(6, VOCAB)
    rows = [0, 1, 2, 3, 4, 5]
    mask_rows = torch.tensor([0, 0, 0, 0, 1, NO_MASK], device=DEVICE)
    want = bench.expected(logits, rows, masks, mask_rows)
    assert bench.draw(logits, rows, masks=masks, mask_rows=mask_rows) == want
    # The only one that is allowed, though banned; the only one that the mask has.
    assert want[2] == 100 and want[4] == 172 and set(want[:2]) <= {100, 101}


def test_rows_that_are_drawn_later_are_left_alone() -> None:
    bench = Rows(4, VOCAB, **SEARCH)
    for row, params in enumerate(({}, {"top_p": 0.8}, {"presence_penalty": 1.0}, {"temperature": 0})):
        bench.start(row, seed=row, **params)
    rows, logits = [0, 1, 2, 3], flat(4, torch.bfloat16)
    masks = mask_of([5, 70, 150], VOCAB).unsqueeze(0)
    mask_rows = torch.tensor([NO_MASK, 0, 0, 0], device=DEVICE)
    want = bench.expected(logits, rows, masks, mask_rows)
    before, counts = bench.token_ids.clone(), bench.rows.tables.counts.clone()
    first = bench.draw(logits, rows, mask_rows=torch.tensor([NO_MASK, LATER, LATER, LATER], device=DEVICE))
    assert first == [want[0], -7, -7, -7]
    before[0, 1] = want[0]
    assert torch.equal(bench.token_ids, before) and torch.equal(bench.rows.tables.counts, counts)
    second = bench.draw(logits, rows, masks=masks, mask_rows=torch.tensor([LATER, 0, 0, 0], device=DEVICE))
    assert second == [-7, *want[1:]]
    counts[2, want[2]] += 1
    assert torch.equal(bench.rows.tables.counts, counts)


def test_padding_rows_are_greedy() -> None:
    """Their number is beyond those of the tables; what they draw goes to their own row of the tokens."""
    bench = Rows(2, VOCAB, **SEARCH)
    bench.start(0, top_p=0.9)
    bench.start(1, presence_penalty=1.0)
    logits = flat(5, torch.float32)
    padding = bench.token_ids.shape[0] - 1
    drawn = bench.draw(logits, [0, 1, padding, padding, padding])
    assert drawn[:2] == bench.expected(logits[:2], [0, 1])
    assert drawn[2:] == logits[2:].argmax(dim=-1).tolist()
    assert not bench.token_ids[2].any()


def test_counts_stay_within_their_type() -> None:
    bench = Rows(2, VOCAB, **SEARCH)
    for row in (0, 1):
        bench.start(row, presence_penalty=0.1, temperature=0)
    bench.rows.tables.counts[0, 5], bench.rows.tables.counts[1, 5] = 32766, -1
    logits = torch.zeros(2, VOCAB, device=DEVICE)
    logits[:, 5] = 50.0
    for _ in range(3):
        assert bench.draw(logits, [0, 1]) == [5, 5]
    assert bench.rows.tables.counts[:2, 5].tolist() == [32767, -1]


@pytest.mark.parametrize("top", [0, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs(dtype: torch.dtype, top: int) -> None:
    bench = Rows(6, VOCAB, **SEARCH)
    logits = peaked(6, dtype)
    logits[2, 100:] = float("-inf")
    tokens = torch.tensor([0, 5, 17, 172, 64, 63], device=DEVICE)
    picked = [4, 0, 2, 5]
    found = bench.kernels.logprobs(logits, torch.tensor(picked, device=DEVICE), tokens, top)
    want = logits.double().log_softmax(dim=-1)[picked]
    chosen = tokens[picked].unsqueeze(-1)
    values = want.gather(-1, chosen)
    assert torch.equal(found[:, 0].long(), chosen.squeeze(-1))
    torch.testing.assert_close(found[:, 1], values.squeeze(-1), atol=1e-6, rtol=0)
    assert torch.equal(found[:, 2].long(), 1 + (want > values).sum(dim=-1))
    best = want.sort(dim=-1, descending=True).values[:, :top]
    torch.testing.assert_close(found[:, 3 + top :], best, atol=1e-6, rtol=0)
    torch.testing.assert_close(want.gather(-1, found[:, 3 : 3 + top].long()), best)


def test_refuses_rows_that_are_not_contiguous() -> None:
    bench = Rows(2, VOCAB, **SEARCH)
    with pytest.raises(ValueError, match="not contiguous rows of 173 tokens"):
        bench.draw(randn(2, 2 * VOCAB)[:, ::2], [0, 1])
    with pytest.raises(ValueError, match="not contiguous rows of 173 tokens"):
        bench.draw(randn(2, VOCAB + 1), [0, 1])

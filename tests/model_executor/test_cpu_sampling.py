"""Draws and log-probabilities of the compiled CPU kernels against the plain reference, with every set of instructions
that this processor has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm.ops import sampling
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.ops.cpu import sampling as cpu_sampling
from vllm.ops.sampling import Flag, FloatColumn, IntColumn, SamplingTables

pytestmark = pytest.mark.parametrize("cpu_instructions", cpu_kernels.INSTRUCTIONS, indirect=True)

CPU = torch.device("cpu")
INF = float("inf")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tables_of(rows: int, vocab: int, **wishes: float) -> SamplingTables:
    """Every row with the same wishes, named as the columns; no prompt, seeds 0, 1, …"""
    tables = SamplingTables.make(rows, vocab, CPU)
    defaults = {"temperature": 1.0, "top_p": 1.0, "repetition": 1.0}
    for name, value in {**defaults, **wishes}.items():
        if name.upper() in FloatColumn.__members__:
            tables.floats[:, FloatColumn[name.upper()]] = value
        else:
            tables.ints[:, IntColumn[name.upper()]] = int(value)
    tables.ints[:, IntColumn.SEED] = torch.arange(rows)
    return tables


def clone(tables: SamplingTables) -> SamplingTables:
    return SamplingTables(*(table.clone() for table in tables))


def add_rare_wishes(tables: SamplingTables, row: int, vocab: int, token_ids: torch.Tensor, num_tokens: int) -> None:
    """Everything that only few requests ask for, all of it at once."""
    generator = torch.Generator().manual_seed(row)

    def some(count: int) -> torch.Tensor:
        return torch.randperm(vocab, generator=generator)[:count].int()

    ints = tables.ints[row]
    ints[IntColumn.FLAGS] = int(Flag.PENALTIES | Flag.ALLOWED | Flag.BIAS | Flag.STOPS | Flag.BAD_WORDS)
    ints[IntColumn.NUM_PROMPT_TOKENS] = num_tokens - 5
    tables.floats[row, FloatColumn.PRESENCE] = 0.7
    tables.floats[row, FloatColumn.FREQUENCY] = 0.3
    tables.floats[row, FloatColumn.REPETITION] = 1.3
    tables.counts[row, some(vocab // 3).long()] = -0x8000
    tables.counts[row, some(vocab // 3).long()] += 3
    words = torch.randint(0, 2**32, (tables.allowed.shape[1],), generator=generator)
    tables.allowed[row] = (words - 2**31).int()
    biased = min(vocab // 2, sampling.MAX_BIAS)
    ints[IntColumn.NUM_BIAS] = biased
    tables.bias_ids[row, :biased] = some(biased)
    tables.bias_values[row, :biased] = randn(biased, seed=row) * 3
    ints[IntColumn.MIN_TOKENS], ints[IntColumn.NUM_STOPS] = 6 if row % 2 else 5, 9
    tables.stop_ids[row, :9] = some(9)
    # Bad words: one token; one whose head is what was drawn last; one whose head is not; one longer than the output.
    last = token_ids[row, num_tokens - 2 : num_tokens].int().tolist()
    bans = [[int(some(1))], [*last, int(some(1))], [last[0], last[0], int(some(1))], [*([1] * 6), int(some(1))]]
    ints[IntColumn.NUM_BAD_SEQUENCES] = len(bans)
    tables.bad_tokens[row, : sum(map(len, bans))] = torch.tensor([token for ban in bans for token in ban]).int()
    tables.bad_ends[row, : len(bans)] = torch.tensor(np.cumsum([len(ban) for ban in bans])).int()


@pytest.mark.parametrize("vocab", [31, 2048, 5003])
def test_draws_are_the_references(cpu_instructions: str, vocab: int) -> None:
    """Of rows that ask for all kinds of things, together, one by one, and with one thread."""
    size = 24
    bench = torch.Generator().manual_seed(vocab)
    logits = randn(size, vocab, seed=vocab) * 3
    token_ids = torch.randint(0, vocab, (size + 3, 40), generator=bench)
    rows = torch.randperm(size + 3, generator=bench)[:size]
    num_tokens = torch.randint(20, 39, (size,), generator=bench)
    masks = torch.randint(-(2**31), 2**31, (3, vocab // 32 + 2), generator=bench).int()
    mask_rows = torch.randint(-1, 3, (size,), generator=bench)
    tables = tables_of(size + 3, vocab)
    for i, (row, count) in enumerate(zip(rows.tolist(), num_tokens.tolist(), strict=True)):
        tables.floats[row, FloatColumn.TEMPERATURE] = (0.0, 0.3, 1.0, 2.5)[i % 4]
        tables.floats[row, FloatColumn.TOP_P] = (1.0, 0.9, 0.1)[i % 3]
        tables.floats[row, FloatColumn.MIN_P] = (0.0, 0.02)[i % 2]
        tables.ints[row, IntColumn.TOP_K] = (0, vocab // 3, 1, 20)[i // 3 % 4]
        tables.ints[row, IntColumn.NUM_PROMPT_TOKENS] = 7
        if i % 5 < 3:
            add_rare_wishes(tables, row, vocab, token_ids, count)
    kept = logits.clone()
    want_tables = clone(tables)
    want = sampling.draw(logits, rows, num_tokens, token_ids, want_tables, masks, mask_rows)

    def check(drawn: torch.Tensor, written: torch.Tensor, counted: SamplingTables) -> None:
        assert drawn.tolist() == want.tolist()
        assert written[rows, num_tokens].tolist() == want.tolist()
        written[rows, num_tokens] = token_ids[rows, num_tokens]
        assert torch.equal(written, token_ids)
        assert torch.equal(counted.counts, want_tables.counts)
        assert torch.equal(logits, kept)

    written, counted = token_ids.clone(), clone(tables)
    check(cpu_kernels.sample(logits, rows, num_tokens, written, counted, masks, mask_rows), written, counted)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        written, counted = token_ids.clone(), clone(tables)
        single = [
            cpu_kernels.sample(
                logits[i : i + 1],
                rows[i : i + 1],
                num_tokens[i : i + 1],
                written,
                counted,
                masks,
                mask_rows[i : i + 1],
            )
            for i in range(size)
        ]
        check(torch.cat(single), written, counted)


def seeds_with_high_numbers() -> list[int]:
    """Seeds whose first number leaves out less than a millionth: the draw is the last of the tokens that are kept."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        numbers = (mix(mix(np.arange(2_000_000, dtype=np.uint64) + step) + step) >> np.uint64(11)) * 2.0**-53
    return np.flatnonzero(numbers > 1 - 1e-6).tolist()


SCORES = {
    "normal": randn(9001) * 3,
    "close together": randn(9001) * 1e-4 + 20,
    "far apart": randn(9001) * 2000,
    "all equal": torch.full((9001,), 2.5),
    "three values": torch.tensor([1.0, 1.5, -2.0]).repeat(3001)[:9001],
    "one far above": torch.cat((torch.tensor([80.0]), randn(9000))),
    "neighbouring numbers": torch.from_numpy((0x3F800000 + np.arange(9001) // 3).astype(np.int32).view(np.float32)),
    "around zero": torch.cat((randn(4000) * 1e-38, randn(5001) * 1e-20)),
    "few allowed": torch.where(torch.arange(9001) % 1700 == 3, randn(9001), -INF),
    "banned": torch.where(torch.arange(9001) % 5 == 3, randn(9001), sampling.BANNED),
}


@pytest.mark.parametrize("name", SCORES)
def test_the_cut_is_exact(cpu_instructions: str, name: str) -> None:
    """The scores fall from token to token, so the last token that can be drawn tells where they are cut."""
    seed = seeds_with_high_numbers()[0]
    assert sampling.uniform(seed, 0) > 1 - 1e-6
    scores = SCORES[name].sort(descending=True).values.unsqueeze(0)
    cuts = [{"top_k": k} for k in (1, 2, 40, 4000, 9000)] + [{"top_p": p} for p in (1e-6, 0.3, 0.9, 0.999)]
    cuts += [{"min_p": p} for p in (1e-3, 0.5, 1.0)] + [{"top_k": 3000, "top_p": 0.7, "min_p": 0.01}]
    checked = 0
    for wishes in cuts:
        for temperature in (1.0, 0.7):
            tables = tables_of(1, 9001, temperature=temperature, **wishes)
            tables.ints[0, IntColumn.SEED] = seed
            arguments = [wishes.get(key, default) for key, default in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))]
            divided = scores[0] / tables.floats[0, FloatColumn.TEMPERATURE]
            cut = sampling.cut_of(divided, int(arguments[0]), *tables.floats[0, 1:3].tolist())
            weights = torch.where(divided >= cut, (divided - divided[0]).double().exp(), 0.0)
            if weights[weights > 0].min() < 3e-6 * weights.sum():
                continue  # The number is not high enough for it.
            last = int((weights > 0).nonzero()[-1])
            drawn = cpu_kernels.sample(
                scores, torch.zeros(1).long(), torch.zeros(1).long(), torch.zeros(1, 9, dtype=torch.int64), tables
            )
            assert (wishes, temperature, int(drawn)) == (wishes, temperature, last)
            checked += 1
    assert checked >= 10


DRAWS = 100_000
KINDS: dict[str, dict[str, float]] = {
    "temperature": {"temperature": 0.6},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 11},
    "min_p": {"min_p": 0.08},
    "all of them": {"temperature": 1.4, "top_k": 30, "top_p": 0.95, "min_p": 0.03},
    "penalties": {"presence": 0.5, "frequency": 0.4, "repetition": 1.5, "flags": Flag.PENALTIES},
    "bias": {"num_bias": 2, "flags": Flag.BIAS},
    "allowed": {"flags": Flag.ALLOWED},
    "stops": {"num_stops": 2, "min_tokens": 2 * DRAWS, "flags": Flag.STOPS},
    "bad words": {"num_bad_sequences": 1, "flags": Flag.BAD_WORDS},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_distribution(cpu_instructions: str, kind: str) -> None:
    """Pearson's chi-square over one draw for each number of output tokens."""
    vocab = 50
    logits = randn(vocab, seed=3) * 1.5
    tables = tables_of(1, vocab, **KINDS[kind])
    tables.counts[0, 4:9], tables.counts[0, 20:23] = 2, -0x8000 + 1
    tables.counts[0, 30:] = -0x8000
    tables.bias_ids[0, :2], tables.bias_values[0, :2] = torch.tensor([6, 40]).int(), torch.tensor([2.0, -3.0])
    tables.allowed[0] = torch.tensor([0x0F0F0F0F, 0x00033333]).int()
    tables.stop_ids[0, :2] = torch.tensor([int(logits.argmax()), 17]).int()
    tables.bad_tokens[0, 0], tables.bad_ends[0, 0] = int(logits.argmax()), 1
    token_ids = torch.zeros(1, DRAWS + 1, dtype=torch.int64)
    scores = sampling.adjusted(logits, 0, 0, token_ids, tables) / tables.floats[0, FloatColumn.TEMPERATURE]
    cut = sampling.cut_of(scores, int(tables.ints[0, IntColumn.TOP_K]), *tables.floats[0, 1:3].tolist())
    expected = torch.softmax(torch.where(scores >= cut, scores, -INF).double(), 0) * DRAWS
    rows = torch.zeros(DRAWS, dtype=torch.int64)
    drawn = cpu_kernels.sample(logits.repeat(DRAWS, 1), rows, torch.arange(DRAWS), token_ids, tables)
    observed = torch.bincount(drawn, minlength=vocab)
    assert observed[expected == 0].sum() == 0
    likely = expected > 5
    assert observed[likely].min() > 0
    statistic = float(((observed - expected)[likely] ** 2 / expected[likely]).sum())
    freedom = int(likely.sum()) - 1
    assert freedom > 3
    # 1 in 10,000 of so many degrees of freedom is higher (Wilson and Hilferty, 1931); the numbers are always the same.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_no_numbers_are_not_drawn(cpu_instructions: str, temperature: float) -> None:
    """Nor do they make another row's draw go astray; where nothing is left, it is the first token."""
    logits = randn(5, 3000)
    logits[0, 5:] = float("nan")
    logits[1] = float("nan")
    logits[2] = -INF
    logits[3, 77] = INF
    tables = tables_of(5, 3000, temperature=temperature, top_p=0.9)
    drawn = cpu_kernels.sample(
        logits, torch.arange(5), torch.zeros(5).long(), torch.zeros(5, 1, dtype=torch.int64), tables
    )
    assert drawn[0] < 5 and drawn[1:4].tolist() == [0, 0, 77]
    want = sampling.draw(logits[4:], torch.tensor([4]), torch.zeros(1).long(), torch.zeros(5, 1).long(), tables)
    assert drawn[4] == want


def test_equals_are_taken_from_the_first_on(cpu_instructions: str) -> None:
    logits = torch.zeros(3, 5000)
    logits[0, [4321, 17, 4000]] = 1.0
    logits[1, [2047, 2048]] = 3.0
    tables = tables_of(3, 5000, temperature=0.0)
    drawn = cpu_kernels.sample(
        logits, torch.arange(3), torch.zeros(3).long(), torch.zeros(3, 1, dtype=torch.int64), tables
    )
    assert drawn.tolist() == [17, 2047, 0]


@pytest.mark.parametrize(("vocab", "rows"), [(50, 1), (6007, 1), (6007, 5)])
@pytest.mark.parametrize("k", [0, 1, 20, 6007])
def test_logprobs(cpu_instructions: str, vocab: int, rows: int, k: int) -> None:
    k = min(k, vocab)
    logits = randn(rows, vocab, seed=k) * 4
    logits[:, 7] = logits[:, 3]  # Equals: the lower token first.
    logits[:, 1] = -INF
    tokens = torch.randint(2, vocab, (rows,), generator=torch.Generator().manual_seed(k))
    want = torch.log_softmax(logits.double(), dim=-1)
    values, ranks, top_values, top_tokens = cpu_kernels.logprobs(logits, tokens, k)
    torch.testing.assert_close(values.double(), want.gather(1, tokens[:, None])[:, 0], rtol=1e-6, atol=2e-6)
    assert ranks.tolist() == [1 + int((row > row[token]).sum()) for row, token in zip(logits, tokens, strict=True)]
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(top_tokens, order)
    torch.testing.assert_close(top_values.double(), want.gather(1, order), rtol=1e-6, atol=2e-6)


def test_logprobs_of_few_values(cpu_instructions: str) -> None:
    """Where the k highest end amid equals, and where fewer than k tokens are possible at all."""
    logits = torch.zeros(2, 4100)
    logits[0, ::2] = 1.0
    logits[1] = -INF
    logits[1, [9, 4000]] = 2.0
    values, ranks, top_values, top_tokens = cpu_kernels.logprobs(logits, torch.tensor([1, 4000]), 4)
    assert top_tokens.tolist() == [[0, 2, 4, 6], [9, 4000, 0, 1]]
    assert ranks.tolist() == [2051, 1]
    torch.testing.assert_close(top_values[1], torch.tensor([-0.6931472, -0.6931472, -INF, -INF]))
    torch.testing.assert_close(values[1], torch.tensor(-0.6931472))


def test_what_does_not_fit_is_refused(cpu_instructions: str) -> None:
    tables, index, token_ids = tables_of(2, 70), torch.arange(2), torch.zeros(2, 9, dtype=torch.int64)
    for logits in (torch.zeros(2, 70).double(), torch.zeros(2, 71), torch.zeros(70, 2).T):
        with pytest.raises(ValueError, match=r"logits must be float32 \[2, 70\] and contiguous"):
            cpu_sampling.sample(logits, index, index, token_ids, tables)
    with pytest.raises(ValueError, match="masks of 2 words do not cover 70 tokens"):
        masks = torch.zeros(1, 2, dtype=torch.int32)
        cpu_sampling.sample(torch.zeros(2, 70), index, index, token_ids, tables, masks, torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"k is 71; it is 0 … 70"):
        cpu_sampling.logprobs(torch.zeros(2, 70), index, 71)

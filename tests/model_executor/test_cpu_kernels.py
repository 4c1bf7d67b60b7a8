"""The compiled CPU kernels against torch in float64, with every set of instructions that this processor has."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig

from tests.model_executor.networks import make_decoder
from vllm.attention.backends.base import AttentionBackend
from vllm.attention.backends.cpu import CpuAttentionBackend
from vllm.attention.backends.torch import TorchAttentionBackend
from vllm.attention.layer import ForwardContext
from vllm.model_executor.models.decoder import Decoder
from vllm.ops.attention.metadata import AttentionMetadata, PrefixGroup
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.ops.cpu.kernels import TILES, WIDEN, PackedMatrix
from vllm.ops.sampling import Flag, IntColumn, SamplingTables

pytestmark = pytest.mark.parametrize("cpu_instructions", cpu_kernels.INSTRUCTIONS, indirect=True)
# Weights, and how bfloat16 multiplies; in tiles or dot products where there are instructions for them.
KINDS = {
    "float32": (torch.float32, False, WIDEN),
    "bfloat16-widened": (torch.bfloat16, False, WIDEN),
    "bfloat16-narrow": (torch.bfloat16, False, TILES),
    "int8-widened": (torch.float32, True, WIDEN),
    "int8-narrow": (torch.bfloat16, True, TILES),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Linear(NamedTuple):
    """A packed matrix, how it multiplies, and what it holds, in float64; `narrow`: x becomes bfloat16 first."""

    packed: PackedMatrix
    arithmetic: int
    weight: torch.Tensor
    bias: torch.Tensor
    narrow: bool

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        x = x.bfloat16() if self.narrow else x
        return x.double() @ self.weight.T + self.bias


def make(kind: str, n: int, k: int, instructions: str, bias: bool = True, interleave: bool = False) -> Linear:
    dtype, int8, arithmetic = KINDS[kind]
    weight = randn(n, k, seed=n + k).to(dtype)
    offset = randn(n, seed=1).to(dtype) if bias else None
    packed = PackedMatrix(weight, offset, interleave, int8)
    held = weight.double()
    if int8:
        factor = weight.float().abs().amax(dim=1, keepdim=True) / 127
        held = (weight.float() / factor).round().double() * factor.double()
    narrow = arithmetic == TILES and instructions in ("avx512_bf16", "amx")
    return Linear(packed, arithmetic, held, torch.zeros(n) if offset is None else offset.double(), narrow)


def assert_near(out: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Compares each element with the largest of its row, so that a wrong one shows."""
    assert out.shape == want.shape
    scale = want.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    assert float(((out.double() - want) / scale).abs().max()) <= tolerance


@every_kind
@pytest.mark.parametrize(("n", "k"), [(1, 16), (16, 48), (40, 16), (63, 576), (65, 32), (200, 1536), (257, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(cpu_instructions: str, kind: str, n: int, k: int, bias: bool) -> None:
    linear = make(kind, n, k, cpu_instructions, bias)
    for rows in (1, 2, 3, 5, 6, 7, 8, 9, 13, 16, 31, 40, 193):
        x = randn(rows, k, seed=rows)
        found = cpu_kernels.linear(x, linear.packed, linear.arithmetic)
        # Rounding is as large as the summands are, not the sum.
        summands = x.double().abs() @ linear.weight.abs().T + linear.bias.abs()
        assert float(((found - linear.reference(x)).abs() / summands).max()) <= 1e-6


@every_kind
@pytest.mark.parametrize(("n", "k"), [(32, 16), (96, 48), (224, 576), (3072, 64)])
def test_swiglu(cpu_instructions: str, kind: str, n: int, k: int) -> None:
    linear = make(kind, n, k, cpu_instructions, interleave=True)
    for rows in (1, 4, 6, 7, 8, 17, 40):
        x = randn(rows, k, seed=rows)
        gate, up = linear.reference(x).chunk(2, dim=1)
        found = cpu_kernels.swiglu(x, linear.packed, linear.arithmetic)
        assert_near(found, torch.nn.functional.silu(gate) * up, 6e-6)


def test_gates_of_any_size(cpu_instructions: str) -> None:
    # A weight of 1 for each: gate and up projection are x itself, silu(x) x.
    identity = PackedMatrix(torch.eye(16).repeat(2, 1), interleave=True)
    x = torch.tensor(
        [[-3e4, -200.0, -88.0, -87.0, -20.0, -1.0, -1e-6, -0.0, 0.0, 1e-6, 1.0, 20.0, 88.0, 1e3, 1e6, 1e18]]
    )
    want = torch.nn.functional.silu(x.double()) * x
    torch.testing.assert_close(cpu_kernels.swiglu(x, identity, WIDEN).double(), want, rtol=2e-5, atol=1e-25)


@every_kind
def test_rows_do_not_depend_on_the_batch(cpu_instructions: str, kind: str) -> None:
    # Rows are computed in blocks of a few, above them in others; a token must be the same in whatever company.
    linear, both = make(kind, 200, 576, cpu_instructions), make(kind, 192, 576, cpu_instructions, interleave=True)
    x = randn(40, 576)
    for function, weight in ((cpu_kernels.linear, linear.packed), (cpu_kernels.swiglu, both.packed)):
        together = function(x, weight, linear.arithmetic)
        for first, end in ((0, 1), (17, 18), (39, 40), (3, 8), (10, 17), (20, 33)):
            assert torch.equal(function(x[first:end], weight, linear.arithmetic), together[first:end])


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(cpu_instructions: str, kind: str, value: float) -> None:
    linear, both = make(kind, 70, 64, cpu_instructions), make(kind, 96, 64, cpu_instructions, interleave=True)
    x = randn(11, 64)
    for function, weight in ((cpu_kernels.linear, linear.packed), (cpu_kernels.swiglu, both.packed)):
        before = function(x, weight, linear.arithmetic)
        broken = x.clone()
        broken[4, 9] = value
        after = function(broken, weight, linear.arithmetic)
        others = torch.arange(11) != 4
        assert torch.equal(after[others], before[others])
        assert not bool(after[4].isfinite().any())


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 48), (40, 576), (7, 1536)])
def test_rms_norm(cpu_instructions: str, rows: int, size: int) -> None:
    x, weight = randn(rows, size) * 3, randn(size, seed=1)
    want = x.double() * (x.double().square().mean(dim=1, keepdim=True) + 1e-5).rsqrt() * weight
    assert_near(cpu_kernels.rms_norm(x, weight, 1e-5), want, 1e-6)
    zero = cpu_kernels.rms_norm(torch.zeros(2, size), weight, 1e-5)
    assert torch.equal(zero, torch.zeros(2, size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copy_blocks_reads_all_before_it_writes(cpu_instructions: str, dtype: torch.dtype) -> None:
    cache = randn(6 * 16, 3, 5).to(dtype)
    pairs = [(0, 1), (1, 0), (3, 5), (2, 2), (5, 4)]
    want = cache.clone().view(6, -1)
    want[[to for _, to in pairs]] = cache.view(6, -1)[[source for source, _ in pairs]]
    cpu_kernels.copy_blocks(cache, torch.tensor(pairs), 16)
    assert torch.equal(cache.view(6, -1), want)


def test_matrices_that_cannot_be_packed(cpu_instructions: str) -> None:
    with pytest.raises(ValueError, match="cannot pack a matrix of 32 x 24: K must be a multiple of 16"):
        PackedMatrix(torch.zeros(32, 24))
    with pytest.raises(ValueError, match=r"cannot pack a matrix of 48 x 16: .* N of 32"):
        PackedMatrix(torch.zeros(48, 16), interleave=True)
    with pytest.raises(ValueError, match=r"take float32 and bfloat16, not torch\.float16"):
        PackedMatrix(torch.zeros(16, 16, dtype=torch.float16))


# A network: prompts, one of them behind an extent, then two steps of decode.
EXTENT = 20
PROMPTS = (5, 33)


def make_model(config: LlamaConfig, dtype: torch.dtype, packed: bool = False) -> Decoder:
    """Random weights, always the same, rounded to bfloat16."""
    model = make_decoder(config, dtype, packed=packed)
    for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
        centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
        values = centre + randn(*parameter.shape, seed=i) * (
            0.3 if parameter.dim() == 1 else 1.5 / parameter.shape[1] ** 0.5
        )
        parameter.data = values.bfloat16().to(dtype)
    model.finish()
    assert (model.program is not None) == packed
    return model


@torch.inference_mode()
def logits_of_steps(model: Decoder, config: LlamaConfig, backend: AttentionBackend, dtype: torch.dtype) -> torch.Tensor:
    """The logits of every token of: the extent, both prompts at once, two decode steps."""
    shape = (160, config.num_key_value_heads, config.head_dim)
    k_caches, v_caches = ([torch.zeros(shape, dtype=dtype) for _ in model.layers] for _ in range(2))
    blocks = [[8, 9], [3, 0, 7], [5, 1, 2]]
    outs = []

    def step(members: list[tuple[int, int, int]]) -> None:
        """Members: row of `blocks`, tokens before, tokens to compute; row 1 continues the extent."""
        slots, positions, groups = [], [], []
        for row, done, count in members:
            if row == 1:
                groups.append(PrefixGroup(len(slots), count, 8 * 16, EXTENT))
            own = range(done, done + count)
            slots += [blocks[row][p // 16] * 16 + p % 16 for p in own]
            positions += [p + (EXTENT if row == 1 else 0) for p in own]
        metadata = AttentionMetadata(
            torch.tensor(slots),
            torch.tensor([(blocks[row] + [0])[:3] for row, *_ in members]),
            [count for *_, count in members],
            [done + count for _, done, count in members],
            groups,
            16,
        )
        where = torch.tensor(positions)
        context = ForwardContext(
            backend, backend.prepare(metadata, model.attention_specs), where, metadata.slot_mapping, k_caches, v_caches
        )
        tokens = torch.tensor(
            [(7 * p + 3 * slot) % config.vocab_size for p, slot in zip(positions, slots, strict=True)]
        )
        outs.append(model.logits(model(tokens, context)).float())

    step([(0, 0, EXTENT)])
    first, second = PROMPTS
    step([(1, 0, first), (2, 0, second)])
    for i in range(2):
        step([(1, first + i, 1), (2, second + i, 1)])
    return torch.cat(outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 16), (9, 3, 64), (8, 1, 80), (6, 2, 96), (8, 8, 128), (3, 1, 256)]
)
def test_stack_of_layers(
    cpu_instructions: str, dtype: torch.dtype, bias: bool, heads: int, kv_heads: int, head_dim: int
) -> None:
    config = LlamaConfig(
        vocab_size=107,
        # Tile registers take depths that are multiples of 32.
        hidden_size=288 if bias else 144,
        intermediate_size=96 if bias else 112,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=64,
        tie_word_embeddings=bias,
        attention_bias=bias,
        mlp_bias=bias,
        architectures=["LlamaForCausalLM"],
    )
    want = logits_of_steps(make_model(config, torch.float32), config, TorchAttentionBackend(), torch.float32)
    torch_logits = logits_of_steps(make_model(config, dtype), config, TorchAttentionBackend(), dtype)
    logits = logits_of_steps(make_model(config, dtype, packed=True), config, CpuAttentionBackend(16), dtype)
    error = float((logits - want).norm() / want.norm())
    if dtype == torch.float32:
        assert error < 4e-6
    else:
        assert error <= float((torch_logits - want).norm() / want.norm())


class Steps:
    """A small network and four rows of it: row 1 continues an extent in blocks 8 and 9, which are row 3's own."""

    VOCAB = 107

    def __init__(self) -> None:
        self.config = LlamaConfig(
            vocab_size=self.VOCAB,
            hidden_size=96,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=64,
            architectures=["LlamaForCausalLM"],
        )
        self.model = make_model(self.config, torch.bfloat16, packed=True)
        self.token_ids = torch.randint(0, self.VOCAB, (4, 64), generator=torch.Generator().manual_seed(0))
        self.tables = torch.tensor([[5, 1, 2, 0], [3, 0, 7, 0], [4, 6, 0, 0], [8, 9, 0, 0]])
        self.prefix_lens = torch.tensor([0, EXTENT, 0, 0])
        self.rows = cpu_kernels.SequenceRows(self.token_ids, self.tables, self.prefix_lens, 16)
        self.greedy = SamplingTables.make(4, self.VOCAB, torch.device("cpu"))

    def caches(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        shape = (160, self.config.num_key_value_heads, self.config.head_dim)
        return tuple([randn(*shape, seed=i).bfloat16() for i in (j, j + 9)] for j in range(2))  # type: ignore[return-value]

    def groups_of(self, step: list[tuple[int, int, int, bool]]) -> list[PrefixGroup]:
        firsts = [sum(count for _, _, count, _ in step[:i]) for i in range(len(step))]
        return [PrefixGroup(f, s[2], 8 * 16, EXTENT) for f, s in zip(firsts, step, strict=True) if s[0] == 1]

    def by_network(
        self, step: list[tuple[int, int, int, bool]], k: list[torch.Tensor], v: list[torch.Tensor]
    ) -> torch.Tensor:
        backend = CpuAttentionBackend(16)
        rows = torch.tensor([row for row, _, count, _ in step for _ in range(count)])
        positions = torch.tensor([p for _, start, count, _ in step for p in range(start, start + count)])
        own = positions - self.prefix_lens[rows]
        members = [row for row, *_ in step]
        metadata = AttentionMetadata(
            self.tables[rows, own // 16] * 16 + own % 16,
            self.tables[members],
            [count for _, _, count, _ in step],
            [start + count - int(self.prefix_lens[row]) for row, start, count, _ in step],
            self.groups_of(step),
            16,
        )
        context = ForwardContext(
            backend, backend.prepare(metadata, self.model.attention_specs), positions, metadata.slot_mapping, k, v
        )
        return self.model(self.token_ids[rows, positions], context)


# Row, first position, tokens, whether a token is drawn.
PROMPT_STEP = [(1, EXTENT, 19, True), (2, 0, 17, False), (0, 0, 9, True)]
LAST_STEP = [(2, 17, 3, True), (0, 9, 1, True), (1, EXTENT + 19, 1, True)]


@torch.inference_mode()
def test_a_step_in_one_call(cpu_instructions: str) -> None:
    """Of the same rows, whatever is asked of a step: what the network itself makes of the same tokens."""
    bench = Steps()
    for every_state in (False, True):
        steps_caches, network_caches = bench.caches(), bench.caches()
        for step in (PROMPT_STEP, LAST_STEP):
            want = bench.by_network(step, *network_caches)
            steps = bench.model.compiled_steps(bench.rows, *steps_caches)
            row, starts, counts, samples = (list(column) for column in zip(*step, strict=True))
            ends = torch.tensor(counts).cumsum(0) - 1
            picked = torch.tensor(samples)
            groups = bench.groups_of(step)
            drawn = steps.draw(row, starts, counts, samples, groups, bench.greedy)
            assert drawn == bench.model.most_likely(want[ends[picked]]).tolist()
            after = torch.tensor(starts) + torch.tensor(counts)
            assert bench.token_ids[torch.tensor(row)[picked], after[picked]].tolist() == drawn
            got = steps.hidden(row, starts, counts, None if every_state else samples, groups)
            torch.testing.assert_close(got, want if every_state else want[ends[picked]], rtol=0, atol=1e-6)


@torch.inference_mode()
def test_a_step_draws_as_each_row_asks(cpu_instructions: str) -> None:
    """One is greedy, one at random, one has penalties and obeys a mask: as drawn from the logits by themselves."""
    bench = Steps()
    network_caches = bench.caches()
    bench.by_network(PROMPT_STEP, *network_caches)
    logits = bench.model.logits(bench.by_network(LAST_STEP, *network_caches))[torch.tensor([2, 3, 4])]
    row, starts, counts, samples = (list(column) for column in zip(*LAST_STEP, strict=True))
    rows, num_tokens = torch.tensor(row), torch.tensor(starts) + torch.tensor(counts)
    tables = SamplingTables.make(4, bench.VOCAB, torch.device("cpu"))
    tables.floats[:] = torch.tensor([1.5, 0.95, 0.0, 0.4, 0.1, 1.2])
    tables.floats[0, 0] = 0.0
    tables.ints[1, IntColumn.FLAGS] = Flag.PENALTIES
    masks, mask_rows = torch.full((2, 4), 0x5A5A, dtype=torch.int32), torch.tensor([-1, -1, 1])
    for seed in range(8):
        tables.ints[:, IntColumn.SEED] = seed
        for masked in (False, True):
            mask = (masks, mask_rows) if masked else (None, None)
            own = tables._replace(counts=tables.counts.clone())
            want = cpu_kernels.sample(logits, rows, num_tokens, bench.token_ids.clone(), own, *mask).tolist()
            for wants_logits in (False, True):
                out = torch.empty(3, bench.VOCAB) if wants_logits else None
                caches = bench.caches()
                steps = bench.model.compiled_steps(bench.rows, *caches)
                prompts = [list(column) for column in zip(*PROMPT_STEP, strict=True)]
                before, counted = bench.token_ids.clone(), tables.counts[1].sum()
                steps.draw(*prompts, bench.groups_of(PROMPT_STEP), bench.greedy)  # type: ignore[arg-type]
                bench.token_ids[:] = before
                drawn = steps.draw(row, starts, counts, samples, bench.groups_of(LAST_STEP), tables, *mask, out)
                assert drawn == want
                assert bench.token_ids[rows, num_tokens].tolist() == drawn
                assert tables.counts[1].sum() == counted + 1
                tables.counts[1] = 0
                bench.token_ids[:] = before
                if out is not None:
                    torch.testing.assert_close(out, logits, rtol=0, atol=1e-5)
                states = steps.hidden(row, starts, counts, samples, bench.groups_of(LAST_STEP))
                assert steps.draw_after(states, rows, num_tokens, tables, *mask, out) == want
                assert bench.token_ids[rows, num_tokens].tolist() == want
                tables.counts[1] = 0
                bench.token_ids[:] = before
    with pytest.raises(ValueError, match=r"logits must be float32 \[3, 107\]"):
        steps.draw(row, starts, counts, samples, [], tables, logits_out=torch.empty(2, bench.VOCAB))


@torch.inference_mode()
def test_more_rows_draw_than_have_their_logits_in_memory(cpu_instructions: str) -> None:
    """Rows of one token each; some of them greedy."""
    bench, count = Steps(), 150
    token_ids = torch.randint(0, bench.VOCAB, (count, 3), generator=torch.Generator().manual_seed(1))
    rows = cpu_kernels.SequenceRows(
        token_ids, torch.arange(count).unsqueeze(1), torch.zeros(count, dtype=torch.int64), 16
    )
    k, v = ([torch.zeros(count * 16, 1, 32, dtype=torch.bfloat16) for _ in range(2)] for _ in range(2))
    steps = bench.model.compiled_steps(rows, k, v)
    tables = SamplingTables.make(count, bench.VOCAB, torch.device("cpu"))
    tables.floats[:] = torch.tensor([1.0, 0.9, 0.0, 0.0, 0.0, 1.0])
    tables.floats[::3, 0] = 0.0
    tables.ints[:, IntColumn.SEED] = torch.arange(count)
    step = list(range(count)), [0] * count, [1] * count, [True] * count
    logits = bench.model.logits(steps.hidden(*step, []))
    want = cpu_kernels.sample(logits, torch.arange(count), torch.ones(count).long(), token_ids.clone(), tables)
    assert steps.draw(*step, [], tables) == want.tolist()
    assert token_ids[:, 1].tolist() == want.tolist()


@torch.inference_mode()
def test_an_extent_is_read_in_the_step_that_writes_it(cpu_instructions: str) -> None:
    """Row 3 computes what row 1 continues, in one step or in two; garbage was in its blocks."""
    states, extents = [], []
    for together in (False, True):
        bench = Steps()
        k, v = bench.caches()
        for cache in (*k, *v):
            cache[8 * 16 : 10 * 16] = float("nan")
        steps = bench.model.compiled_steps(bench.rows, k, v)
        entries = [(1, EXTENT, 19, True), (3, 0, EXTENT, False), (0, 0, 9, True)]
        members = [entries] if together else [[entries[1]], [entries[0], entries[2]]]
        for step in members:
            row, starts, counts, samples = (list(column) for column in zip(*step, strict=True))
            out = steps.hidden(row, starts, counts, samples, bench.groups_of(step))
        states.append(out)
        # Values after the last token are cleared; keys after it are what they were.
        extents.append([cache.float().nan_to_num(7.0) for cache in (*k, *v)])
    assert states[0].isfinite().all()
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-6)
    for one, two in zip(*extents, strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=0.02)

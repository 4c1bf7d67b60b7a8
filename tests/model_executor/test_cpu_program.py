"""Decoder networks of many shapes in the compiled CPU kernels, against torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.attention.random_batch import Batch, Member
from tests.attention.test_cpu_backend import written
from tests.model_executor.cpu_networks import (
    ACTIVATE,
    LayerOptions,
    Network,
    NetworkOptions,
    capped,
    normed,
    randn,
    softmax_of,
)
from vllm.ops.attention.metadata import PrefixGroup
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.ops.cpu.kernels import (
    WIDEN,
    AttentionOptions,
    CompiledSteps,
    DecoderLayer,
    DecoderProgram,
    Norm,
    PackedHead,
    PackedMatrix,
    Rope,
    SequenceRows,
)
from vllm.ops.sampling import SamplingTables

every_instructions = pytest.mark.parametrize("cpu_instructions", cpu_kernels.INSTRUCTIONS, indirect=True)
# Weights, whether they are quantised, and the largest error of a state in parts of the largest of its token; bfloat16 K
# and V, and left operands where there are instructions for them, are rounded.
KINDS = {
    "float32": (torch.float32, False, 1e-5),
    "bfloat16": (torch.bfloat16, False, 4e-2),
    "int8": (torch.float32, True, 1e-5),
}
EVERY_NORM = ("before_attention", "after_attention", "before_mlp", "after_mlp")
AFTER = ("after_attention", "after_mlp")


def alike(**options: Any) -> NetworkOptions:
    return NetworkOptions([LayerOptions(**options)] * 2)


NETWORKS = {
    "plain": alike(),
    "biases of q and v, gate and o": alike(biases=("q", "v", "gate", "o")),
    "biases of k, up and down": alike(biases=("k", "up", "down")),
    "layer norm": alike(norm_kind="layer"),
    "layer norm with bias, MLP without a gate": alike(
        norm_kind="layer", norm_bias=True, gated=False, activation="gelu_tanh", biases=("up", "down")
    ),
    "norms after alone, of all heads too": alike(norms=AFTER, qk_norm="all"),
    "norms before and after, capped scores": alike(
        norms=EVERY_NORM, activation="gelu_tanh", softcap=5.0, scale=0.3, head_dim=48
    ),
    "no norms": alike(norms=(), residual_factor=0.3, scale=0.02),
    "parallel": alike(parallel=True, norms=("before_attention",), norm_kind="layer", interleaved=True),
    "parallel, norms after": alike(parallel=True, norms=("before_attention", *AFTER)),
    "norm of each head": alike(qk_norm="head"),
    "norm of each head by its own weights": alike(qk_norm="each"),
    "layer norm of each head by its own weights": alike(qk_norm="each", norm_kind="layer", norm_bias=True, v_norm=True),
    "norm of values": alike(qk_norm="head", v_norm=True, scale=1.0, heads=2, kv_heads=2),
    "layer norm of all heads": alike(qk_norm="all", norm_kind="layer", norm_bias=True),
    "not turned": alike(rotary_dim=0),
    "turned in part": alike(rotary_dim=24),
    "neighbours turned in part": alike(rotary_dim=16, interleaved=True),
    "queries by position": alike(query_factors=True),
    "sinks": alike(sinks=True),
    "exact GELU": alike(activation="gelu"),
    "squared ReLU without a gate": alike(activation="relu2", gated=False),
    "squared ReLU": alike(activation="relu2"),
    "multipliers": NetworkOptions(
        [
            LayerOptions(residual_factor=0.22, scale=0.05, layer_factor=1.7, norms=norms)
            for norms in (EVERY_NORM, ("before_mlp",))
        ],
        embedding_factor=2.5,
        logits_factor=0.25,
        logits_softcap=1.5,
    ),
    "windows": alike(window=16),
    "windows with all that scores may have": alike(window=17, softcap=4.0, sinks=True, query_factors=True),
    "layers that differ": NetworkOptions(
        [
            LayerOptions(heads=6, kv_heads=2, head_dim=32, window=20, rope_base=1e2),
            LayerOptions(heads=2, kv_heads=1, head_dim=64, inner=64, rotary_dim=16, v_norm=True),
            LayerOptions(heads=6, kv_heads=3, head_dim=16, window=20, gated=False, activation="gelu"),
            LayerOptions(heads=6, kv_heads=2, head_dim=32, window=33, rotary_dim=0),
        ],
    ),
}
# Row 1 continues an extent of so many tokens, which are row 3's own, in blocks 8 to 10.
EXTENT = 37
# Row, first position, tokens: chunks of prompts beside decodes, across the edges of windows.
STEPS = [
    [(3, 0, EXTENT)],
    [(1, EXTENT, 11), (2, 0, 35)],
    [(2, 35, 1), (1, EXTENT + 11, 9), (0, 0, 1)],
    [(1, EXTENT + 20, 1), (2, 36, 1), (0, 1, 14)],
    [(0, 15, 1), (1, EXTENT + 21, 1), (2, 37, 7)],
]


class Bench:
    """A network and the rows of a model runner."""

    def __init__(self, options: NetworkOptions, dtype: torch.dtype, int8: bool) -> None:
        self.network = Network(options, dtype, int8)
        generator = torch.Generator().manual_seed(0)
        self.token_ids = torch.randint(0, options.vocab, (4, 96), generator=generator)
        self.token_ids[1, :EXTENT] = self.token_ids[3, :EXTENT]
        tables = torch.tensor([[11, 0, 0], [3, 0, 7], [5, 1, 2], [8, 9, 10]])
        self.rows = SequenceRows(self.token_ids, tables, torch.tensor([0, EXTENT, 0, 0]), 16)
        self.program, self.head = self.network.program(), self.network.head()
        # What former owners left in the blocks.
        self.caches = [
            [randn(12 * 16, o.kv_heads, o.head_dim, seed=7).to(dtype) for o in options.layers] for _ in range(2)
        ]
        self.program.use_caches(*self.caches)
        self.steps = CompiledSteps(self.program, self.head, self.network.embeddings, self.rows)

    def run(self, step: list[tuple[int, int, int]]) -> torch.Tensor:
        return self.steps.hidden(*(list(column) for column in zip(*step, strict=True)), None, groups_of(step))  # type: ignore[arg-type]


def groups_of(step: list[tuple[int, int, int]]) -> list[PrefixGroup]:
    firsts = [sum(count for *_, count in step[:i]) for i in range(len(step))]
    return [PrefixGroup(f, count, 8 * 16, EXTENT) for f, (row, _, count) in zip(firsts, step, strict=True) if row == 1]


def error_of(out: torch.Tensor, want: torch.Tensor) -> float:
    """The largest, in parts of the largest element of its row."""
    return float(((out.double() - want).abs() / want.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)).max())


@every_instructions
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_networks(cpu_instructions: str, name: str, kind: str) -> None:
    dtype, int8, tolerance = KINDS[kind]
    bench = Bench(NETWORKS[name], dtype, int8)
    want = [bench.network.states(ids[:88]) for ids in bench.token_ids]
    for step in STEPS:
        expected = torch.cat([want[row][start : start + count] for row, start, count in step])
        states = bench.run(step)
        assert error_of(states, expected) < tolerance
        logits = cpu_kernels.linear(states, bench.head, cpu_kernels.arithmetic())
        assert error_of(logits, bench.network.logits(expected)) < tolerance


@every_instructions
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@torch.inference_mode()
def test_layers_with_a_window_have_blocks_of_their_own(cpu_instructions: str, kind: str) -> None:
    """Other block numbers, extents of which the window is kept, and tables of which the head has been given back."""
    (dtype, int8, tolerance), window, hole = KINDS[kind], 16, 6
    options = NetworkOptions([LayerOptions(window=window), LayerOptions(), LayerOptions(window=window)])
    bench = Bench(options, dtype, int8)
    for caches in bench.caches:
        for layer in (0, 2):
            caches[layer] = randn(14 * 16, *caches[layer].shape[1:], seed=8).to(dtype)
            caches[layer][hole * 16 : hole * 16 + 16] = float("nan")
    program = bench.network.program()
    program.use_caches(*bench.caches)
    full = torch.tensor([[11, 0, 0], [3, 0, 7], [5, 1, 2], [8, 9, 10]])
    prefix_lens, tables = torch.tensor([0, EXTENT, 0, 0]), torch.tensor([[2, 0, 0], [13, 1, 4], [0, 3, 5], [7, 9, 10]])
    rows = SequenceRows(bench.token_ids, full, prefix_lens, 16, tables)
    steps = CompiledSteps(program, bench.head, bench.network.embeddings, rows)
    want = [bench.network.states(ids[:88]) for ids in bench.token_ids]
    for step in STEPS:
        expected = torch.cat([want[row][start : start + count] for row, start, count in step])
        groups = groups_of(step)
        # Of the prompt the window and the rest of its block are kept.
        within = [PrefixGroup(g.first_token, g.num_tokens, 9 * 16, EXTENT - 16, 16) for g in groups]
        row, starts, counts = (list(column) for column in zip(*step, strict=True))
        states = steps.hidden(row, starts, counts, None, groups, within)
        assert error_of(states, expected) < tolerance
        for one, start, count in step:
            own = start + count - int(prefix_lens[one])
            tables[one, : max(0, own - window + 1) // 16] = hole


@every_instructions
@pytest.mark.parametrize("name", ["parallel", "multipliers", "layers that differ"])
@torch.inference_mode()
def test_the_last_layer_goes_on_with_what_is_wanted(cpu_instructions: str, name: str) -> None:
    bench = Bench(NETWORKS[name], torch.float32, False)
    tables = SamplingTables.make(4, bench.network.options.vocab, torch.device("cpu"))
    for step in STEPS:
        ends = torch.tensor([count for *_, count in step]).cumsum(0) - 1
        samples = [i != 1 for i in range(len(step))]
        want = bench.run(step)[ends[torch.tensor(samples)]]
        row, starts, counts = (list(column) for column in zip(*step, strict=True))
        got = bench.steps.hidden(row, starts, counts, samples, groups_of(step))
        assert torch.equal(got, want)
        before = bench.token_ids.clone()
        drawn = bench.steps.draw(row, starts, counts, samples, groups_of(step), tables)
        bench.token_ids[:] = before
        assert drawn == cpu_kernels.most_likely(want, bench.head, cpu_kernels.arithmetic()).tolist()


@every_instructions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 47, 64, pytest.param(600, marks=pytest.mark.nightly), 5000])
def test_edges_of_windows(cpu_instructions: str, dtype: torch.dtype, window: int) -> None:
    """Extents shorter and longer than the window, own tokens on either side of it, one token at a time and in chunks;
    what no query sees is not read."""
    sizes = sorted({1, 3, *(max(1, window + i) for i in (-1, 0, 1)), 2 * window + 5} - {10005})
    if window == 5000:
        sizes = [1, 700]
    members = [Member((), n, min(n, q)) for n in sizes for q in (1, 7, window + 3)]
    chains = [(s,) for s in sizes] + [tuple(sizes[:3])]
    members += [Member(chain, n, min(n, q)) for chain in chains for n in sizes for q in (1, n)][:60]
    members.sort(key=lambda m: m.chain)
    for softcap, sinks in ((None, None), (3.0, randn(4, seed=3))):
        batch = Batch(members, 16, 4, 2, 32, dtype, seed=window)
        scale, options = 0.3, (window, softcap, sinks)
        want = reference(batch, scale, *options)
        k_cache, v_cache = written(batch)
        unseen = torch.ones(len(batch.k) // 16, dtype=torch.bool)
        for i, member in enumerate(members):
            slots = torch.tensor(batch.slots(i))
            unseen[slots[max(0, len(slots) - member.queries - window + 1) :] // 16] = False
        for cache in (k_cache, v_cache):
            cache.view(len(unseen), -1)[unseen] = float("nan")
        prepared = cpu_kernels.prepare(batch.metadata(merged_groups=True))
        out = cpu_kernels.attention(batch.q.float(), k_cache, v_cache, scale, prepared, WIDEN, *options)
        torch.testing.assert_close(out.double(), want, atol=6e-6, rtol=0)


def reference(
    batch: Batch, scale: float, window: int | None, softcap: float | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    share, out = batch.q.shape[1] // batch.k.shape[1], []
    for i, q in enumerate(batch.q.split([m.queries for m in batch.members])):
        slots = batch.slots(i)
        k, v = (x[slots].double().repeat_interleave(share, dim=1) for x in (batch.k, batch.v))
        scores = capped(torch.einsum("mhd,nhd->hmn", q.double(), k) * scale, softcap)
        keys = torch.arange(len(slots))
        out.append(softmax_of(scores, keys[len(keys) - len(q) :], keys, window, sinks, v))
    return torch.cat(out)


@every_instructions
@pytest.mark.parametrize("softcap", [0.05, 1.0, 30.0])
def test_caps_of_any_score(cpu_instructions: str, softcap: float) -> None:
    """From scores that a cap leaves nearly alone to those that it flattens."""
    for factor in (1e-3, 1.0, 1e4):
        x = torch.cat((randn(3, 32) * factor, torch.zeros(1, 32)))
        head = PackedHead(PackedMatrix(torch.eye(32)), 0.5, softcap)
        logits = cpu_kernels.linear(x, head, WIDEN)
        torch.testing.assert_close(logits.double(), capped(x.double() * 0.5, softcap), rtol=1e-6, atol=1e-30)
        # Flat ones are equal, and the first of these is taken.
        assert torch.equal(cpu_kernels.most_likely(x, head, WIDEN), logits.argmax(dim=1))


@every_instructions
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", cpu_kernels.ACTIVATIONS)
def test_activations(cpu_instructions: str, activation: str, gated: bool) -> None:
    x = torch.cat((torch.linspace(-12, 12, 512), torch.tensor([0.0, -0.0, 1e-6, -1e-6, 88.0, -88.0, 1e4, -1e4] * 2)))
    x = x.view(-1, 16)
    eye = torch.eye(16)
    weight = PackedMatrix(eye.repeat(2, 1), interleave=True) if gated else PackedMatrix(eye)
    out = cpu_kernels.activated(x, weight, activation, WIDEN, gated)
    want = ACTIVATE[activation](x.double()) * (x.double() if gated else 1)
    torch.testing.assert_close(out.double(), want, rtol=3e-6, atol=3e-6)
    broken = x.clone()
    broken[1, 3] = float("nan")
    after = cpu_kernels.activated(broken, weight, activation, WIDEN, gated)
    assert after[1].isnan().all()
    others = torch.arange(len(x)) != 1
    assert torch.equal(after[others], out[others])


@every_instructions
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("weighs", "biased"), [(False, False), (True, False), (True, True)])
def test_norms(cpu_instructions: str, kind: Any, weighs: bool, biased: bool) -> None:
    x = randn(9, 80) * 3 + 40
    norm = Norm(80, 1e-5, randn(80, seed=1) if weighs else None, randn(80, seed=2) if biased else None, kind)
    assert error_of(cpu_kernels.norm(x, norm), normed(norm, x)) < 3e-6


def test_what_does_not_fit_together_is_refused() -> None:
    attention = AttentionOptions(2, 1, 32, 1.0)
    if cpu_kernels.library() is None:
        pytest.skip("the compiled CPU kernels are not built")
    qkv, o = PackedMatrix(torch.zeros(128, 48)), PackedMatrix(torch.zeros(48, 64))
    up, down = PackedMatrix(torch.zeros(64, 48), interleave=True), PackedMatrix(torch.zeros(48, 32))
    DecoderLayer(attention, qkv, o, up, down)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"up": PackedMatrix(torch.zeros(64, 48))}, "up must be packed with interleave"),
        ({"gated": False, "down": PackedMatrix(torch.zeros(48, 64))}, "up must not be packed with interleave"),
        ({"activation": "tanh"}, "activation 'tanh': the CPU kernels have silu, gelu_tanh, gelu, relu2"),
        ({"gated": False, "up": PackedMatrix(torch.zeros(64, 48))}, "down is 48 x 32 where 48 x 64 fits"),
        ({"qkv": o}, "qkv is 48 x 64 where 128 x 64 fits"),
        ({"after_mlp": Norm(64, 1e-5)}, "after_mlp has 64 elements, hidden_size is 48"),
        ({"parallel": True, "before_mlp": Norm(48, 1e-5)}, "before_mlp must be None"),
    ]
    for changes, why in refused:
        with pytest.raises(ValueError, match=why):
            DecoderLayer(**{"attention": attention, "qkv": qkv, "o": o, "up": up, "down": down} | changes)
    layer = DecoderLayer(attention, qkv, o, up, down)
    with pytest.raises(ValueError, match="layers and final norm differ in hidden_size: 48, 64"):
        DecoderProgram([layer], Norm(64, 1e-5))
    caches = [torch.zeros(16, 1, 32).bfloat16()]
    with pytest.raises(ValueError, match=r"K and V of torch\.bfloat16 do not go with matrices of another dtype"):
        DecoderProgram([layer], None).use_caches(caches, caches)
    caches = [torch.zeros(16, 2, 32)]
    with pytest.raises(ValueError, match=r"a K/V tensor \[16, 2, 32\] .* for KV heads x head_dim of \(1, 32\)"):
        DecoderProgram([layer], None).use_caches(caches, caches)
    with pytest.raises(ValueError, match="64 rows, interleaved: True, are no MLP with gated=False"):
        cpu_kernels.activated(torch.zeros(1, 48), up, "silu", WIDEN, gated=False)
    options: list[tuple[dict[str, Any], str]] = [
        ({"num_heads": 3, "num_kv_heads": 2}, "3 heads cannot share 2 KV heads"),
        ({"head_dim": 40}, "head_dim 40 is no multiple of 16"),
        ({"window": 0}, "window 0 must be above 0"),
        ({"softcap": -1.0}, "softcap -1.0 must be above 0"),
        ({"sinks": torch.zeros(3)}, r"sinks must be \[2\], not \[3\]"),
        ({"q_norm": Norm(96, 1e-5)}, "q_norm of 96 elements: one head has 32, all have 64"),
        ({"k_norm": Norm(32, 1e-5, heads=2)}, "k_norm has weights for 2 heads of 32, there are 1"),
        ({"rope": Rope(torch.zeros(4, 64))}, "rotary_dim 64 must be even and at most head_dim 32"),
        ({"rope": Rope(torch.zeros(4, 32).bfloat16())}, r"must be contiguous float32, not torch\.bfloat16"),
    ]
    for changes, why in options:
        with pytest.raises(ValueError, match=why):
            AttentionOptions(**{"num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "scale": 1.0} | changes)
    with pytest.raises(ValueError, match=r"factor 0\.0 and soft cap None of logits must be above 0"):
        PackedHead(o, 0.0)
    with pytest.raises(ValueError, match="a norm of 40 elements"):
        Norm(40, 1e-5)

"""Windows, capped scores and sinks of the Triton backend, against dense attention in float64."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.attention.random_batch import AROUND, MIXED, Batch, Member, WindowPart
from tests.kernels.kernel_inputs import DEVICE, TOLERANCE, assert_near
from tests.kernels.test_triton_backend import inputs, metadata, place, sequences_of
from vllm.attention.backends.triton import TritonAttention, TritonAttentionBackend
from vllm.attention.replay import ReplayPlans
from vllm.attention.spec import AttentionSpec
from vllm.ops.attention.metadata import AttentionMetadata
from vllm.ops.attention.prefix import group_array, plan_prefix
from vllm.ops.attention.suffix import plan_suffix
from vllm.ops.attention.tiles import TileConfig
from vllm.ops.attention.window import cut_where_parts_change, first_positions, within_window

ON_GPU = DEVICE.type == "cuda"
# What takes the interpreter long is the nightly run's, and a GPU's.
heavy = () if ON_GPU else pytest.mark.nightly
WINDOW = 40


def around(window: int) -> list[Member]:
    """Sequences whose contexts, extents and chunks end at, before and behind the edge of a window."""
    extent = window + 13
    return [
        Member((), window - 1, 1),
        Member((), window, 1),
        Member((), window + 1, 1),
        Member((), 3 * window, 1),
        Member((), 2 * window + 5, window + 9),
        Member((), window, window),
        Member((window - 1,), 1, 1),
        Member((window - 1,), 2, 2),
        Member((window,), 1, 1),
        Member((window + 1,), 1, 1),
        Member((7,), window - 7, 3),
        Member((7,), window - 6, 1),
        Member((extent,), 1, 1),
        Member((extent,), window - 1, 1),
        Member((extent,), window, 1),
        Member((extent,), window + 1, 1),
        Member((extent,), 2 * window, 2 * window),
        Member((extent,), window + 4, 9),
        Member((10, 21), 5, 1),
        Member((10, 21), window - 3, 30),
        Member((10, 21), window + 50, 3),
        Member((90, 21), 19, 19),
    ]


def attend(
    backend: TritonAttentionBackend, batch: Batch, spec: AttentionSpec, prepared: object, sinks: torch.Tensor | None
) -> torch.Tensor:
    q, k, v = (x.to(DEVICE) for x in (batch.q, batch.k, batch.v))
    return backend.attend(q, k, v, spec, prepared, None if sinks is None else sinks.to(DEVICE)).cpu()


def check(batch: Batch, specs: list[AttentionSpec], merged_groups: bool = True) -> None:
    """All specs in one step, as layers of one network."""
    sinks = torch.linspace(-2.0, 4.0, batch.q.shape[1])
    backend = TritonAttentionBackend(DEVICE, batch.block_size)
    assert [backend.misfit(spec) for spec in specs] == [None] * len(specs)
    for spec, prepared in zip(specs, backend.prepare(metadata(batch, merged_groups), specs), strict=True):
        used = sinks if spec.sinks else None
        assert_near(attend(backend, batch, spec, prepared, used), batch.reference(spec, used), TOLERANCE[spec.dtype])


def make(members: list[Member], shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Batch:
    return Batch(members, 16, *shape, dtype, seed)


@pytest.mark.parametrize("merged_groups", [True, pytest.param(False, marks=heavy)])
@pytest.mark.nightly
def test_windows_cut_at_their_edges(merged_groups: bool) -> None:
    batch = make(around(WINDOW), (2, 1, 32), torch.float32)
    check(batch, [batch.spec(window=WINDOW), batch.spec()], merged_groups)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((7, 1, 64), torch.bfloat16),
        pytest.param((2, 2, 64), torch.bfloat16, marks=heavy),
        pytest.param((4, 1, 48), torch.float16, marks=heavy),
    ],
)
def test_head_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch = make(around(WINDOW), shape, dtype, seed=1)
    check(batch, [batch.spec(window=WINDOW, softcap=5.0, sinks=True)])


@pytest.mark.parametrize("changes", [{"softcap": 0.7}, {"sinks": True}, {"softcap": 3.0, "sinks": True}])
def test_capped_scores_and_sinks(changes: dict) -> None:
    batch = make(MIXED, (6, 2, 64), torch.float32, seed=2)
    check(batch, [batch.spec(**changes)])


def test_scores_far_beyond_the_cap_and_sinks_far_beyond_all_scores() -> None:
    batch = make(MIXED, (4, 1, 32), torch.float32, seed=3)
    batch.q *= 1000
    spec = batch.spec(softcap=2.0, sinks=True)
    backend = TritonAttentionBackend(DEVICE, 16)
    (prepared,) = backend.prepare(metadata(batch), [spec])
    for sinks in (torch.full((4,), 1000.0), torch.full((4,), -1000.0)):
        out = attend(backend, batch, spec, prepared, sinks)
        assert bool(torch.isfinite(out).all())
        torch.testing.assert_close(out.double(), batch.reference(spec, sinks), atol=1e-5, rtol=0)


def test_sinks_join_rows_that_are_not_merged() -> None:
    """Batches whose tokens all have one part, and batches where some have."""
    alone = make([Member((), 20, 1), Member((), 30, 30)], (4, 2, 64), torch.float32)
    check(alone, [alone.spec(sinks=True, window=12)])
    backend = TritonAttentionBackend(DEVICE, 16)
    assert backend.prepare(metadata(alone), [alone.spec(sinks=True)])[0].partial is None
    some = make([Member((33,), 20, 1), Member((), 30, 30)], (4, 2, 64), torch.float32)
    (prepared,) = backend.prepare(metadata(some), [some.spec(sinks=True)])
    assert -1 in prepared.counts.tolist() and prepared.partial is not None
    check(some, [some.spec(sinks=True)])


def test_values_of_another_size_are_a_misfit() -> None:
    spec = AttentionSpec(4, 2, 192, 128, 0.1, torch.bfloat16)
    assert TritonAttentionBackend(DEVICE, 16).misfit(spec) == "values of 128 beside keys of 192"


@pytest.mark.parametrize(
    ("block_m", "window"),
    [(64, 50), *(pytest.param(128, window, marks=heavy) for window in (20, 100, 130))],
)
def test_rows_that_see_all_keys_of_a_step_and_some_and_none(block_m: int, window: int) -> None:
    members = [Member((), 100, 100), Member((), 160, 70), Member((110,), 60, 60), Member((110,), 1, 1)]
    batch = make(members, (4, 1, 32) if block_m == 128 else (1, 1, 32), torch.bfloat16, seed=5)
    attention = TritonAttentionBackend(DEVICE, 16).of(batch.spec(window=window))
    assert attention.prefix_tiles(60).block_m == attention.suffix_tiles(60).block_m == block_m
    check(batch, [batch.spec(window=window)])


def random_members(rng: random.Random) -> list[Member]:
    lengths = [rng.randint(1, 120) for _ in range(3)]
    members = []
    for _ in range(rng.randint(1, 12)):
        context = rng.randint(1, 90)
        chain = tuple(sorted(set(rng.sample(lengths, rng.choice([0, 1, 1, 2])))))
        members.append(Member(chain, context, 1 if rng.random() < 0.6 else rng.randint(1, context)))
    return sorted(members, key=lambda m: m.chain)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=heavy) for seed in range(2, 12))])
def test_random_batches(seed: int) -> None:
    rng = random.Random(seed)
    heads, kv_heads = rng.choice([(1, 1), (3, 1), (4, 2)])
    batch = make(random_members(rng), (heads, kv_heads, 32), torch.float32, seed)
    check(batch, [batch.spec(window=rng.randint(1, 130), sinks=rng.random() < 0.5)], merged_groups=False)


@pytest.mark.parametrize("decode", [True, False])
def test_steps_of_mixed_layers_are_replayed(decode: bool) -> None:
    """The same buffers serve batches within the window, at its edge and far behind it."""
    rng, size = random.Random(0), 6 if decode else 64
    steps = [
        [Member((33,), 5, 1), Member((33,), 70, 1), Member((300,), 1, 1), Member((), 9, 1)],
        [Member((20, 33), 8, 1), Member((33,), WINDOW - 1, 1), Member((33,), WINDOW, 1), Member((), 41, 1)],
        [Member((33,), 100, 1), Member((), 200, 1)],
        [Member((), 3, 1)],
    ]
    if not decode:
        steps[1:] = [
            [Member((33,), 50, 25), Member((33,), 2, 1), Member((60,), 20, 20), Member((), 60, 7)],
        ]
    shape, sinks = (4, 2, 32), torch.linspace(-1.0, 2.0, 4)
    plain = make(steps[0], shape, torch.float32).spec()
    specs = [plain, make(steps[0], shape, torch.float32).spec(window=WINDOW, sinks=True)]
    backend = TritonAttentionBackend(DEVICE, 16)
    tables = torch.zeros(7, 40, dtype=torch.int64, device=DEVICE)
    plans = ReplayPlans(backend, specs, size, tables, 16)
    captured = plans.prepared(size, decode=decode, plain=False)
    for i, members in enumerate(steps):
        batch = make(members, shape, torch.float32, seed=i)
        wants = [batch.reference(spec, sinks if spec.sinks else None) for spec in specs]
        n, rows = len(batch.q), place(batch, tables, size, rng)
        is_plain = plans.fill(inputs(size), sequences_of(batch, rows), metadata(batch).groups, decode=decode)
        # Layers that see a prefix need the merge, however many layers do not.
        assert not (is_plain and any(m.chain for m in members))
        for spec, prepared, want in zip(specs, captured, wants, strict=True):
            out = attend(backend, batch, spec, prepared, sinks if spec.sinks else None)
            assert_near(out[:n], want, TOLERANCE[torch.float32])
            assert not out[n:].any()


@pytest.mark.parametrize("window", [40, *(pytest.param(window, marks=heavy) for window in (1, 39, 41, 500))])
def test_windows_in_blocks_of_their_own(window: int) -> None:
    batch = make(AROUND, (4, 2, 32), torch.float32, seed=window)
    part, spec, backend = (
        WindowPart(batch, window, seed=1),
        batch.spec(window=window),
        TritonAttentionBackend(DEVICE, 16),
    )
    (prepared,) = backend.prepare(on_device(part), [spec])
    out = backend.attend(*(x.to(DEVICE) for x in (batch.q, part.k, part.v)), spec, prepared)
    assert_near(out.cpu(), batch.reference(spec), TOLERANCE[torch.float32])


def on_device(part: WindowPart) -> AttentionMetadata:
    host = part.metadata()
    return replace(host, slot_mapping=host.slot_mapping.to(DEVICE), block_tables=host.block_tables.to(DEVICE))


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.nightly
def test_steps_with_a_window_group_are_replayed(decode: bool) -> None:
    """Layers of either group, each with its block tables and extents, by the same buffers."""
    rng, size, shape = random.Random(1), 8 if decode else 96, (4, 2, 32)
    steps = [[Member(m.chain, m.context, 1 if decode else m.queries) for m in AROUND[i : i + 7]] for i in (0, 6, 3)]
    specs = [make(AROUND, shape, torch.float32).spec(window=w) for w in (None, WINDOW)]
    backend = TritonAttentionBackend(DEVICE, 16)
    tables = [torch.zeros(9, 40, dtype=torch.int64, device=DEVICE) for _ in specs]
    plans = ReplayPlans(backend, specs, size, tables[0], 16, tables[1])
    captured = plans.prepared(size, decode=decode, plain=False)
    for i, members in enumerate(steps):
        batch = make(members, shape, torch.float32, seed=i)
        part = WindowPart(batch, WINDOW, seed=i)
        rows = rng.sample(range(9), len(members))
        for held, kept in zip(tables, (batch.tables, part.tables), strict=True):
            held.zero_()
            for row, table in zip(rows, kept, strict=True):
                held[row, : len(table)] = torch.tensor(table, device=DEVICE)
        groups = batch.metadata(True).groups
        plans.fill(inputs(size), sequences_of(batch, rows), groups, part.metadata().groups, decode=decode)
        for spec, prepared, caches in zip(specs, captured, ((batch.k, batch.v), (part.k, part.v)), strict=True):
            q = torch.zeros(size, *batch.q.shape[1:])
            q[: len(batch.q)] = batch.q
            out = backend.attend(q.to(DEVICE), *(x.to(DEVICE) for x in caches), spec, prepared).cpu()
            assert_near(out[: len(batch.q)], batch.reference(spec), TOLERANCE[torch.float32])
            assert not out[len(batch.q) :].any()


def test_what_lies_behind_the_window_is_not_read() -> None:
    """Neither slots of an extent nor entries of a block table; both may be others' by then."""
    window = 20
    batch = make([Member((64,), 5, 1), Member((64,), 70, 1), Member((), 90, 33)], (2, 1, 32), torch.float32)
    spec = batch.spec(window=window)
    want = batch.reference(spec)
    first = batch.first_slot[64]
    # The first of the sequences at the extent is at position 68, and sees from 49 on; whole steps of 16 are read.
    batch.k[first : first + 32] = batch.v[first : first + 32] = float("nan")
    for i in (1, 2):
        gone = (batch.members[i].context - batch.members[i].queries - window + 1) // 16
        for block in batch.tables[i][:gone]:
            batch.k[block * 16 : block * 16 + 16] = batch.v[block * 16 : block * 16 + 16] = float("nan")
        batch.tables[i][:gone] = [10**8] * gone
    attention = TritonAttention(2, 1, 32, torch.float32, DEVICE, window=window)
    q, k, v = (x.to(DEVICE) for x in (batch.q, batch.k, batch.v))
    out = attention.forward(q, k, v, spec.scale, attention.prepare(metadata(batch)))
    assert_near(out.cpu(), want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("seed", range(20))
def test_plans_hold_every_key_in_sight_once_and_no_tile_out_of_sight(seed: int) -> None:
    rng = random.Random(seed)
    window, share = rng.choice([1, 16, 63, 64, 65, 500]), rng.choice([1, 4, 7])
    tiles = TileConfig(rng.choice([16, 64]), 32, 4, 2, 1)
    lengths = rng.sample(range(1, 900), 3)
    members = []
    for _ in range(rng.randint(1, 20)):
        context = rng.randint(1, 700)
        chain = tuple(sorted(rng.sample(lengths, rng.choice([0, 1, 1, 2]))))
        members.append(Member(chain, context, 1 if rng.random() < 0.5 else rng.randint(1, context)))
    members.sort(key=lambda m: m.chain)
    batch = Batch(members, 16, 1, 1, 2, torch.float32, seed)
    host = batch.metadata(False)
    queries, contexts = np.array(host.query_lens), np.array(host.context_lens)
    sequences = np.stack((queries.cumsum() - queries, queries, contexts, np.arange(len(queries))), axis=1)
    groups, num_tokens = group_array(host.groups), int(queries.sum())
    first_seen = first_positions(sequences, groups, num_tokens, window)
    common = {
        "group_size": share,
        "num_kv_heads": 2,
        "tiles": tiles,
        "num_programs": 50,
        "max_partials": 12,
        "max_work": 10**6,
    }
    work, counts = plan_prefix(
        within_window(groups, first_seen, tiles.tokens(share), tiles.block_n), num_tokens, **common
    )
    before = counts.copy()
    cut = cut_where_parts_change(sequences, counts)
    assert cut[:, 1].sum() == num_tokens
    own = plan_suffix(*cut.T, counts, **common, window=window)
    parts: list[list[int]] = [[] for _ in range(num_tokens)]
    read: list[list[int]] = [[] for _ in range(num_tokens)]
    token_position = [sum(m.chain) + m.context - m.queries + i for m in members for i in range(m.queries)]
    start_of = [sum(m.chain) for m in members for _ in range(m.queries)]
    for first, n, _, begin, end, position, split in work.tolist():
        keys = range(position + begin, position + end)
        assert keys[-1] > min(token_position[first : first + n]) - window
        for token in range(first, first + n):
            parts[token].append(split)
            read[token] += keys
    for first, n, _, begin, end, position, split in own.tolist():
        start = start_of[first]
        assert position + start == token_position[first] and begin > position - window
        for token in range(first, first + n):
            parts[token].append(split)
            read[token] += range(start + begin, start + end)
    for token, position in enumerate(token_position):
        assert sorted(parts[token]) == list(range(counts[token])) and counts[token] > before[token]
        seen = [key for key in read[token] if position - window < key <= position]
        assert sorted(seen) == list(range(max(0, position - window + 1), position + 1))


def test_a_layer_costs_its_window() -> None:
    """256 sequences that decode at an extent of 32,768 tokens, and a chunk of 8,192 tokens behind it."""
    tiles, window = TileConfig(128, 128, 8, 2, 1), 1024
    groups = np.array([[0, 256, 0, 32768, 0], [256, 8192, 0, 32768, 0]])
    sequences = np.array([[i, 1, 1 + 10 * i, i] for i in range(256)] + [[256, 8192, 8192, 256]])
    first_seen = first_positions(sequences, groups, 256 + 8192, window)
    left = within_window(groups, first_seen, tiles.tokens(4), tiles.block_n)
    # A tile holds 32 tokens. Decoding ones have passed the extent from the 103rd on, the chunk's after 1,023 tokens.
    assert left[:, 3].max() <= window and len(left) == 4 + 32
    assert left[:, 3].sum() <= 4 * window + 32 * (window + 128) // 2 + 32 * 64
    assert (left[:, 2] + left[:, 3]).tolist() == [32768] * len(left)
    work = plan_suffix(
        *sequences.T,
        np.zeros(256 + 8192, np.int32),
        group_size=4,
        num_kv_heads=8,
        tiles=tiles,
        num_programs=132,
        max_partials=8,
        max_work=10**6,
        window=window,
    )
    assert (work[:, 4] - work[:, 3]).max() <= window + 31


REAL = [
    ((8, 4, 256), {"window": 1024}),
    ((8, 4, 256), {"window": 600, "softcap": 50.0}),
    ((8, 4, 256), {"softcap": 50.0}),
    ((64, 8, 64), {"window": 128, "sinks": True}),
    ((64, 8, 64), {"sinks": True}),
    ((28, 4, 128), {"window": 1000}),
    ((4, 4, 128), {"window": 128, "softcap": 30.0, "sinks": True}),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "changes"), REAL)
def test_real_sizes(shape: tuple[int, int, int], changes: dict) -> None:
    window = changes.get("window", 200)
    members = around(window) + [Member((5000,), 300, 300)] * 2 + [Member((5000,), 150 * i + 1, 1) for i in range(8)]
    batch = make(members, shape, torch.bfloat16, seed=7)
    check(batch, [batch.spec(**changes), batch.spec()])


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "changes"), REAL)
@pytest.mark.parametrize("size", [1, 20])
def test_captured_graphs(shape: tuple[int, int, int], changes: dict, size: int) -> None:
    """One capture of a layer of each kind serves batches within the window, at its edge and behind it."""
    rng, dtype, window = random.Random(size), torch.bfloat16, changes.get("window", 200)
    sinks = torch.linspace(-2.0, 4.0, shape[0])
    backend = TritonAttentionBackend(DEVICE, 16)
    tables = torch.zeros(64, 1024, dtype=torch.int64, device=DEVICE)
    plain = make([Member((), 1, 1)], shape, dtype).spec()
    specs = [plain, make([Member((), 1, 1)], shape, dtype).spec(**changes)]
    plans = ReplayPlans(backend, specs, 64, tables, 16)
    q = torch.zeros(size, shape[0], shape[2], dtype=dtype, device=DEVICE)
    k, v = (torch.zeros(100_000, shape[1], shape[2], dtype=dtype, device=DEVICE) for _ in range(2))
    used = [sinks.to(DEVICE) if spec.sinks else None for spec in specs]

    def step() -> list[torch.Tensor]:
        prepared = plans.prepared(size, decode=True, plain=False)
        return [backend.attend(q, k, v, s, p, u) for s, p, u in zip(specs, prepared, used, strict=True)]

    plans.fill(inputs(size), np.zeros((0, 4), np.int64), [], decode=True)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step()
    for chain in ((), (window - 1,), (17, 300), (5000,)):
        lens = (1, 2, window - 1, window, window + 1, 3 * window)
        members = [Member(chain if rng.random() < 0.8 else (), rng.choice(lens), 1) for _ in range(size)]
        members.sort(key=lambda m: m.chain)
        batch = make(members, shape, dtype, seed=len(chain))
        for row, table in enumerate(batch.tables):
            tables[row, : len(table)] = torch.tensor(table, device=DEVICE)
        assert len(batch.k) <= len(k)
        k[: len(batch.k)], v[: len(batch.v)], q[:] = batch.k, batch.v, batch.q
        plans.fill(inputs(size), sequences_of(batch, list(range(size))), metadata(batch).groups, decode=True)
        graph.replay()
        for out, spec in zip(outs, specs, strict=True):
            assert_near(out.cpu(), batch.reference(spec, sinks if spec.sinks else None), TOLERANCE[dtype])

"""Pinned prompts outlive the engine: what was computed once is loaded, and nothing damaged or foreign ever is."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.helpers import Request, assert_nothing_held, finish, greedy, make_engine, run, tokens
from tests.engine.test_pinned_prompts import asking, ids, pinned_kv
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.llm_engine import LLMEngine
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.system_prompt_store import SnapshotIdentity, snapshot_identity
from vllm.system_prompt_store.manifest import Manifest

MakeEngine = Callable[..., LLMEngine]


def saved(engine: LLMEngine, count: int) -> None:
    """Steps until `count` snapshots have been written (or not), and until what follows from that is done: the step
    that hears of the last one still has memory to give back."""
    done, deadline = -1, 0.0
    while (now := sum(n for (op, _), n in outcomes(engine).items() if op == "save")) < count:
        if now > done:
            done, deadline = now, time.monotonic() + 60
        assert time.monotonic() < deadline, outcomes(engine)
        engine.step()
        time.sleep(0.002)
    finish(engine)


def outcomes(engine: LLMEngine) -> dict[tuple[str, str], int]:
    return dict(engine.core.pool.tiers.outcomes)


def ask(engine: LLMEngine, system: list[int], seed: int = 7) -> tuple[int, list[int]]:
    """(Cached tokens, output tokens) of a request behind a system prompt."""
    (output,) = run(engine, [asking(system, seed)], greedy(12))
    return output.num_cached_tokens, tokens([output])[0]


def pinned(engine: LLMEngine, system: list[int], seed: int = 7) -> tuple[int, list[int]]:
    """As `ask`, and once more, so that it is no longer on probation; returns what the first request got."""
    first = ask(engine, system, seed)
    ask(engine, system, seed)
    return first


@pytest.fixture
def make_kept(make_tiny: MakeEngine, tmp_path: Path) -> MakeEngine:
    """Engines that share a folder for snapshots."""
    return lambda **args: make_tiny(**({"system_prompt_cache_dir": str(tmp_path / "cache")} | args))


def folders(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/snapshots").iterdir())


def test_a_new_engine_answers_from_what_the_old_one_computed(make_kept: MakeEngine) -> None:
    hard, automatic = ids(1, 70), ids(2, 50)
    engine = make_kept()
    engine.add_system_prompt(hard, name="Rules", ttl=5000.0)
    first = [pinned(engine, system) for system in (hard, automatic)]
    assert [cached for cached, _ in first] == [70, 0]
    saved(engine, 2)
    engine.shutdown()

    engine = make_kept()
    (info,) = engine.list_system_prompts()
    assert (info.name, info.pin, info.ttl, info.state) == ("Rules", "hard", 5000.0, "pinned")
    kv = pinned_kv(engine)
    again = [ask(engine, system) for system in (hard, automatic)]
    assert [cached for cached, _ in again] == [70, 50], "the first request finds everything but its own part"
    assert [out for _, out in again] == [out for _, out in first]
    assert engine.core.pool.num_prefills == 0
    assert outcomes(engine) == {("load", "ok"): 2}
    computed = make_kept(system_prompt_cache_dir=None)
    computed.add_system_prompt(hard)
    assert all(map(torch.equal, kv, pinned_kv(computed))), "bit for bit"
    assert_nothing_held(engine)


def test_nothing_of_other_requests_is_in_a_snapshot(make_kept: MakeEngine, tmp_path: Path) -> None:
    engine = make_kept()
    cache = engine.core.executor._worker.runner.cache
    for tensor in (*cache.k_caches, *cache.v_caches):
        tensor.fill_(1.0)  # what requests have left in the blocks
    info = engine.add_system_prompt(ids(1, 33))
    saved(engine, 1)
    (folder,) = folders(tmp_path)
    data = (folder / "kv.safetensors").read_bytes()
    size = sum(tensor.nbytes for tensor in (*cache.k_caches, *cache.v_caches)) * info.num_blocks // cache.num_blocks
    shape = (2 * len(cache.k_caches), info.num_blocks, -1)
    last_blocks = np.frombuffer(data[len(data) - size :], np.float32).reshape(shape)[:, -1]
    assert last_blocks.any(axis=1).all(), "the last token of the prompt is in every layer"
    assert np.count_nonzero(last_blocks, axis=1).max() <= last_blocks.shape[1] // cache.block_size


def test_automatic_prompts_come_back_without_being_asked_for(make_kept: MakeEngine) -> None:
    engine = make_kept()
    systems = [ids(i, 40) for i in range(5)]
    for system in systems:
        pinned(engine, system)
    saved(engine, 5)
    # Room for three of them.
    engine = make_kept(system_prompt_cache_tokens=3 * 48)
    while engine.core.has_work():
        engine.step()
    assert [p.state for p in engine.list_system_prompts()] == ["pinned"] * 3
    assert sorted(ask(engine, system)[0] for system in systems) == [0, 0, 40, 40, 40]
    assert engine.core.pool.num_prefills == 0
    assert_nothing_held(engine)


def test_a_prompt_that_continues_another_comes_back_behind_it(make_kept: MakeEngine) -> None:
    parent, child = ids(1, 40), [*ids(1, 40), *ids(2, 37)]
    engine = make_kept()
    for prompt in (parent, child):
        engine.add_system_prompt(prompt)
    first = ask(engine, child)
    saved(engine, 2)
    engine = make_kept()
    assert {p.num_tokens: p.num_blocks for p in engine.list_system_prompts()} == {40: 3, 77: 3}
    assert ask(engine, child) == first
    assert engine.core.pool.num_prefills == 0


def test_what_was_removed_stays_removed(make_kept: MakeEngine, tmp_path: Path) -> None:
    engine = make_kept()
    keys = [engine.add_system_prompt(ids(i, 40)).id for i in range(3)]
    saved(engine, 2)
    for key in keys:
        engine.remove_system_prompt(key)
    engine.shutdown()
    assert not folders(tmp_path)
    assert make_kept().list_system_prompts() == []


def test_how_a_prompt_is_pinned_is_kept_up_to_date(make_kept: MakeEngine) -> None:
    engine = make_kept()
    pinned(engine, ids(1, 40))
    saved(engine, 1)
    engine.add_system_prompt(ids(1, 40), name="Now an operator's")
    engine.shutdown()
    (info,) = make_kept().list_system_prompts()
    assert (info.name, info.pin) == ("Now an operator's", "hard")


def test_what_is_pinned_softly_is_not_left_on_disk(make_kept: MakeEngine, tmp_path: Path) -> None:
    engine = make_kept()
    engine.add_system_prompt(ids(1, 40), pin="soft")
    pinned(engine, ids(2, 40))
    saved(engine, 1)
    assert [json.loads((f / "manifest.json").read_text())["record"]["pin"] for f in folders(tmp_path)] == ["automatic"]
    engine.add_system_prompt(ids(1, 40))
    saved(engine, 2)
    assert len(folders(tmp_path)) == 2
    engine.shutdown()
    assert_nothing_held(engine)


def test_a_damaged_prompt_of_an_operator_is_computed_before_the_engine_is_ready(
    make_kept: MakeEngine, tmp_path: Path
) -> None:
    engine = make_kept()
    engine.add_system_prompt(ids(1, 70))
    first = ask(engine, ids(1, 70))
    saved(engine, 1)
    engine.shutdown()
    (folder,) = folders(tmp_path)
    flip(folder / "kv.safetensors", random.Random(0))
    engine = make_kept()
    assert outcomes(engine)["load", "damaged"] == 1 and engine.core.pool.num_prefills == 1
    assert ask(engine, ids(1, 70)) == first
    saved(engine, 1)
    engine.shutdown()
    assert outcomes(make_kept()) == {("load", "ok"): 1}, "the good one has taken its place"


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def damage(folder: Path, rng: random.Random) -> None:
    """One thing that may happen to a snapshot."""
    path = folder / rng.choice(("manifest.json", "kv.safetensors", "kv.safetensors"))
    match rng.randrange(10):
        case 0:
            path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
        case 1:
            path.unlink()
        case 2:
            path.write_bytes(path.read_bytes() + b"\0" * rng.randint(1, 100))
        case 3:
            start = rng.randrange(path.stat().st_size)
            data = bytearray(path.read_bytes())
            data[start : start + 512] = rng.randbytes(len(data[start : start + 512]))
            path.write_bytes(data)
        case _:
            flip(path, rng)


def check_fuzz(make_kept: MakeEngine, tmp_path: Path, count: int, seed: int) -> None:
    rng = random.Random(seed)
    limits = {"max_model_len": 256, "num_gpu_blocks_override": 16 + 8 * count}
    systems = [ids(1000 + i, 33 + i % 30) for i in range(count)]
    engine = make_kept(**limits)
    first = [tokens(run(engine, [asking(s, i) for i, s in enumerate(systems)], greedy(6))) for _ in range(2)]
    saved(engine, count)
    engine.shutdown()
    assert len(folders(tmp_path)) == count
    whole = rng.choice(folders(tmp_path))
    for folder in folders(tmp_path):
        if folder != whole:
            damage(folder, rng)
    engine = make_kept(**limits)
    outputs = run(engine, [asking(s, i) for i, s in enumerate(systems)], greedy(6))
    assert tokens(outputs) == first[0]
    assert outcomes(engine)["load", "ok"] == 1
    assert engine.core.pool.num_prefills == count - 1
    assert_nothing_held(engine)


@pytest.mark.parametrize("seed", [1])
def test_damage_never_shows_in_the_tokens(make_kept: MakeEngine, tmp_path: Path, seed: int) -> None:
    check_fuzz(make_kept, tmp_path, 60, seed)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(5))
def test_much_damage_never_shows_in_the_tokens(make_kept: MakeEngine, tmp_path: Path, seed: int) -> None:
    check_fuzz(make_kept, tmp_path, 100, 100 + seed)


@pytest.fixture
def changed_model(tiny_model_dir: Path, tmp_path: Path) -> Callable[[str], Path]:
    """`changed_model(what)` is a copy of the tiny model with its times kept, one thing changed."""

    def change(what: str) -> Path:
        folder = tmp_path / what
        shutil.copytree(tiny_model_dir, folder, copy_function=shutil.copy2)
        if what == "rope":
            edit(folder / "config.json", lambda c: c["rope_parameters"].update(rope_theta=50_000.0))
        if what == "tokenizer":
            edit(folder / "tokenizer.json", lambda t: t["added_tokens"][0].update(normalized=True))
        if what == "chat_template":
            edit(folder / "tokenizer_config.json", lambda t: t.update(chat_template=t["chat_template"] + " "))
        if what == "weights":
            os.utime(folder / "model.safetensors", (1000, 1000))
        return folder

    return change


def edit(path: Path, change: Callable[[dict], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def identity(model: Path, **flags: object) -> SnapshotIdentity:
    args = EngineArgs(model=str(model), system_prompt_cache_dir="cache", **{"dtype": "float32", **flags})
    config = args.create_engine_config()
    shape = {
        "arithmetic": "",
        "layout": "slots",
        "block_size": 16,
        "block_bytes": (1024,) * 4,
        "rank": 0,
        "num_ranks": 1,
    }
    return snapshot_identity(config.model, kv_dtype=config.model.dtype, **shape)


@pytest.mark.skipif(cpu_kernels.library() is None, reason="the compiled kernels are not there")
def test_a_snapshot_says_how_bfloat16_was_multiplied(make_kept: MakeEngine, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        engine = make_kept(dtype=dtype)
        engine.add_system_prompt(ids(1, 70))
        saved(engine, 1)
        engine.shutdown()
    manifests = [Manifest.decode((folder / "manifest.json").read_bytes()) for folder in folders(tmp_path)]
    ways = {manifest.identity.dtype: manifest.identity.arithmetic for manifest in manifests}
    assert ways == {"float32": "", "bfloat16": str(cpu_kernels.arithmetic())}


@pytest.fixture(scope="module")
def tiny_identity(tiny_model_dir: Path) -> SnapshotIdentity:
    return identity(tiny_model_dir)


@pytest.mark.parametrize("what", ["nothing", "rope", "tokenizer", "chat_template", "weights", "dtype"])
def test_what_kv_depends_on_is_told_apart(
    tiny_identity: SnapshotIdentity, changed_model: Callable[[str], Path], what: str
) -> None:
    other = identity(changed_model(what), **({"dtype": "bfloat16"} if what == "dtype" else {}))
    # The digest of weights covers config.json.
    expected = {"nothing": [], "rope": ["weights", "rope"], "dtype": ["dtype", "kv_dtype"]}.get(what, [what])
    assert tiny_identity.differences(other) == expected


def test_another_setup_computes_for_itself(
    make_kept: MakeEngine, changed_model: Callable[[str], Path], tmp_path: Path
) -> None:
    engine = make_kept()
    engine.add_system_prompt(ids(1, 70))
    saved(engine, 1)
    kept, plain = (
        make_engine(folder, system_prompt_cache_dir=cache)
        for folder, cache in ((changed_model("rope"), str(tmp_path / "cache")), (tmp_path / "rope", None))
    )
    assert kept.list_system_prompts() == []
    assert ask(kept, ids(1, 70)) == ask(plain, ids(1, 70))
    assert kept.core.pool.num_prefills == 1 and ("load", "ok") not in outcomes(kept)
    kept.shutdown()
    plain.shutdown()


def test_a_disk_that_is_full_costs_snapshots_and_nothing_else(
    make_kept: MakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write, written = os.write, 0

    def full(descriptor: int, data: bytes) -> int:
        nonlocal written
        if written > 5000 and len(data) > 200:
            raise OSError(errno.ENOSPC, "No space left on device")
        written += len(data)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    engine = make_kept()
    first = [pinned(engine, ids(i, 60)) for i in range(3)]
    saved(engine, 3)
    assert outcomes(engine) == {("save", "error"): 3}
    assert folders(tmp_path) == []
    assert [ask(engine, ids(i, 60)) for i in range(3)] == [(60, out) for _, out in first]
    assert_nothing_held(engine)


def test_a_folder_that_cannot_be_used_costs_snapshots_and_nothing_else(make_kept: MakeEngine, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    engine = make_kept()
    first = pinned(engine, ids(1, 60))
    saved(engine, 1)
    assert outcomes(engine) == {("save", "error"): 1}
    assert ask(engine, ids(1, 60)) == (60, first[1])


def test_running_requests_go_on_while_prompts_are_saved_and_loaded(make_kept: MakeEngine, pipeline_depth: int) -> None:
    def serve() -> list[list[int]]:
        engine = make_kept(max_num_batched_tokens=256)
        engine.core.pool.tiers.copy_blocks = 2
        requests = [asking(ids(i % 3, 40 + i % 3), i, 30) for i in range(12)] + [Request(ids(50, 60))]
        outputs = run(engine, requests, greedy(40))
        saved(engine, sum(p.state == "pinned" for p in engine.list_system_prompts()) - engine_loads(engine))
        assert_nothing_held(engine)
        loads.append(engine_loads(engine))
        return tokens(outputs)

    loads: list[int] = []
    assert serve() == serve()
    assert loads == [0, 3]


def engine_loads(engine: LLMEngine) -> int:
    return outcomes(engine).get(("load", "ok"), 0)

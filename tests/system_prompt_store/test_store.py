"""Snapshots on disk: what was written is read back, and nothing else ever is."""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors import safe_open

from vllm.system_prompt_store import SnapshotIdentity, SnapshotOutcome, SnapshotRecord, SnapshotStore, files
from vllm.system_prompt_store.manifest import Manifest

IDENTITY = SnapshotIdentity(
    format_version=1,
    weights="w",
    network="n",
    rope="r",
    tokenizer="t",
    chat_template="c",
    adapter="",
    dtype="float32",
    kv_dtype="float32",
    arithmetic="0",
    layout="slots",
    block_bytes=(48,) * 4,
    block_size=4,
    rank=0,
    num_ranks=1,
)
SIZE = 4 * 5 * 48


def record(name: str = "sp-a", tokens: int = 18, pin: str = "automatic") -> SnapshotRecord:
    return SnapshotRecord(name, list(range(tokens)), 0, 5, pin)


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (4, 5, 48), np.uint8)


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., SnapshotStore]:
    def make(max_bytes: int = 1 << 20, **differences: object) -> SnapshotStore:
        return SnapshotStore(tmp_path / "snapshots", msgspec.structs.replace(IDENTITY, **differences), max_bytes)

    return make


def read(store: SnapshotStore, wanted: SnapshotRecord) -> tuple[SnapshotOutcome, np.ndarray]:
    target = np.zeros((4, 5, 48), np.uint8)
    return store.read(wanted, target), target


def folder_of(store: SnapshotStore) -> Path:
    (path,) = (p for p in store.folder.iterdir() if not p.name.startswith("."))
    return path


def test_a_snapshot_is_read_back_by_another_store(make_store: Callable[..., SnapshotStore]) -> None:
    store = make_store()
    assert store.write(record(pin="hard"), image()) == SnapshotOutcome.OK
    again = make_store()
    assert again.scan() == [record(pin="hard")]
    outcome, found = read(again, record())
    assert outcome == SnapshotOutcome.OK
    assert np.array_equal(found, image())


def test_files_are_private_and_the_tensors_are_safetensors(make_store: Callable[..., SnapshotStore]) -> None:
    store = make_store()
    mask = os.umask(0)
    try:
        store.write(record(), image())
    finally:
        os.umask(mask)
    path = folder_of(store)
    assert stat.S_IMODE(store.folder.stat().st_mode) == stat.S_IMODE(path.stat().st_mode) == 0o700
    assert sorted(p.name for p in path.iterdir()) == ["kv.safetensors", "manifest.json"]
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {0o600}
    with safe_open(path / "kv.safetensors", framework="np") as file:
        for i, name in enumerate(("k.0", "k.1", "v.0", "v.1")):
            assert np.array_equal(file.get_tensor(name), image()[i])


def test_a_prompt_written_again_replaces_its_snapshot(make_store: Callable[..., SnapshotStore]) -> None:
    store = make_store()
    for seed in range(2):
        assert store.write(record(), image(seed)) == SnapshotOutcome.OK
    outcome, found = read(store, record())
    assert outcome == SnapshotOutcome.OK and np.array_equal(found, image(1))
    assert store.delete("sp-a") == SnapshotOutcome.OK
    assert store.delete("sp-a") == read(store, record())[0] == SnapshotOutcome.MISSING
    assert not list(store.folder.iterdir())


def test_how_a_prompt_is_pinned_can_change_later(make_store: Callable[..., SnapshotStore]) -> None:
    store = make_store()
    store.write(record(), image())
    changed = msgspec.structs.replace(record(pin="hard"), name="Rules", ttl=60.0)
    assert store.update(changed) == SnapshotOutcome.OK
    assert make_store().scan() == [changed]
    assert read(store, record())[0] == SnapshotOutcome.OK
    assert store.update(record("sp-b")) == SnapshotOutcome.MISSING


@pytest.mark.parametrize("field", [f for f in IDENTITY.__struct_fields__ if f != "block_bytes"])
def test_another_setup_never_gets_it(
    make_store: Callable[..., SnapshotStore], field: str, caplog: pytest.LogCaptureFixture, propagated: None
) -> None:
    make_store().write(record(), image())
    value = getattr(IDENTITY, field)
    other = make_store(**{field: value + 1 if isinstance(value, int) else value + "'"})
    assert other.scan() == []
    assert f"of another setup ({field})" in caplog.text
    assert read(other, record())[0] == SnapshotOutcome.MISSING
    # Not even where somebody has renamed it.
    path = folder_of(make_store())
    path.rename(path.with_name(other._name("sp-a")))
    assert read(other, record())[0] == SnapshotOutcome.MISMATCH


@pytest.mark.parametrize(
    "wanted",
    [
        msgspec.structs.replace(record(), token_ids=[*range(17), 99]),
        msgspec.structs.replace(record(), start=4),
        msgspec.structs.replace(record(), num_blocks=4),
    ],
)
def test_other_tokens_never_get_it(make_store: Callable[..., SnapshotStore], wanted: SnapshotRecord) -> None:
    store = make_store()
    store.write(record(), image())
    assert read(store, wanted)[0] == SnapshotOutcome.MISMATCH
    assert read(store, record())[0] == SnapshotOutcome.OK


def test_any_flipped_byte_is_found(make_store: Callable[..., SnapshotStore]) -> None:
    rng = random.Random(0)
    store = make_store()
    outcomes = []
    for _ in range(300):
        store.write(record(), image())
        path = folder_of(store) / rng.choice(("manifest.json", "kv.safetensors"))
        data = bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= rng.randint(1, 255)
        path.write_bytes(data)
        outcome, found = read(store, record())
        assert outcome != SnapshotOutcome.OK or np.array_equal(found, image())
        outcomes.append(outcome)
        store.scan()
    # A manifest may be changed into an equal one only by luck; tensors never.
    assert outcomes.count(SnapshotOutcome.OK) <= 2


@pytest.mark.parametrize("name", ["manifest.json", "kv.safetensors"])
@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_truncated_files_are_found_and_cleared_away(
    make_store: Callable[..., SnapshotStore], name: str, keep: int
) -> None:
    store = make_store()
    store.write(record(), image())
    path = folder_of(store) / name
    path.write_bytes(path.read_bytes()[:keep])
    assert read(store, record())[0] == SnapshotOutcome.DAMAGED
    assert read(store, record())[0] == SnapshotOutcome.MISSING
    assert store.write(record(), image()) == read(store, record())[0] == SnapshotOutcome.OK


def test_an_edited_manifest_is_found_even_when_it_is_well_formed(make_store: Callable[..., SnapshotStore]) -> None:
    store = make_store()
    store.write(record(), image())
    path = folder_of(store) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"pin":"automatic"', b'"pin":"hard"'))
    assert store.scan() == []
    assert read(store, record())[0] == SnapshotOutcome.DAMAGED


def test_a_manifest_that_lies_about_its_tensors_is_found(make_store: Callable[..., SnapshotStore]) -> None:
    store = make_store()
    store.write(record(), image())
    path = folder_of(store) / "manifest.json"
    digests = Manifest.decode(path.read_bytes()).tensor_digests
    for wrong in (digests[:-1], [*digests[1:], digests[0]]):
        path.write_bytes(Manifest(IDENTITY, record(), wrong).encode())
        assert read(store, record())[0] == SnapshotOutcome.DAMAGED
        store.write(record(), image())


@pytest.mark.parametrize("name", ["manifest.json", "kv.safetensors"])
def test_links_and_pipes_are_not_followed(make_store: Callable[..., SnapshotStore], name: str, tmp_path: Path) -> None:
    store = make_store()
    store.write(record(), image())
    path = folder_of(store) / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert read(store, record())[0] == SnapshotOutcome.ERROR
    path.unlink()
    os.mkfifo(path)
    assert read(store, record())[0] == SnapshotOutcome.ERROR


def test_half_written_snapshots_are_not_seen_and_are_cleared_away(make_store: Callable[..., SnapshotStore]) -> None:
    store = make_store()
    store.write(record(), image())
    broken_off = store.folder / ".tmp-0123"
    broken_off.mkdir()
    (broken_off / "kv.safetensors").write_bytes(b"half")
    going_on = store.folder / ".tmp-4567"
    going_on.mkdir()
    held = files.lock(going_on)
    assert held is not None
    try:
        assert store.scan() == [record()]
        assert not broken_off.exists() and going_on.exists(), "a write that goes on is another server's"
    finally:
        os.close(held)


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdir", "open"])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_write_that_fails_leaves_nothing_and_breaks_nothing(
    make_store: Callable[..., SnapshotStore], monkeypatch: pytest.MonkeyPatch, call: str, after: int
) -> None:
    store = make_store()
    store.write(record("sp-old"), image())
    real = getattr(os, call)
    calls = 0

    def fail(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        outcome = store.write(record(), image())
    # Where it fails after the name was given, the snapshot is whole all the same.
    assert outcome == (SnapshotOutcome.OK if calls <= after else SnapshotOutcome.ERROR)
    known = {r.prompt_id for r in store.scan()}
    assert known in ({"sp-old"}, {"sp-old", "sp-a"})
    assert not [p for p in store.folder.iterdir() if p.name.startswith(".")]
    assert read(store, record("sp-old"))[0] == SnapshotOutcome.OK
    assert store.write(record(), image()) == read(store, record())[0] == SnapshotOutcome.OK


def test_a_full_disk_is_one_line_in_the_log(
    make_store: Callable[..., SnapshotStore], caplog: pytest.LogCaptureFixture, propagated: None
) -> None:
    store = make_store()
    store.write(record("sp-old"), image())
    # The kernel refuses to let this process write a file past 700 bytes: a disk that is full in mid-file.
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        assert store.write(record(), image()) == SnapshotOutcome.ERROR
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "No snapshot of sp-a" in caplog.text
    assert [r.prompt_id for r in store.scan()] == ["sp-old"]


def test_a_folder_that_others_may_enter_or_nobody_can_make_is_not_used(
    make_store: Callable[..., SnapshotStore], tmp_path: Path, caplog: pytest.LogCaptureFixture, propagated: None
) -> None:
    store = make_store()
    store.folder.mkdir(mode=0o755)
    assert store.scan() == [] and store.write(record(), image()) == SnapshotOutcome.ERROR
    assert "mode 0700" in caplog.text
    store.folder.rmdir()
    store.folder.write_text("a file is in the way")
    assert store.scan() == [] and store.write(record(), image()) == SnapshotOutcome.ERROR
    assert read(store, record())[0] == SnapshotOutcome.ERROR


def test_the_longest_unused_go_first_and_an_operators_last(make_store: Callable[..., SnapshotStore]) -> None:
    make_store().write(record("sp-1"), image())
    size = sum(file.stat().st_size for file in folder_of(make_store()).iterdir())
    store = make_store(max_bytes=4 * size + 100)
    for i, name in enumerate(("sp-hard", "sp-1", "sp-2", "sp-3")):
        store.write(record(name, pin="hard" if name == "sp-hard" else "soft"), image())
        os.utime(store.folder / store._name(name) / "manifest.json", (1000 + i, 1000 + i))
    assert read(store, record("sp-1"))[0] == SnapshotOutcome.OK, "a use"
    assert store.write(record("sp-4"), image()) == SnapshotOutcome.OK
    assert {r.prompt_id for r in store.scan()} == {"sp-hard", "sp-1", "sp-3", "sp-4"}
    assert store.write(record("sp-5"), image()) == SnapshotOutcome.OK
    assert {r.prompt_id for r in make_store().scan()} == {"sp-hard", "sp-1", "sp-4", "sp-5"}
    total = sum(f.stat().st_size for p in store.folder.iterdir() for f in p.iterdir())
    assert total <= store.max_bytes


def test_snapshots_of_other_setups_count_and_go_too(make_store: Callable[..., SnapshotStore]) -> None:
    make_store(weights="before").write(record(), image())
    store = make_store(max_bytes=SIZE + 3000)
    assert store.write(record(), image()) == SnapshotOutcome.OK
    assert len(list(store.folder.iterdir())) == 1


def test_a_prompt_larger_than_the_bound_is_left_out_and_displaces_nothing(
    make_store: Callable[..., SnapshotStore],
) -> None:
    store = make_store(max_bytes=SIZE + 3000)
    store.write(record(), image())
    long = msgspec.structs.replace(record("sp-b"), token_ids=list(range(5000)))
    assert store.write(long, image()) == SnapshotOutcome.TOO_LARGE
    assert [r.prompt_id for r in store.scan()] == ["sp-a"]

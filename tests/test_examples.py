"""Each file of `examples/` runs as its first lines say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What the last line of its output tells when the example has shown what it is about.
SAYS = {
    "chat.py": r"([1-9]\d*) of \d+ prompt tokens were not computed",
    "pin_prompts.py": r"Released",
    "offline.py": r"([1-9]\d*) tokens read",
    "anthropic_messages.py": r"read ([1-9]\d*)",
}


def cases() -> list[object]:
    # A process that loads torch and starts an engine takes its time.
    slow = {"offline.py": [pytest.mark.nightly]}
    return [pytest.param(path, id=path.name, marks=slow.get(path.name, [])) for path in EXAMPLES]


@pytest.mark.parametrize("example", cases())
def test_the_example_runs(request, example):
    if example.name == "offline.py":
        argument = str(request.getfixturevalue("tiny_model_dir"))
    else:
        argument = request.getfixturevalue("server").url
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(example), argument]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert re.search(SAYS[example.name], done.stdout.strip().splitlines()[-1]), done.stdout

"""Which room of the entrypoints may use which: dialects → chat → http, and no dialect another one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "vllm" / "entrypoints"
MAY_USE: dict[str, set[str]] = {
    "http": set(),
    "chat": {"http"},
    "openai": {"chat", "http"},
    "responses": {"chat", "http"},
    "anthropic": {"chat", "http"},
    "web": {"http"},
    "args": {"chat"},
    "cli": {"args", "llm"},
}
# They are started by these names, and put all rooms together.
PROGRAMS = {"openai/api_server.py", "openai/run_batch.py", "cli/serve.py", "cli/run_batch.py", "cli/bench.py"}


def rooms_used_by(path: Path) -> set[str]:
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports by a relative name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        used |= {name.split(".")[2] for name in names if name.startswith("vllm.entrypoints.")}
    return used


@pytest.mark.parametrize("room", MAY_USE)
def test_a_room_uses_only_those_below_it(room: str) -> None:
    files = [path for path in (ROOT / room).rglob("*.py") if str(path.relative_to(ROOT)) not in PROGRAMS]
    assert files
    wrong = {str(path.relative_to(ROOT)): rooms_used_by(path) - MAY_USE[room] - {room} for path in files}
    assert not {path: used for path, used in wrong.items() if used}


def test_every_room_is_known_and_says_what_it_is_for() -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms == MAY_USE.keys()
    assert all(ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text())) for room in rooms)

"""Imports run downward only: which room may know of which, and that nothing goes round in a circle.

Read from the sources, so that imports inside functions and for type checkers count too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent / "vllm"

# Values that every room may use, and that use each other only.
VALUES = {
    "child_process",
    "config",
    "envs",
    "exceptions",
    "inputs",
    "logger",
    "outputs",
    "sampling_params",
    "token_ids",
    "version",
    "wire",
}
# Room → the rooms that it may import besides VALUES and itself.
BENEATH: dict[str, set[str]] = {
    "install_check": set(),
    "platforms": set(),
    "transformers_utils": set(),
    "distributed": set(),
    "ops": {"platforms"},
    "kv_cache": {"ops", "platforms"},
    "system_prompt_store": set(),
    "step": {"system_prompt_store"},
    "structured_output": {"transformers_utils"},
    "sequence": {"step", "structured_output"},
    "attention": {"kv_cache", "ops", "platforms"},
    "model_executor": {"attention", "distributed", "kv_cache", "ops", "platforms", "step", "transformers_utils"},
    "worker": {
        "attention",
        "distributed",
        "kv_cache",
        "model_executor",
        "ops",
        "platforms",
        "step",
        "system_prompt_store",
    },
    "executor": {"distributed", "kv_cache", "step", "system_prompt_store", "transformers_utils", "worker"},
    "core": {"kv_cache", "sequence", "step", "system_prompt_store"},
    "engine": {
        "attention",
        "core",
        "executor",
        "kv_cache",
        "platforms",
        "sequence",
        "step",
        "structured_output",
        "system_prompt_store",
        "transformers_utils",
        "worker",
    },
    "benchmarks": {"engine", "transformers_utils"},
    "entrypoints": {
        "benchmarks",
        "engine",
        "platforms",
        "step",
        "structured_output",
        "transformers_utils",
    },
}
# The package's own front hands on what it is imported for.
FRONT = {"engine", "entrypoints", "install_check"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Modules of this package that are imported anywhere in a tree, by full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "vllm")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            module = node.module or ""
            if module.split(".")[0] == "vllm":
                for alias in node.names:
                    name = f"{module}.{alias.name}"
                    yield name if name in MODULES else module


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def test_imports_run_downward() -> None:
    wrong = []
    for module, path in MODULES.items():
        own = room(module)
        allowed = VALUES if own in VALUES else VALUES | {own} | (BENEATH[own] if own else FRONT)
        imported = imports_of(ast.parse(path.read_text(encoding="utf-8")))
        wrong += [f"{module} imports {name}" for name in imported if room(name) not in allowed]
    assert not wrong


def test_the_order_of_rooms_is_an_order() -> None:
    list(TopologicalSorter(BENEATH).static_order())


def test_no_module_imports_itself_by_way_of_others() -> None:
    # What only type checkers read may name a class of the same room that uses this one.
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if for_type_checkers(node):
                node.body = []  # type: ignore[attr-defined]
        # A package's front imports its modules; that they import the package too is no circle.
        graph[module] = {name for name in imports_of(tree) if name in MODULES and name != "vllm"}
    list(TopologicalSorter(graph).static_order())


def test_only_platforms_ask_which_device() -> None:
    question = re.compile(r"\.is_cuda\b|device\.type *[!=]=|cuda\.is_available|get_device_capability")
    for module, path in MODULES.items():
        if room(module) != "platforms":
            found = question.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{module} asks {found.group()}"  # type: ignore[union-attr]

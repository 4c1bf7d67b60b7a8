"""What the processes of one server, and those that start them, agree on."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping


def child_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables of a process that finds the modules which this one finds, with `more` of its own."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **(more or {})}


def end_with_parent() -> None:
    """Has this process end when standard input ends: the parent is gone, however it went."""
    threading.Thread(target=_watch, name="parent-watch", daemon=True).start()


def _watch() -> None:
    # Not by sys.stdin, whose lock the interpreter wants when it ends with an error.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)

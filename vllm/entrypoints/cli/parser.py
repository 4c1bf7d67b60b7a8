"""Argument parser of all entry points."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vllm.exceptions import StartupError, VLLMValidationError

_SHORT = {
    "-dp": "--data-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-q": "--quantization",
    "-tp": "--tensor-parallel-size",
}


class FlexibleArgumentParser(argparse.ArgumentParser):
    """Takes `--a_b` for `--a-b`, the short names of `_SHORT`, no abbreviations, and says what is wrong in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    # argparse declares three overloads, of which only the plain one is used here.
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parses; exits with status 1 and one line when an action refuses its value with `StartupError`."""
        argv = list(sys.argv[1:] if args is None else args)
        try:
            return super().parse_args([_normalised(arg) for arg in argv], namespace)
        except (StartupError, VLLMValidationError) as exc:
            self.exit(1, f"error: {exc}\n")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _normalised(arg: str) -> str:
    if not arg.startswith("--"):
        return _SHORT.get(arg, arg)
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value

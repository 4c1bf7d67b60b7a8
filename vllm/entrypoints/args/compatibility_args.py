"""Flags of other servers that this one has no use for, or names otherwise: accepted with a warning, or refused."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from vllm.engine.foreign_args import (
    ANYWAY_SWITCHES,
    NO_EFFECT_LISTS,
    NO_EFFECT_SWITCHES,
    NO_EFFECT_VALUES,
    UNSUPPORTED_SWITCHES,
    UNSUPPORTED_VALUES,
    refuse_unless_allowed,
)
from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.logger import init_logger

logger = init_logger(__name__)


def add_compatibility_args(parser: FlexibleArgumentParser) -> None:
    """Adds the flags of this module, hidden from the list of flags."""
    accepted = sorted(NO_EFFECT_SWITCHES + NO_EFFECT_VALUES + NO_EFFECT_LISTS)
    refused = [f"--{name}" for name in UNSUPPORTED_SWITCHES]
    refused += [f"--{n} other than {' or '.join(v)}" if v else f"--{n}" for n, v in UNSUPPORTED_VALUES.items()]
    # They are many and do nothing: --help names them in two sentences instead of a line each.
    group = parser.add_argument_group(
        "flags of other servers",
        f"Accepted without effect: {', '.join(f'--{name}' for name in accepted)}. "
        f"Refused: {', '.join(sorted(refused))}.",
    )
    hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    for name in ANYWAY_SWITCHES:
        help_text = "what this server does anyway"
        group.add_argument(f"--{name}", action=_Anyway, nargs=0, default=argparse.SUPPRESS, help=help_text)
        group.add_argument(f"--no-{name}", action=_NoEffect, nargs=0, **hidden)
    for name in NO_EFFECT_SWITCHES:
        group.add_argument(f"--{name}", f"--no-{name}", action=_NoEffect, nargs=0, **hidden)
    for name in NO_EFFECT_VALUES:
        group.add_argument(f"--{name}", action=_NoEffect, **hidden)
    for name in NO_EFFECT_LISTS:
        group.add_argument(f"--{name}", action=_NoEffect, nargs="*", **hidden)
    older = ("--disable-log-requests", "--no-disable-log-requests")
    group.add_argument(*older, action=_LogRequests, nargs=0, dest="enable_log_requests", **hidden)
    for name in UNSUPPORTED_SWITCHES:
        group.add_argument(f"--{name}", action=_Unsupported, nargs=0, **hidden)
        group.add_argument(f"--no-{name}", action=_NoEffect, nargs=0, **hidden)
    for name, allowed in UNSUPPORTED_VALUES.items():
        group.add_argument(f"--{name}", action=_Unsupported, allowed=allowed, **hidden)


class _Anyway(argparse.Action):
    """Accepts a flag that asks for what happens anyway."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        return


class _NoEffect(argparse.Action):
    """Accepts a flag and warns."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        logger.warning("%s has no effect in this server.", option)


class _LogRequests(argparse.Action):
    """Older spellings of --enable-log-requests."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        enable = option is not None and option.startswith("--no-")
        setattr(namespace, self.dest, enable)
        logger.warning("%s is an older spelling of --%senable-log-requests.", option, "" if enable else "no-")


class _Unsupported(argparse.Action):
    """Refuses a flag unless its value asks for what happens anyway."""

    def __init__(self, option_strings: Sequence[str], dest: str, allowed: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self._allowed = allowed

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        refuse_unless_allowed(option or "", values if isinstance(values, str) else None, self._allowed)

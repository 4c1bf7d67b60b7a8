"""Logging: one line a message, on stderr, at the level of `VLLM_LOGGING_LEVEL`."""

import logging
import sys

from vllm import envs

_ROOT = "vllm"


def _configure() -> None:
    root = logging.getLogger(_ROOT)
    if root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s", "%m-%d %H:%M:%S"))
    root.addHandler(handler)
    level = logging.getLevelNamesMapping().get(envs.logging_level())
    root.setLevel(logging.INFO if level is None else level)
    root.propagate = False
    if level is None:
        root.warning("VLLM_LOGGING_LEVEL is %s, which is no level; it takes INFO.", envs.logging_level())


def init_logger(name: str) -> logging.Logger:
    """Returns the logger of a module (`init_logger(__name__)`)."""
    _configure()
    return logging.getLogger(name)

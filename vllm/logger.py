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
    root.setLevel(getattr(logging, envs.logging_level(), logging.INFO))
    root.propagate = False


def init_logger(name: str) -> logging.Logger:
    """Returns the logger of a module (`init_logger(__name__)`)."""
    _configure()
    return logging.getLogger(name)

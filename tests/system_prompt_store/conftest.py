from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def propagated() -> Iterator[None]:
    """Lets `caplog` see the messages of this package, which otherwise end at its own handler."""
    root = logging.getLogger("vllm")
    root.propagate = True
    yield
    root.propagate = False

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.helpers import make_engine
from vllm.engine.llm_engine import LLMEngine
from vllm.platforms.cpu import CpuPlatform


@pytest.fixture
def make_tiny(tiny_model_dir: Path) -> Iterator[Callable[..., LLMEngine]]:
    """`make_tiny(**flags)` returns an engine of the tiny model, shut down after the test."""
    engines: list[LLMEngine] = []

    def make(**args: Any) -> LLMEngine:
        engines.append(make_engine(tiny_model_dir, **args))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


@pytest.fixture(params=[1, 2], ids=["one_step_in_flight", "two_steps_in_flight"])
def pipeline_depth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The test runs as on a device that needs the host, and as on one where the next step is planned meanwhile."""
    monkeypatch.setattr(CpuPlatform, "pipeline_depth", request.param)
    return request.param

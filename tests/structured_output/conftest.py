from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.helpers import make_engine
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.llm_engine import LLMEngine
from vllm.platforms.cpu import CpuPlatform
from vllm.structured_output.compiler import ConstraintCompiler


@pytest.fixture(scope="session")
def compiler(tiny_model_dir: Path) -> Iterator[ConstraintCompiler]:
    """A compiler for the tiny model's vocabulary; it takes seconds to start, so all tests share it."""
    made = ConstraintCompiler(EngineArgs(model=str(tiny_model_dir)).create_engine_config().model)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def make_tiny(tiny_model_dir: Path, compiler: ConstraintCompiler) -> Iterator[Callable[..., LLMEngine]]:
    """`make_tiny(**flags)` returns an engine of the tiny model, the same one for the same flags."""
    engines: dict[tuple[tuple[str, Any], ...], LLMEngine] = {}

    def make(**args: Any) -> LLMEngine:
        key = tuple(sorted(args.items()))
        if key not in engines:
            engines[key] = make_engine(tiny_model_dir, **args)
            engines[key]._compiler = compiler
        return engines[key]

    yield make
    for engine in engines.values():
        engine.core.shutdown()


@pytest.fixture(params=[1, 2], ids=["one_step_in_flight", "two_steps_in_flight"])
def pipeline_depth(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The test runs as on a device that needs the host, and as on one where the next step is planned meanwhile."""
    monkeypatch.setattr(CpuPlatform, "pipeline_depth", request.param)
    return request.param

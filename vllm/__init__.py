"""A drop-in for vLLM's server and Python API whose system prompts stay pinned in the KV cache.

Importing the package is cheap: what it exports is loaded when it is first asked for.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from vllm.install_check import check_installation
from vllm.version import __version__

# Read once, when torch loads its threading library. Threads that spin while they wait take the processor from whoever
# they wait for, as soon as anything else runs on the machine: with two busy neighbours on 2 cores, a decode step of the
# default model took 737 ms with the library's default and 55 ms with this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Large tensors go into large pages where the system lets them: decoding reads all weights in every step, and looking up
# small pages costs up to a tenth of it.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.engine.async_llm_engine import AsyncLLMEngine
    from vllm.engine.llm_engine import LLMEngine
    from vllm.entrypoints.llm import LLM
    from vllm.inputs import PromptType, TextPrompt, TokensPrompt
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLMEngine",
    "CompletionOutput",
    "EngineArgs",
    "LLMEngine",
    "PromptType",
    "RequestOutput",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]

_HOME = {
    "LLM": "vllm.entrypoints.llm",
    "AsyncEngineArgs": "vllm.engine.arg_utils",
    "AsyncLLMEngine": "vllm.engine.async_llm_engine",
    "CompletionOutput": "vllm.outputs",
    "EngineArgs": "vllm.engine.arg_utils",
    "LLMEngine": "vllm.engine.llm_engine",
    "PromptType": "vllm.inputs",
    "RequestOutput": "vllm.outputs",
    "SamplingParams": "vllm.sampling_params",
    "TextPrompt": "vllm.inputs",
    "TokensPrompt": "vllm.inputs",
}

check_installation()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

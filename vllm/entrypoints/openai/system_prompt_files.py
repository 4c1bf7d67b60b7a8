"""`--system-prompt-file`: system prompts that are pinned before the server answers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.chat.prompts import PromptReader
from vllm.entrypoints.http.body_limits import MAX_BODY_BYTES
from vllm.entrypoints.http.errors import ApiError
from vllm.entrypoints.http.json_body import parse_json_object, parse_model
from vllm.entrypoints.openai.protocol import SystemPromptRequest
from vllm.entrypoints.openai.system_prompts import ServingSystemPrompts
from vllm.exceptions import StartupError, VLLMValidationError
from vllm.logger import init_logger

logger = init_logger(__name__)


class SystemPromptFile(NamedTuple):
    path: Path
    request: SystemPromptRequest


def read_system_prompt_file(path: Path) -> SystemPromptFile:
    """Reads a file: a `.json` one holds what `POST /v1/system_prompts` takes, any other one a system message's text.

    Raises:
        StartupError: it cannot be read, or holds something else.
    """
    try:
        data = path.read_bytes()
        if len(data) > MAX_BODY_BYTES:
            raise StartupError(f"--system-prompt-file {path} has more than {MAX_BODY_BYTES // 2**20} MiB.")
        if path.suffix == ".json":
            request = parse_model(SystemPromptRequest, parse_json_object(data))
        else:
            # The newline that ends a text file is none of the prompt's.
            text = data.decode().removesuffix("\n")
            request = SystemPromptRequest(messages=[{"role": "system", "content": text}])
    except OSError as error:
        raise StartupError(f"--system-prompt-file {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise StartupError(f"--system-prompt-file {path} must be UTF-8 text.") from None
    except ApiError as error:
        raise StartupError(f"--system-prompt-file {path}: {error.message}") from None
    if request.name is None:
        request.name = path.stem
    return SystemPromptFile(path, request)


async def preload(engine: AsyncLLMEngine, prompts: PromptReader, files: list[SystemPromptFile]) -> None:
    """Pins the prompts of files, one after the other.

    Raises:
        StartupError: one of them cannot be pinned.
    """
    serving = ServingSystemPrompts(engine, prompts)
    for path, request in files:
        started = time.perf_counter()
        try:
            info = await serving.pin(request, source="preload")
        except VLLMValidationError as error:
            raise StartupError(f"--system-prompt-file {path}: {error}") from None
        seconds = time.perf_counter() - started
        logger.info("Pinned %s: %d tokens as %s in %.1f s.", path, info.num_tokens, info.id, seconds)

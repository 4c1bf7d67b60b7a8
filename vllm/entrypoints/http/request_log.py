"""The log of requests and of what was answered, for operators who ask for it."""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TypeVar

from vllm.logger import init_logger
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import BeamSearchParams, SamplingParams

logger = init_logger(__name__)

_S = TypeVar("_S", str, Sequence[int])

# Grammars and lists of tokens can be as long as a body.
_MAX_PARAMS_CHARS = 4096


@dataclass
class _Streamed:
    """What an output has told so far, as much as the log shows."""

    text: str = ""
    token_ids: Sequence[int] = field(default_factory=list)


class RequestLog:
    """A line for each request: its id and parameters. As in vLLM, its prompt is a line at level DEBUG.

    What users wrote is shown as a Python literal or with what cannot be printed escaped, so that it stays in its line.

    Args:
        max_len: Most characters of a text and most ids of a list of tokens that are shown; None for all.
        outputs: Log what was generated too; the token ids at level DEBUG.
        deltas: Log each piece of a stream, besides the whole at its end.
    """

    def __init__(self, max_len: int | None = None, outputs: bool = False, deltas: bool = True) -> None:
        self._max_len = max_len
        self._outputs = outputs
        self._deltas = deltas
        if not logger.isEnabledFor(logging.DEBUG):
            logger.info("Requests are logged without their prompts, which VLLM_LOGGING_LEVEL=DEBUG shows.")

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> RequestLog | None:
        """What the flags of `cli_args` ask for; None for no log."""
        if not args.enable_log_requests:
            return None
        return cls(args.max_log_len, args.enable_log_outputs, args.enable_log_deltas)

    def follow(
        self,
        request_id: str,
        text: str | None,
        token_ids: list[int],
        params: SamplingParams | BeamSearchParams,
        outputs: AsyncGenerator[RequestOutput, None],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Logs a request that has come, and returns its outputs, which are logged as they pass.

        Args:
            text: The prompt, if it was text.
        """
        name = _printable(request_id)
        shown = repr(params)
        if len(shown) > _MAX_PARAMS_CHARS:
            shown = f"{shown[:_MAX_PARAMS_CHARS]}…"
        logger.info("Received request %s: params: %s.", name, shown)
        if logger.isEnabledFor(logging.DEBUG):
            prompt = None if text is None else self._cut(text)
            logger.debug("Request %s: prompt: %r, prompt_token_ids: %s.", name, prompt, self._cut(token_ids))
        return self._follow(name, outputs)

    async def _follow(
        self, name: str, outputs: AsyncGenerator[RequestOutput, None]
    ) -> AsyncGenerator[RequestOutput, None]:
        streamed: dict[int, _Streamed] = {}
        finished = False
        try:
            async with aclosing(outputs) as items:
                async for item in items:
                    finished = item.finished
                    if self._outputs:
                        for output in item.outputs:
                            self._log_output(name, output, streamed)
                    yield item
        except (asyncio.CancelledError, GeneratorExit):
            if not finished:
                logger.info("Request %s aborted.", name)
            raise
        except Exception as error:
            logger.info("Request %s failed: %r", name, str(error))
            raise

    def _log_output(self, name: str, output: CompletionOutput, streamed: dict[int, _Streamed]) -> None:
        if output.index not in streamed and output.finish_reason is not None:
            self._log_generated(name, "", output, output.text, output.token_ids)
            return
        so_far = streamed.setdefault(output.index, _Streamed())
        so_far.text = self._cut(so_far.text + output.text)
        if logger.isEnabledFor(logging.DEBUG):
            so_far.token_ids = self._cut([*so_far.token_ids, *output.token_ids])
        if self._deltas:
            self._log_generated(name, " (streaming delta)", output, output.text, output.token_ids)
        if output.finish_reason is not None:
            self._log_generated(name, " (streaming complete)", output, so_far.text, so_far.token_ids)

    def _log_generated(
        self, name: str, kind: str, output: CompletionOutput, text: str, token_ids: Sequence[int]
    ) -> None:
        reason = output.finish_reason
        logger.info(
            "Generated response %s%s: index: %d, output: %r, finish_reason: %s",
            *(name, kind, output.index, self._cut(text), reason),
        )
        if logger.isEnabledFor(logging.DEBUG):
            shown = list(self._cut(token_ids))
            logger.debug("Generated response %s%s: index: %d, output_token_ids: %s", name, kind, output.index, shown)

    def _cut(self, value: _S) -> _S:
        return value[: self._max_len]


def _printable(text: str) -> str:
    """A text with what would leave its line escaped."""
    return text if text.isprintable() else ascii(text)[1:-1]

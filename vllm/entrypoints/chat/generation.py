"""The ways in which a request can have its outputs made: drawn, the best of several drawn, or by beam search."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.engine.input_processor import CheckedParams, ProcessedPrompt
from vllm.entrypoints.chat.beam_search import beam_params, beam_search
from vllm.entrypoints.chat.request import GenerationRequest
from vllm.entrypoints.chat.sampling import num_choices
from vllm.entrypoints.http.request_log import RequestLog
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import BeamSearchParams, SamplingParams


def generate(
    engine: AsyncLLMEngine,
    request: GenerationRequest,
    prompt: list[int] | ProcessedPrompt,
    params: CheckedParams,
    request_id: str,
    *,
    log: RequestLog | None = None,
    text: str | None = None,
    **options: Any,
) -> AsyncGenerator[RequestOutput, None]:
    """Outputs of a request, numbered from 0 to n - 1. Closing the iterator early ends all that runs for it.

    Args:
        prompt: What `AsyncLLMEngine.own_prompt` made, or a client's token ids.
        params: With as many outputs as are to compete.
        log: Is told of the request.
        text: The prompt, if it was text.
        **options: As of `AsyncLLMEngine.generate`.

    Raises:
        VLLMValidationError: a value is not allowed with beam search.
    """
    n = num_choices(request)
    token_ids = prompt.token_ids if isinstance(prompt, ProcessedPrompt) else prompt
    asked: SamplingParams | BeamSearchParams = params.asked
    if request.use_beam_search:
        asked = searched = beam_params(engine, request, params)
        outputs = beam_search(engine, prompt, token_ids, params.sampling, searched, n, request_id, options)
    else:
        outputs = engine.generate(prompt, params, request_id, **options)
        if params.sampling.n != n:
            outputs = _best(outputs, n)
    return outputs if log is None else log.follow(request_id, text, token_ids, asked, outputs)


async def _best(outputs: AsyncGenerator[RequestOutput, None], n: int) -> AsyncGenerator[RequestOutput, None]:
    """The n outputs with the highest log-probability per token, as OpenAI defines `best_of`."""
    async with aclosing(outputs) as items:
        async for item in items:
            ranked = sorted(item.outputs, key=_mean_logprob, reverse=True)
            item.num_discarded_tokens = sum(len(output.token_ids) for output in ranked[n:])
            item.outputs = [replace(output, index=index) for index, output in enumerate(ranked[:n])]
            yield item


def _mean_logprob(output: CompletionOutput) -> float:
    return (output.cumulative_logprob or 0.0) / max(1, len(output.token_ids))

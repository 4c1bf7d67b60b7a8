"""The ways in which a request can have its outputs made: drawn, the best of several drawn, or by beam search."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import islice
from typing import Any

from vllm.beam_search import BeamSearch, BeamSearchSequence, check_beam_width
from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.engine.input_processor import CheckedParams, ProcessedPrompt
from vllm.entrypoints.chat.sampling import num_choices
from vllm.entrypoints.http.request_log import RequestLog
from vllm.entrypoints.openai.protocol import GenerationRequest
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm.token_ids import token_array


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
        asked = beam_params = _beam_params(engine, request, params)
        outputs = _beam_search(engine, token_ids, params.sampling, beam_params, n, request_id, options)
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


def _beam_params(engine: AsyncLLMEngine, request: GenerationRequest, checked: CheckedParams) -> BeamSearchParams:
    config = engine.vllm_config.model
    params, form = checked.sampling, checked.asked.structured_outputs
    if form is not None:
        field = form.field
        raise VLLMValidationError(f"{field} cannot be combined with use_beam_search.", field)
    check_beam_width("n" if request.best_of is None else "best_of", params.n, config.max_logprobs)
    max_tokens = config.max_model_len if params.max_tokens is None else params.max_tokens
    return BeamSearchParams(
        beam_width=params.n,
        max_tokens=max_tokens,
        ignore_eos=params.ignore_eos,
        length_penalty=1.0 if request.length_penalty is None else request.length_penalty,
        include_stop_str_in_output=params.include_stop_str_in_output,
        skip_special_tokens=params.skip_special_tokens,
        stop=params.stop_strings,
        stop_token_ids=params.stop_token_ids or [],
        min_tokens=min(params.min_tokens, max_tokens),
    )


async def _beam_search(
    engine: AsyncLLMEngine,
    token_ids: list[int],
    params: SamplingParams,
    beam_params: BeamSearchParams,
    n: int,
    request_id: str,
    options: dict[str, Any],
) -> AsyncGenerator[RequestOutput, None]:
    """One item with the n best outputs, the best first. Each step is an engine request a sequence, but whoever counts
    and orders requests sees one, which came when the search began."""
    if params.truncate_prompt_tokens is not None:
        token_ids = engine.input_processor.truncate(token_ids, params)
        options = options | {"num_system_tokens": None, "marks": ()}
    search = BeamSearch(engine.vllm_config.model, engine.tokenizer, token_ids, beam_params)
    counted = params.clone()
    counted.n, counted.max_tokens = n, search.max_tokens
    first: RequestOutput | None = None
    prompts: list[list[int] | ProcessedPrompt] = [token_ids]
    with engine.count_search(token_ids, counted) as count:
        options |= {"arrival_time": count.metrics.arrival_time}
        while search.active:
            step = search.step_params()
            step.logprobs = max(step.logprobs or 0, params.logprobs or 0)
            step.prompt_logprobs = params.prompt_logprobs if first is None else None
            options |= {"search_step": search.num_steps}
            items = await _answers(
                [
                    engine.generate(prompt, step, f"{request_id}-{search.num_steps}-{i}", **options)
                    for i, prompt in enumerate(prompts)
                ]
            )
            if first is None:
                first, checked = items[0], token_array(token_ids)
                count.on_first_step(first)
            search.advance([item.outputs[0] for item in items])
            prompts = [
                ProcessedPrompt(tokens, checked + token_array(tokens[len(token_ids) :]), None)
                for tokens in (sequence.tokens for sequence in search.active)
            ]
        if first is None:
            raise RuntimeError(f"the search for {request_id} took no step")
        outputs = [
            _output(index, sequence, search.output_text(sequence), len(token_ids), params)
            for index, sequence in enumerate(search.best()[:n])
        ]
        count.finish(outputs)
    yield replace(first, request_id=request_id, outputs=outputs)


def _output(
    index: int, sequence: BeamSearchSequence, text: str, num_prompt_tokens: int, params: SamplingParams
) -> CompletionOutput:
    token_ids = sequence.tokens[num_prompt_tokens:]
    logprobs = None
    if params.logprobs is not None:
        pairs = zip(token_ids, sequence.logprobs, strict=True)
        logprobs = [_shown(token_id, row, params.logprobs) for token_id, row in pairs]
    # As from vLLM, an end token shows only where stop strings are to show.
    if isinstance(sequence.stop_reason, int) and not params.include_stop_str_in_output:
        token_ids.pop()
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=token_ids,
        cumulative_logprob=sequence.cum_logprob,
        logprobs=logprobs,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )


def _shown(token_id: int, row: TokenLogprobs, top: int) -> TokenLogprobs:
    """The chosen token, then the `top` most likely ones."""
    return {token_id: row[token_id]} | dict(islice(row.items(), top))


async def _answers(streams: Sequence[AsyncGenerator[RequestOutput, None]]) -> list[RequestOutput]:
    """The one item of each stream; when one fails or the caller leaves, all are closed."""

    async def only(stream: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
        async with aclosing(stream):
            return await anext(stream)

    tasks = [asyncio.create_task(only(stream)) for stream in streams]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""Outputs of a request by beam search: what it may ask for, and what it is answered."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from itertools import islice
from typing import Any

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.engine.beam_search import BeamSearch, BeamSearchSequence, check_beam_width
from vllm.engine.input_processor import CheckedParams, ProcessedPrompt
from vllm.engine.search_state import Search
from vllm.entrypoints.chat.request import GenerationRequest
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from vllm.sampling_params import BeamSearchParams, SamplingParams


def beam_params(engine: AsyncLLMEngine, request: GenerationRequest, checked: CheckedParams) -> BeamSearchParams:
    """What a request asks of a beam search.

    Raises:
        VLLMValidationError: a value is not allowed with it.
    """
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


def beam_search(
    engine: AsyncLLMEngine,
    prompt: list[int] | ProcessedPrompt,
    token_ids: list[int],
    params: SamplingParams,
    searched: BeamSearchParams,
    n: int,
    request_id: str,
    options: dict[str, Any],
) -> AsyncGenerator[RequestOutput, None]:
    """One item with the n best outputs, the best first."""
    if params.truncate_prompt_tokens is not None:
        prompt = token_ids = engine.input_processor.truncate(token_ids, params)
        options = options | {"num_system_tokens": None, "marks": ()}

    def outputs(beams: BeamSearch) -> list[CompletionOutput]:
        return [
            _output(index, sequence, beams.output_text(sequence), len(token_ids), params)
            for index, sequence in enumerate(beams.best()[:n])
        ]

    beams = BeamSearch(engine.vllm_config.model, engine.tokenizer, token_ids, searched)
    asked = params.clone()
    asked.n, asked.max_tokens = n, beams.max_tokens
    step = beams.sampling_params()
    step.logprobs = max(step.logprobs or 0, params.logprobs or 0)
    step.prompt_logprobs = params.prompt_logprobs
    return engine.generate(prompt, step, request_id, search=Search(beams, asked, outputs), **options)


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

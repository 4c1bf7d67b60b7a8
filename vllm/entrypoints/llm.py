"""Offline use: `LLM(model=…).generate(prompts)`, `.chat(messages)`."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, cast

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from vllm.engine.arg_utils import EngineArgs
from vllm.engine.beam_search import BeamSearch, BeamSearchOutput
from vllm.engine.llm_engine import LLMEngine
from vllm.engine.search_state import Search
from vllm.exceptions import VLLMValidationError
from vllm.inputs import PromptType, TokensPrompt
from vllm.outputs import RequestOutput, SystemPromptInfo
from vllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams, check_int

Messages = list[dict[str, Any]]


class LLM:
    """A model, loaded in this process, that answers batches of prompts.

    System prompts of chats are pinned as in the server: computed once, shared by every chat that starts with them.

    Args:
        model: Hugging Face directory, `.gguf` file or hub id; None takes the default model.
        **engine_args: Any engine flag, with underscores: `dtype="float32"`, `max_model_len=4096`, …

    Raises:
        StartupError: it cannot run on this machine with these arguments.
    """

    def __init__(self, model: str | None = None, **engine_args: Any) -> None:
        self.llm_engine = LLMEngine.from_engine_args(EngineArgs(model=model, **engine_args))
        self._request_ids = map(str, itertools.count())

    def get_tokenizer(self) -> PreTrainedTokenizerFast:
        return self.llm_engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """Sampling parameters that the checkpoint recommends."""
        return SamplingParams(**self.llm_engine.vllm_config.model.generation_defaults)  # type: ignore[arg-type]

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts; outputs come in the order of the prompts.

        Args:
            prompts: One prompt or many: text, token ids, or a dict with `prompt` or `prompt_token_ids`.
            sampling_params: One for all, or one a prompt; None takes the checkpoint's defaults.
            use_tqdm: Show progress on stderr.

        Raises:
            VLLMValidationError: a prompt or parameter is not allowed; nothing has run then.
        """
        many = _as_prompts(prompts)
        return self._run([(prompt, None) for prompt in many], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or many, each a list of messages `{"role": …, "content": …}`.

        Raises:
            VLLMValidationError: the chat template refuses a conversation, or a parameter is not allowed.
        """
        conversations = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        requests: list[tuple[PromptType, int | None]] = []
        for conversation in conversations:
            rendered = self.llm_engine.renderer.render(
                conversation,  # type: ignore[arg-type]
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                template_kwargs=chat_template_kwargs,
                chat_template=chat_template,
            )
            prompt = TokensPrompt(prompt_token_ids=rendered.prompt_token_ids, prompt=rendered.text)
            requests.append((prompt, rendered.num_system_tokens))
        return self._run(requests, sampling_params, use_tqdm)

    def beam_search(
        self,
        prompts: PromptType | Sequence[PromptType],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The most likely continuations of each prompt, as far as a beam search finds them.

        Each sequence's `tokens` and `text` hold the prompt too; an end token is the last of `tokens`.

        Args:
            prompts: As of `generate`.
            use_tqdm: Show on stderr how many prompts are done.
            concurrency_limit: Most prompts that are searched together; None for all.

        Raises:
            VLLMValidationError: a prompt or parameter is not allowed.
        """
        if concurrency_limit is not None:
            check_int("concurrency_limit", concurrency_limit, 1, 2**31 - 1)
        engine = self.llm_engine
        config = engine.vllm_config.model
        searches = [
            BeamSearch(config, engine.tokenizer, engine.input_processor.prompt(prompt).token_ids, params)
            for prompt in _as_prompts(prompts)
        ]
        waiting, running = deque(searches), set[str]()
        with tqdm(total=len(searches), desc="Beam searches", disable=not use_tqdm, dynamic_ncols=True) as progress:
            try:
                while waiting or running:
                    while waiting and (concurrency_limit is None or len(running) < concurrency_limit):
                        running.add(self._begin_search(waiting.popleft()))
                    for output in engine.step():
                        running.remove(output.request_id)
                        progress.update()
            except BaseException:
                engine.abort_request(running)
                raise
        for search in searches:
            for sequence in search.best():
                sequence.text = engine.tokenizer.decode(sequence.tokens, params.skip_special_tokens)
        return [BeamSearchOutput(search.best()) for search in searches]

    def _begin_search(self, beams: BeamSearch) -> str:
        params, request_id = beams.sampling_params(), next(self._request_ids)
        search = Search(beams, params, outputs=lambda _: [])
        self.llm_engine.add_request(request_id, beams.active[0].tokens, params, search=search)
        return request_id

    def add_system_prompt(
        self,
        prompt_or_ids: str | list[int] | list[dict],
        name: str | None = None,
        ttl: float | None = None,
        pin: Literal["hard", "soft"] = "hard",
    ) -> SystemPromptInfo:
        """Pins a system prompt and computes it now; see `LLMEngine.add_system_prompt`."""
        return self.llm_engine.add_system_prompt(prompt_or_ids, name, ttl, pin)

    def remove_system_prompt(self, prompt_id: str) -> SystemPromptInfo:
        """Ends a pin; see `LLMEngine.remove_system_prompt`."""
        return self.llm_engine.remove_system_prompt(prompt_id)

    def list_system_prompts(self) -> list[SystemPromptInfo]:
        return self.llm_engine.list_system_prompts()

    def _run(
        self,
        requests: list[tuple[PromptType, int | None]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            all_params = [sampling_params] * len(requests)
        else:
            all_params = list(sampling_params)
        if len(all_params) != len(requests):
            raise VLLMValidationError(
                f"{len(requests)} prompts came with {len(all_params)} sampling parameters; give one for all "
                "or one each.",
                "sampling_params",
            )
        ids: list[str] = []
        try:
            for (prompt, num_system_tokens), params in zip(requests, all_params, strict=True):
                final = params.clone()
                final.output_kind = RequestOutputKind.FINAL_ONLY
                request_id = next(self._request_ids)
                self.llm_engine.add_request(request_id, prompt, final, num_system_tokens=num_system_tokens)
                ids.append(request_id)
            outputs = self._finish(len(ids), use_tqdm)
        except BaseException:
            self.llm_engine.abort_request(ids)
            raise
        return [outputs[request_id] for request_id in ids]

    def _finish(self, count: int, use_tqdm: bool) -> dict[str, RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        tokens = 0
        with tqdm(total=count, desc="Requests", disable=not use_tqdm, dynamic_ncols=True) as progress:
            while self.llm_engine.has_unfinished_requests():
                for output in self.llm_engine.step():
                    outputs[output.request_id] = output
                    tokens += sum(len(o.token_ids) for o in output.outputs)
                    progress.update(1)
                    elapsed = progress.format_dict["elapsed"]
                    progress.set_postfix_str(f"{tokens / elapsed if elapsed else 0:.1f} output tokens/s")
        return outputs


def _as_prompts(prompts: PromptType | Sequence[PromptType]) -> list[PromptType]:
    """A single prompt (text, dict, or list of token ids) as a list of one."""
    if isinstance(prompts, str) or isinstance(prompts, dict) or (prompts and isinstance(prompts[0], int)):  # noqa: SIM101
        return [cast(PromptType, prompts)]
    return list(cast(Sequence[PromptType], prompts))

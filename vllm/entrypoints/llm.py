"""Offline use: `LLM(model=…).generate(prompts)`, `.chat(messages)`."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import msgspec
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

_TOKENIZATION = ("truncate_prompt_tokens", "truncation_side")
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
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts; outputs come in the order of the prompts.

        Args:
            prompts: One prompt or many: text, token ids, or a dict with `prompt` or `prompt_token_ids`.
            sampling_params: One for all, or one a prompt; None takes the checkpoint's defaults.
            use_tqdm: Show progress on stderr; or what is called in place of tqdm.
            lora_request: Must be None: there are no adapters.
            priority: One a prompt, smaller first, where the engine's `scheduling_policy` is "priority".
            tokenization_kwargs: `truncate_prompt_tokens` and `truncation_side`.

        Raises:
            VLLMValidationError: a prompt or parameter is not allowed; nothing has run then.
        """
        _refuse_adapters(lora_request)
        many = _as_prompts(prompts)
        chosen = self._sampling_params(sampling_params, len(many), tokenization_kwargs)
        return self._run([(prompt, None) for prompt in many], chosen, use_tqdm, priority)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: Any = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or many, each a list of messages `{"role": …, "content": …}`.

        Args:
            chat_template_content_format, mm_processor_kwargs: Without effect: the form of contents is found out from
                the template, and there are only texts.
            lora_request, priority, tokenization_kwargs, use_tqdm: As of `generate`.

        Raises:
            VLLMValidationError: the chat template refuses a conversation, or a parameter is not allowed.
        """
        _refuse_adapters(lora_request)
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
                add_special_tokens=add_special_tokens,
            )
            prompt = TokensPrompt(prompt_token_ids=rendered.prompt_token_ids, prompt=rendered.text)
            requests.append((prompt, rendered.num_system_tokens))
        chosen = self._sampling_params(sampling_params, len(requests), tokenization_kwargs)
        return self._run(requests, chosen, use_tqdm, priority)

    def reset_prefix_cache(self) -> bool:
        """Forgets what requests have in common after their system prompts; pinned prompts stay."""
        return self.llm_engine.reset_prefix_cache()

    def sleep(self, level: int = 1) -> None:
        """Pauses the engine, which here is idle between calls; level 1 also forgets cached suffixes. The memory of
        weights and KV cache stays reserved, which is what level 2 would give up."""
        if level not in (0, 1):
            raise VLLMValidationError(f"level must be 0 or 1, got {level!r:.64}.", "level")
        self.llm_engine.core.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Goes on after `sleep`; `tags` may name what to wake, all of which has stayed awake here."""
        self.llm_engine.core.wake_up()

    def start_profile(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: a profiler from outside, such as Nsight or py-spy, sees all of this process."""
        raise NotImplementedError("There is no profiler in this engine; run Nsight Systems or py-spy on the process.")

    stop_profile = start_profile

    def collective_rpc(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Raises NotImplementedError: ranks take plans of steps, and no code."""
        raise NotImplementedError("Ranks of this engine take no calls of code from outside.")

    apply_model = collective_rpc

    def encode(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Raises NotImplementedError: models of this engine write text."""
        raise NotImplementedError("The models of this engine write text; this call needs a pooling model.")

    embed = classify = score = reward = encode

    def beam_search(
        self,
        prompts: PromptType | Sequence[PromptType],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
        lora_request: Any = None,
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
        _refuse_adapters(lora_request)
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

    def _sampling_params(
        self,
        given: SamplingParams | Sequence[SamplingParams] | None,
        num_prompts: int,
        tokenization: dict[str, Any] | None,
    ) -> list[SamplingParams]:
        """The parameters of each prompt, its own copy."""
        if given is None:
            given = self.get_default_sampling_params()
        many = [given] * num_prompts if isinstance(given, SamplingParams) else list(given)
        if len(many) != num_prompts:
            raise VLLMValidationError(
                f"{num_prompts} prompts came with {len(many)} sampling parameters; give one for all or one each.",
                "sampling_params",
            )
        unknown = sorted((tokenization or {}).keys() - _TOKENIZATION)
        if unknown:
            raise VLLMValidationError(
                f"tokenization_kwargs may hold {' and '.join(_TOKENIZATION)}, got {unknown[0]!r:.64}.",
                "tokenization_kwargs",
            )
        changes = (tokenization or {}) | {"output_kind": RequestOutputKind.FINAL_ONLY}
        return [msgspec.structs.replace(params.clone(), **changes) for params in many]

    def _run(
        self,
        requests: list[tuple[PromptType, int | None]],
        all_params: list[SamplingParams],
        use_tqdm: bool | Callable[..., Any],
        priority: Sequence[int] | None,
    ) -> list[RequestOutput]:
        priorities = [0] * len(requests) if priority is None else list(priority)
        if len(priorities) != len(requests):
            raise VLLMValidationError(f"{len(requests)} prompts came with {len(priorities)} priorities.", "priority")
        if self.llm_engine.core.is_sleeping:
            raise VLLMValidationError("The engine sleeps; call wake_up() first.")
        ids: list[str] = []
        try:
            for (prompt, system), params, rank in zip(requests, all_params, priorities, strict=True):
                request_id = next(self._request_ids)
                self.llm_engine.add_request(request_id, prompt, params, num_system_tokens=system, priority=rank)
                ids.append(request_id)
            outputs = self._finish(len(ids), use_tqdm)
        except BaseException:
            self.llm_engine.abort_request(ids)
            raise
        return [outputs[request_id] for request_id in ids]

    def _finish(self, count: int, use_tqdm: bool | Callable[..., Any]) -> dict[str, RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        tokens = 0
        bar = use_tqdm if callable(use_tqdm) else tqdm
        with bar(total=count, desc="Requests", disable=not use_tqdm, dynamic_ncols=True) as progress:
            while self.llm_engine.has_unfinished_requests():
                for output in self.llm_engine.step():
                    outputs[output.request_id] = output
                    tokens += sum(len(o.token_ids) for o in output.outputs)
                    progress.update(1)
                    elapsed = progress.format_dict["elapsed"]
                    progress.set_postfix_str(f"{tokens / elapsed if elapsed else 0:.1f} output tokens/s")
        return outputs


def _refuse_adapters(lora_request: Any) -> None:
    if lora_request is not None:
        raise VLLMValidationError("lora_request must be None: this engine has no LoRA adapters.", "lora_request")


def _as_prompts(prompts: PromptType | Sequence[PromptType]) -> list[PromptType]:
    """A single prompt (text, dict, or list of token ids) as a list of one."""
    if isinstance(prompts, str) or isinstance(prompts, dict) or (prompts and isinstance(prompts[0], int)):  # noqa: SIM101
        return [cast(PromptType, prompts)]
    return list(cast(Sequence[PromptType], prompts))

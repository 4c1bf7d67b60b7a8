"""The engine inside the caller's own process: add requests, call `step()`, take outputs."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence

import msgspec
from transformers import PreTrainedTokenizerFast

from vllm.config import VllmConfig
from vllm.core.system_prompt_pool import Outcome, PromptState, SystemPromptRefusedError
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.calls import PinName, PinOptions, check_prompt_id
from vllm.engine.engine_core import EngineCore
from vllm.engine.input_processor import InputProcessor, check_sampling_params
from vllm.engine.output_processor import OutputProcessor
from vllm.engine.search_state import Search
from vllm.engine.varying_prompts import log_varying_prompts
from vllm.exceptions import StartupError, VLLMValidationError
from vllm.inputs import CacheMark, PromptType
from vllm.outputs import RequestOutput, SystemPromptInfo, SystemPromptPoolInfo
from vllm.sampling_params import SamplingParams
from vllm.structured_output.compiler import ConstraintCompiler
from vllm.transformers_utils.chat_template import ChatRenderer
from vllm.transformers_utils.tokenizer import Tokenizer, load_tokenizer


class LLMEngine:
    """Tokenizer, engine core and detokenizer, stepped by the caller.

    Args:
        config: What to run; `LLMEngine.from_engine_args` makes it from flags.
        tokenizer: Of the model, if it has been loaded.

    Raises:
        StartupError: it cannot run on this machine with these settings.
    """

    def __init__(self, config: VllmConfig, tokenizer: Tokenizer | None = None) -> None:
        self.vllm_config = config
        self.tokenizer = tokenizer or load_tokenizer(config.model.tokenizer_path, config.model.trust_remote_code)
        self.renderer = ChatRenderer(self.tokenizer, config.model.chat_template)
        self.input_processor = InputProcessor(config.model, self.tokenizer, self.renderer)
        self.core = EngineCore(config)
        self._processor = OutputProcessor(self.tokenizer)
        self._compiler = ConstraintCompiler(config.model)
        self._news: list[RequestOutput] = []
        self._errors: list[Exception] = []
        # What is loaded by now stays. A collection that looks at it all holds up a step by 150 ms, once in a while.
        gc.collect()
        gc.freeze()

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLMEngine:
        if args.data_parallel_size != 1:
            raise StartupError(
                f"data_parallel_size must be 1 where the engine runs in its caller's process, got "
                f"{args.data_parallel_size}; `vllm serve` starts several engines."
            )
        return cls(*args.resolve())

    def add_request(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams,
        *,
        num_system_tokens: int | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        marks: Sequence[CacheMark] = (),
        search: Search | None = None,
    ) -> None:
        """Takes in a request; its outputs come from `step()`.

        Args:
            num_system_tokens: Length of the system prompt at the head of the prompt, as `ChatRenderer.render` found it.
            cache_salt: Namespace; suffix KV is shared only within it.
            priority: Smaller runs first, where `--scheduling-policy` is `priority`; no effect otherwise.
            marks: Further prefixes to keep; each continues the one before it and shares its KV.
            search: The beam search that the request is, whose `sampling_params` are its own.

        Raises:
            VLLMValidationError: a value is not allowed.
        """
        check_sampling_params(params)
        wanted = params.structured_outputs
        request, processed = self.input_processor.request(
            request_id,
            prompt,
            params,
            constraint=None if wanted is None else self._compiler.compile(wanted).result(),
            num_system_tokens=num_system_tokens,
            cache_salt=cache_salt,
            priority=priority,
            marks=marks,
            is_search=search is not None,
        )
        try:
            self._processor.add(request, processed, self._deliver, search)
        except ValueError as error:
            raise VLLMValidationError(str(error), "request_id") from None
        self.core.add_request(request)

    def _deliver(self, news: RequestOutput | Exception) -> None:
        # What came of other requests in the same step must not be lost: `step` raises.
        if isinstance(news, Exception):
            self._errors.append(news)
        else:
            if news.finished:
                _list_logprobs(news)
            self._news.append(news)

    def abort_request(self, request_id: str | Iterable[str]) -> None:
        """Ends requests; nothing more comes of them."""
        for one in [request_id] if isinstance(request_id, str) else list(request_id):
            self._processor.drop(one)
            self.core.abort(one)

    def step(self) -> list[RequestOutput]:
        """Runs one step and returns what is new.

        Raises:
            VLLMValidationError: a request cannot be gone on with, and has ended; the others go on.
        """
        self._advance()
        if self._errors:
            raise self._errors.pop(0)
        news, self._news = self._news, []
        return news

    def _advance(self) -> None:
        news = self.core.step()
        orders = self._processor.process(news.outputs)
        for request_id, index in orders.aborts:
            self.core.abort(request_id, index)
        for fork in orders.forks:
            self.core.fork(fork.request_id, fork.beams)
        if news.stats is not None:
            log_varying_prompts(news.stats.varying_prompts, self.tokenizer)

    def has_unfinished_requests(self) -> bool:
        return bool(self._processor.requests) or bool(self._news) or bool(self._errors)

    def get_num_unfinished_requests(self) -> int:
        return len(self._processor.requests)

    def get_tokenizer(self) -> PreTrainedTokenizerFast:
        return self.tokenizer.hf

    def add_system_prompt(
        self,
        prompt_or_ids: str | list[int] | list[dict],
        name: str | None = None,
        ttl: float | None = None,
        pin: PinName = "hard",
    ) -> SystemPromptInfo:
        """Pins a system prompt and computes it now; running requests go on meanwhile.

        Args:
            prompt_or_ids: Token ids; text that prompts start with; or chat messages whose leading system messages are
                pinned as the chat template renders them.
            name: Shown in listings.
            ttl: Seconds after its last use when the pin ends; None keeps it.
            pin: `hard` stays; `soft` gives way to hard pins that need its room.

        Raises:
            VLLMValidationError: empty or too long, or an option is not allowed.
            SystemPromptRefusedError: the pool has no room for it.
        """
        options = PinOptions.checked(name, ttl, pin)
        token_ids = self.input_processor.system_prompt(prompt_or_ids)
        prompt = self.core.add_system_prompt(token_ids, **msgspec.structs.asdict(options))
        while not self.core.is_computed(prompt):
            self._advance()
        if prompt.state == PromptState.REMOVED:
            raise SystemPromptRefusedError(
                Outcome.BUSY, f"System prompt {prompt.id} could not be pinned: the KV cache has no room for it."
            )
        return self.core.pool.describe(prompt)

    def remove_system_prompt(self, prompt_id: str) -> SystemPromptInfo:
        """Ends a pin, at once or when its last reader has finished.

        Raises:
            VLLMValidationError: there is no such system prompt.
        """
        check_prompt_id(prompt_id)
        try:
            return self.core.pool.describe(self.core.remove_system_prompt(prompt_id))
        except KeyError:
            raise VLLMValidationError(f"There is no system prompt {prompt_id!r}.", "id") from None

    def list_system_prompts(self) -> list[SystemPromptInfo]:
        return [self.core.pool.describe(prompt) for prompt in self.core.list_system_prompts()]

    def system_prompt_pool(self) -> SystemPromptPoolInfo:
        """State and totals of the pool."""
        return self.core.pool.info()

    def reset_prefix_cache(self) -> bool:
        """Forgets cached suffix blocks; pinned prompts stay. Always succeeds, and says so."""
        self.core.reset_prefix_cache()
        return True

    def shutdown(self) -> None:
        self._compiler.shutdown()
        self.core.shutdown()


def _list_logprobs(output: RequestOutput) -> None:
    """Makes plain lists of log-probabilities, which is what Python callers expect of a whole output."""
    if output.prompt_logprobs is not None:
        output.prompt_logprobs = list(output.prompt_logprobs)
    for one in output.outputs:
        if one.logprobs is not None:
            one.logprobs = list(one.logprobs)

"""The engine process: an `EngineCore` that takes requests from a socket and sends tokens to another.

Started by `AsyncLLMEngine` as `python -m vllm.engine.core_process`, with its arguments as one JSON line on standard
input. Standard input stays open while the parent lives; its end means that nobody listens any more.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, NamedTuple, get_type_hints

import msgspec
import zmq

from vllm.child_process import end_with_parent
from vllm.config import ModelConfig
from vllm.core.system_prompt_pool import PinnedPrompt, PromptState, SystemPromptRefusedError
from vllm.engine.calls import PinOptions, PromptChanges
from vllm.engine.engine_core import EngineCore
from vllm.engine.messages import (
    AbortRequests,
    CoreProcessArgs,
    EngineInput,
    EngineOutput,
    EngineReady,
    EngineRequest,
    ForkSequences,
    StepOutputs,
    UtilityCall,
    UtilityResult,
)
from vllm.exceptions import StartupError, VLLMValidationError
from vllm.logger import init_logger
from vllm.transformers_utils.config import hf_config_of, weights_digest
from vllm.wire import from_wire

logger = init_logger(__name__)

# While idle, the loop wakes up so often to end pins whose time has come.
_IDLE_POLL_MS = 1000

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class _Method(NamedTuple):
    """A method that may be called from the other side.

    Attributes:
        arguments: Types of what comes after the id of the call.
    """

    run: Callable[..., Any]
    arguments: Any

    @classmethod
    def of(cls, run: Callable[..., Any]) -> _Method:
        hints = get_type_hints(run, include_extras=True)
        del hints["call_id"], hints["return"]
        return cls(run, tuple[tuple(hints.values())])  # type: ignore[misc]


class _Sender(msgspec.Struct):
    """Whoever is to be told that a message cannot be read."""

    request_id: str | None = None
    call_id: int | None = None


class CoreProcess:
    """The loop: take in what has arrived, step, send."""

    def __init__(self, core: EngineCore, inputs: zmq.Socket, outputs: zmq.Socket) -> None:
        self._core = core
        self._inputs = inputs
        self._outputs = outputs
        self._decoder = msgspec.msgpack.Decoder(EngineInput, dec_hook=from_wire)
        self._encoder = msgspec.msgpack.Encoder()
        self._refused: list[EngineOutput] = []
        self._results: list[UtilityResult] = []
        self._until_computed: list[tuple[int, PinnedPrompt]] = []
        methods = (
            self._add_system_prompt,
            self._update_system_prompt,
            self._remove_system_prompt,
            self._list_system_prompts,
            self._system_prompt_pool,
            self._set_system_prompt_budget,
            self._explain_request,
            self._reset_prefix_cache,
            self._sleep,
            self._wake_up,
            self._is_sleeping,
        )
        self._methods = {method.__name__.removeprefix("_"): _Method.of(method) for method in methods}

    def run(self) -> None:
        while True:
            self._receive(wait=not self._core.has_work())
            news = self._core.step()
            self._answer_computed()
            news.outputs += self._refused
            news.results, self._results, self._refused = self._results, [], []
            self.send(news)

    def send(self, message: StepOutputs) -> None:
        self._outputs.send(self._encoder.encode(message))

    def _receive(self, wait: bool) -> None:
        """Takes in every message that has arrived; waits for one if there is nothing else to do."""
        if wait:
            self._inputs.poll(_IDLE_POLL_MS)
        while self._inputs.poll(0):
            data = self._inputs.recv()
            try:
                message = self._decoder.decode(data)
            except msgspec.ValidationError as error:
                self._refuse(data, error)
                continue
            if isinstance(message, EngineRequest):
                self._core.add_request(message)
            elif isinstance(message, AbortRequests):
                for request_id, index in message.targets:
                    self._core.abort(request_id, index)
            elif isinstance(message, ForkSequences):
                self._core.fork(message.request_id, message.beams)
            else:
                self._call(message)

    def _refuse(self, data: bytes, error: msgspec.ValidationError) -> None:
        """Answers a message with a value of a wrong type, which only its sender is to suffer for."""
        sender = msgspec.msgpack.decode(data, type=_Sender)
        text = f"The engine cannot take this: {error}."
        if sender.request_id is not None:
            self._refused.append(EngineOutput(sender.request_id, 0, [], finish_reason="abort", error=text))
        elif sender.call_id is not None:
            self._results.append(UtilityResult(sender.call_id, error=text))
        else:
            raise error

    def _call(self, call: UtilityCall) -> None:
        """Runs a call. What its arguments are is the caller's to know, not the engine's end; any other error is ours,
        and the state that it leaves behind is not known."""
        try:
            method = self._methods.get(call.method)
            if method is None:
                raise VLLMValidationError(f"The engine has no method {call.method!r}.")
            try:
                arguments = msgspec.convert(call.args, method.arguments, dec_hook=from_wire)
            except msgspec.ValidationError as error:
                raise VLLMValidationError(f"The arguments of {call.method} are not valid: {error}.") from None
            result = method.run(call.call_id, *arguments)
        except (SystemPromptRefusedError, VLLMValidationError) as error:
            param = getattr(error, "param", None)
            self._results.append(UtilityResult(call.call_id, error=str(error), param=param))
            return
        if result is not None:
            self._results.append(UtilityResult(call.call_id, result=result))

    def _add_system_prompt(self, call_id: int, token_ids: list[TokenId], options: PinOptions) -> None:
        """Answered once the prompt is computed."""
        prompt = self._core.add_system_prompt(token_ids, **msgspec.structs.asdict(options))
        self._until_computed.append((call_id, prompt))

    def _answer_computed(self) -> None:
        waiting = []
        for call_id, prompt in self._until_computed:
            if not self._core.is_computed(prompt):
                waiting.append((call_id, prompt))
            elif prompt.state == PromptState.REMOVED:
                text = f"System prompt {prompt.id} could not be pinned: the KV cache has no room for it."
                self._results.append(UtilityResult(call_id, error=text))
            else:
                self._results.append(UtilityResult(call_id, result=self._described(prompt)))
        self._until_computed = waiting

    def _remove_system_prompt(self, call_id: int, prompt_id: str) -> dict[str, Any]:
        try:
            return self._described(self._core.remove_system_prompt(prompt_id))
        except KeyError:
            raise VLLMValidationError(f"There is no system prompt {prompt_id!r}.", "id") from None

    def _update_system_prompt(self, call_id: int, prompt_id: str, changes: PromptChanges) -> dict[str, Any]:
        try:
            return self._described(self._core.update_system_prompt(prompt_id, **changes.as_dict()))
        except KeyError:
            raise VLLMValidationError(f"There is no system prompt {prompt_id!r}.", "id") from None

    def _list_system_prompts(self, call_id: int) -> list[dict[str, Any]]:
        return [self._described(prompt) for prompt in self._core.list_system_prompts()]

    def _described(self, prompt: PinnedPrompt) -> dict[str, Any]:
        return asdict(self._core.pool.describe(prompt))

    def _system_prompt_pool(self, call_id: int) -> dict[str, Any]:
        return asdict(self._core.pool.info())

    def _set_system_prompt_budget(self, call_id: int, num_tokens: int) -> int:
        try:
            self._core.pool.set_budget(num_tokens)
        except ValueError as error:
            raise VLLMValidationError(str(error), "budget_tokens") from None
        return self._core.pool.budget_tokens

    def _explain_request(self, call_id: int, request: EngineRequest) -> dict[str, Any]:
        return self._core.explain_request(request)

    def _reset_prefix_cache(self, call_id: int) -> bool:
        self._core.reset_prefix_cache()
        return True

    def _sleep(self, call_id: int, level: int) -> bool:
        self._core.sleep(level)
        return True

    def _wake_up(self, call_id: int) -> bool:
        self._core.wake_up()
        return True

    def _is_sleeping(self, call_id: int) -> bool:
        return self._core.is_sleeping


def check_weights(model: ModelConfig) -> None:
    """Raises `StartupError` for weights that are not the ones of the configuration: what was computed with others, and
    is kept under their digest, must not be taken for theirs."""
    if weights_digest(model.model_path, model.quantization) != model.weights_digest:
        raise StartupError(f"The model in {model.model_path} has changed since the server was started; restart it.")


def main() -> None:
    args = CoreProcessArgs.read(sys.stdin.buffer.readline(), hf_config_of)
    end_with_parent()
    # The parent decides when to stop, so that it can let running requests finish. Ctrl-C reaches the whole group, and
    # so does what a supervisor or `timeout` sends.
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, signal.SIG_IGN)
    context = zmq.Context()
    outputs = context.socket(zmq.PUSH)
    outputs.connect(args.output_address)
    outputs.setsockopt(zmq.LINGER, 5000)
    inputs = context.socket(zmq.PULL)
    inputs.connect(args.input_address)
    try:
        check_weights(args.config.model)
        core = EngineCore(args.config)
    except StartupError as error:
        outputs.send(msgspec.msgpack.encode(EngineReady(error=str(error))))
        outputs.close()
        context.term()
        sys.exit(1)
    # What is loaded by now stays. A collection that looks at it all would hold up a step by 150 ms, once in a while.
    gc.collect()
    gc.freeze()
    ready = EngineReady(num_blocks=core.num_blocks, pool_budget_tokens=core.pool.budget_tokens)
    outputs.send(msgspec.msgpack.encode(ready))
    try:
        CoreProcess(core, inputs, outputs).run()
    except Exception:
        logger.exception("The engine process ends after an unexpected error.")
        time.sleep(0.1)
        os._exit(1)


if __name__ == "__main__":
    main()

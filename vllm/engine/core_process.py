"""The engine process: an `EngineCore` that takes requests from a socket and sends tokens to another.

Started by `AsyncLLMEngine` as `python -m vllm.engine.core_process`, with its arguments as one JSON line on standard
input. Standard input stays open while the parent lives; its end means that nobody listens any more.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import msgspec
import zmq

from vllm.core.system_prompt_pool import PinnedPrompt, PromptState, SystemPromptRefusedError
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.engine_core import EngineCore
from vllm.engine.messages import (
    AbortRequests,
    EngineInput,
    EngineReady,
    EngineRequest,
    StepOutputs,
    UtilityCall,
    UtilityResult,
    from_wire,
)
from vllm.exceptions import StartupError, VLLMValidationError
from vllm.logger import init_logger

logger = init_logger(__name__)

# While idle, the loop wakes up so often to end pins whose time has come.
_IDLE_POLL_MS = 1000


class CoreProcessArgs(msgspec.Struct):
    """What the parent hands over.

    Attributes:
        input_address / output_address: ZeroMQ endpoints, PULL and PUSH on this side.
    """

    engine_args: EngineArgs
    input_address: str
    output_address: str


class CoreProcess:
    """The loop: take in what has arrived, step, send."""

    def __init__(self, core: EngineCore, inputs: zmq.Socket, outputs: zmq.Socket) -> None:
        self._core = core
        self._inputs = inputs
        self._outputs = outputs
        self._decoder = msgspec.msgpack.Decoder(EngineInput, dec_hook=from_wire)
        self._encoder = msgspec.msgpack.Encoder()
        self._results: list[UtilityResult] = []
        self._until_computed: list[tuple[int, PinnedPrompt]] = []
        self._methods: dict[str, Callable[..., Any]] = {
            "add_system_prompt": self._add_system_prompt,
            "update_system_prompt": self._update_system_prompt,
            "remove_system_prompt": self._remove_system_prompt,
            "list_system_prompts": self._list_system_prompts,
            "system_prompt_pool": self._system_prompt_pool,
            "set_system_prompt_budget": self._set_system_prompt_budget,
            "explain_request": self._explain_request,
            "reset_prefix_cache": self._reset_prefix_cache,
            "sleep": self._sleep,
            "wake_up": self._wake_up,
            "is_sleeping": self._is_sleeping,
        }

    def run(self) -> None:
        while True:
            self._receive(wait=not self._core.has_work())
            news = self._core.step()
            self._answer_computed()
            news.results, self._results = self._results, []
            self.send(news)

    def send(self, message: StepOutputs) -> None:
        self._outputs.send(self._encoder.encode(message))

    def _receive(self, wait: bool) -> None:
        """Takes in every message that has arrived; waits for one if there is nothing else to do."""
        if wait:
            self._inputs.poll(_IDLE_POLL_MS)
        while self._inputs.poll(0):
            message = self._decoder.decode(self._inputs.recv())
            if isinstance(message, EngineRequest):
                self._core.add_request(message)
            elif isinstance(message, AbortRequests):
                for request_id, index in message.targets:
                    self._core.abort(request_id, index)
            else:
                self._call(message)

    def _call(self, call: UtilityCall) -> None:
        """Runs a call; what goes wrong in it is the caller's to know, not the engine's end."""
        try:
            result = self._methods[call.method](call.call_id, *call.args)
        except (SystemPromptRefusedError, VLLMValidationError) as error:
            param = getattr(error, "param", None)
            self._results.append(UtilityResult(call.call_id, error=str(error), param=param))
            return
        if result is not None:
            self._results.append(UtilityResult(call.call_id, result=result))

    def _add_system_prompt(self, call_id: int, token_ids: list[int], options: dict[str, Any]) -> None:
        """Answered once the prompt is computed."""
        self._until_computed.append((call_id, self._core.add_system_prompt(token_ids, **options)))

    def _answer_computed(self) -> None:
        waiting = []
        for call_id, prompt in self._until_computed:
            if not self._core.is_computed(prompt):
                waiting.append((call_id, prompt))
            elif prompt.state == PromptState.REMOVED:
                text = f"System prompt {prompt.id} could not be pinned: no contiguous room in the KV cache."
                self._results.append(UtilityResult(call_id, error=text))
            else:
                self._results.append(UtilityResult(call_id, result=self._described(prompt)))
        self._until_computed = waiting

    def _remove_system_prompt(self, call_id: int, prompt_id: str) -> dict[str, Any]:
        try:
            return self._described(self._core.remove_system_prompt(prompt_id))
        except KeyError:
            raise VLLMValidationError(f"There is no system prompt {prompt_id!r}.", "id") from None

    def _update_system_prompt(self, call_id: int, prompt_id: str, changes: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._described(self._core.update_system_prompt(prompt_id, **changes))
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

    def _explain_request(self, call_id: int, request: dict[str, Any]) -> dict[str, Any]:
        return self._core.explain_request(msgspec.convert(request, EngineRequest, dec_hook=from_wire))

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


def _end_with_parent() -> None:
    """Ends this process when standard input ends: the parent is gone, however it went."""
    # Not by sys.stdin, whose lock the interpreter wants when it ends with an error.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(0)


def main() -> None:
    args = msgspec.json.decode(sys.stdin.buffer.readline(), type=CoreProcessArgs)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
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
        core = EngineCore(args.engine_args.create_engine_config())
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

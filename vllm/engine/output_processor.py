"""From token ids to what the caller sees: text, stop strings, log-probabilities, timings."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from vllm.engine.input_processor import ProcessedPrompt
from vllm.engine.logprobs import LogprobRows, PromptLogprobs
from vllm.engine.messages import EngineOutput, EngineRequest
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprobs
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.transformers_utils.detokenizer import incremental_detokenizer
from vllm.transformers_utils.tokenizer import Tokenizer

logger = init_logger(__name__)


class OutputText:
    """Text of one output while it grows, cut at the first stop string.

    Attributes:
        text: All text so far; what may yet turn out to be part of a stop string included.
        stop_string: The stop string that was found, or None.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.text = ""
        self.stop_string: str | None = None
        self._params = params
        self._detokenizer = (
            incremental_detokenizer(tokenizer, prompt_token_ids, params.skip_special_tokens)
            if params.detokenize
            else None
        )
        self._stops = tuple(params.stop_strings)
        # So many characters at the end may be the beginning of a stop string that is to be cut off.
        self._held_back = 0
        if self._stops and not params.include_stop_str_in_output:
            self._held_back = max(map(len, self._stops)) - 1
        self._num_tokens = 0
        self._searched = 0
        self._sent = 0

    def append(self, token_id: int, is_stop_token: bool, is_last: bool) -> None:
        """Takes in a token.

        Args:
            is_stop_token: The token ended the output; its text shows only with `include_stop_str_in_output`.
            is_last: No token follows.
        """
        if self._detokenizer is None:
            return
        self._num_tokens += 1
        if not is_stop_token or self._params.include_stop_str_in_output:
            self.text += self._detokenizer.append(token_id)
        if is_last:
            self.text += self._detokenizer.flush()
        if self._stops and self._num_tokens > self._params.min_tokens and self._ends_in_stop():
            self._find_stop()
        self._searched = len(self.text)

    def end(self) -> None:
        """No token follows after all."""
        if self._detokenizer is not None:
            self.text += self._detokenizer.flush()

    def fork(self) -> OutputText:
        """A copy that goes on by itself."""
        twin = copy(self)
        twin._detokenizer = None if self._detokenizer is None else self._detokenizer.fork()
        return twin

    def _ends_in_stop(self) -> bool:
        """Whether a stop string ends in the text that is new. It hardly ever does, and this is the fast way to tell."""
        ends = range(self._searched + 1, len(self.text) + 1)
        return any(self.text.endswith(self._stops, 0, end) for end in ends)

    def _find_stop(self) -> None:
        found: tuple[int, str] | None = None
        for stop in self._stops:
            at = self.text.find(stop, max(0, self._searched - len(stop) + 1))
            if at >= 0 and (found is None or at < found[0]):
                found = (at, stop)
        if found is not None:
            at, self.stop_string = found
            self.text = self.text[: at + (len(self.stop_string) if self._params.include_stop_str_in_output else 0)]

    def take_delta(self, finished: bool) -> str:
        """Text that is certain and has not been taken."""
        end = len(self.text) if finished else max(self._sent, len(self.text) - self._held_back)
        delta = self.text[self._sent : end]
        self._sent = end
        return delta

    def visible(self, finished: bool) -> str:
        """All text that is certain."""
        return self.text if finished else self.text[: max(0, len(self.text) - self._held_back)]


@dataclass
class OutputState:
    """One of the `n` outputs of a request."""

    text: OutputText
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    last_token_time: float = 0.0
    num_taken: int = 0


class RequestState:
    """A request on its way: its outputs, its timings, and where its news go.

    Args:
        deliver: Called with each `RequestOutput`, or with the exception that ended the request.
        observer: Is told what happens to it.
    """

    def __init__(
        self,
        request: EngineRequest,
        prompt: ProcessedPrompt,
        tokenizer: Tokenizer,
        deliver: Callable[[RequestOutput | Exception], None],
        observer: RequestObserver,
    ) -> None:
        params = request.sampling_params
        self.request_id = request.request_id
        self.params = params
        self.prompt = prompt.text
        self.prompt_token_ids = prompt.token_ids
        self.deliver = deliver
        self.observer = observer
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)
        self.num_cached_tokens = 0
        self.num_cache_write_tokens = 0
        self.prompt_logprobs: PromptLogprobs | None = None
        self.outputs = [
            OutputState(
                text=OutputText(tokenizer, prompt.token_ids, params),
                logprobs=None if params.logprobs is None else [],
            )
            for _ in range(params.n)
        ]

    @property
    def finished(self) -> bool:
        return all(o.finish_reason is not None for o in self.outputs)

    def request_output(self, index: int, finished: bool) -> RequestOutput | None:
        """News after output `index` changed, in the shape the request asked for; `finished`: nothing follows them."""
        kind = self.params.output_kind
        if kind == RequestOutputKind.FINAL_ONLY and not finished:
            return None
        if kind == RequestOutputKind.DELTA:
            outputs = [self._delta(index)]
        else:
            outputs = [self._cumulative(i) for i in range(len(self.outputs))]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=outputs,
            finished=finished,
            prompt_logprobs=self.prompt_logprobs,
            metrics=self.metrics,
            num_cached_tokens=self.num_cached_tokens,
            num_cache_write_tokens=self.num_cache_write_tokens,
        )

    def _delta(self, index: int) -> CompletionOutput:
        out = self.outputs[index]
        first, out.num_taken = out.num_taken, len(out.token_ids)
        logprobs = None
        if out.logprobs is not None:
            # Those that have been handed over are not kept: they are many objects, and collections look at all of them.
            logprobs, out.logprobs = out.logprobs, []
        return CompletionOutput(
            index=index,
            text=out.text.take_delta(out.finish_reason is not None),
            token_ids=out.token_ids[first:],
            cumulative_logprob=None if out.logprobs is None else out.cumulative_logprob,
            logprobs=logprobs,
            finish_reason=out.finish_reason,
            stop_reason=out.stop_reason,
        )

    def _cumulative(self, index: int) -> CompletionOutput:
        out = self.outputs[index]
        return CompletionOutput(
            index=index,
            text=out.text.visible(out.finish_reason is not None),
            token_ids=list(out.token_ids),
            cumulative_logprob=None if out.logprobs is None else out.cumulative_logprob,
            logprobs=None if out.logprobs is None else list(out.logprobs),
            finish_reason=out.finish_reason,
            stop_reason=out.stop_reason,
        )


class ObservedOutput(Protocol):
    """What observers see of an output."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def finish_reason(self) -> str | None: ...


class ObservedRequest(Protocol):
    """What observers see of a request."""

    prompt_token_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    num_cached_tokens: int

    @property
    def outputs(self) -> Sequence[ObservedOutput]: ...


class RequestObserver:
    """What happens to requests, for metrics; the base class ignores it all. Times are seconds of `time.time()`."""

    def on_first_token(self, request: ObservedRequest, now: float) -> None:
        """A request got its first token; the prompt is computed."""

    def on_token(self, now: float, previous: float | None) -> None:
        """An output got a token at `now`; the one before it came at `previous` (None: it is the first)."""

    def on_tokens(self, count: int) -> None:
        """Outputs got so many tokens, which nobody saw come one by one."""

    def on_finish(self, request: ObservedRequest, now: float) -> None:
        """All outputs of a request ended, or it was cut off (their reason is then `abort` or `error`)."""


_UNOBSERVED = RequestObserver()


class SearchCount:
    """A search as observers see it: one request, though each of its steps is several to the engine.

    A context; a search that leaves it without `finish` was cut off, unless the request was refused.
    """

    def __init__(self, observer: RequestObserver, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self._observer = observer
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.metrics = RequestMetrics(arrival_time=time.time())
        self.num_cached_tokens = 0
        self.outputs: list[CompletionOutput] = []

    def on_first_step(self, answer: RequestOutput) -> None:
        """The prompt is computed, which `answer` goes on from."""
        now = time.time()
        self.num_cached_tokens = answer.num_cached_tokens
        self.metrics.first_token_time = now
        if answer.metrics is not None:
            self.metrics.first_scheduled_time = answer.metrics.first_scheduled_time
        self._observer.on_first_token(self, now)

    def finish(self, outputs: list[CompletionOutput]) -> None:
        """The search is over; `outputs` are given to whoever asked."""
        self._observer.on_tokens(sum(len(output.token_ids) for output in outputs))
        self._end(outputs)

    def _end(self, outputs: list[CompletionOutput]) -> None:
        self.outputs = outputs
        self.metrics.finished_time = self.metrics.last_token_time = now = time.time()
        self._observer.on_finish(self, now)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.metrics.finished_time is None and error is not None and not isinstance(error, VLLMValidationError):
            left = isinstance(error, asyncio.CancelledError | GeneratorExit)
            self._end([CompletionOutput(0, "", [], finish_reason="abort" if left else "error")])


class OutputProcessor:
    """All requests in flight, on the API's side of the engine.

    What goes wrong with one request's text, stop strings, log-probabilities or receiver ends that request. What an
    observer raises is raised: it concerns all of them.

    Attributes:
        requests: Those in flight by their ids.
        num_outputs: Outputs of them, `n` a request.
    """

    def __init__(self, tokenizer: Tokenizer, observer: RequestObserver | None = None) -> None:
        self.tokenizer = tokenizer
        self.observer = observer or RequestObserver()
        self.requests: dict[str, RequestState] = {}
        self.num_outputs = 0

    def add(
        self, request: EngineRequest, prompt: ProcessedPrompt, deliver: Callable[[RequestOutput | Exception], None]
    ) -> RequestState:
        """Registers a request before it goes to the engine core.

        Raises:
            ValueError: its id is in use.
        """
        if request.request_id in self.requests:
            raise ValueError(f"request id {request.request_id!r} is in use")
        observer = self.observer if request.search_step is None else _UNOBSERVED
        state = RequestState(request, prompt, self.tokenizer, deliver, observer)
        self.requests[request.request_id] = state
        self.num_outputs += len(state.outputs)
        return state

    def _remove(self, state: RequestState) -> None:
        del self.requests[state.request_id]
        self.num_outputs -= len(state.outputs)

    def drop(self, request_id: str) -> None:
        """Forgets a request that is aborted; later news of it are ignored."""
        state = self.requests.get(request_id)
        if state is not None:
            self._cut_off(state, "abort")

    def fail_all(self, error: Exception) -> None:
        """Ends every request with an error, whatever else goes wrong."""
        for state in list(self.requests.values()):
            try:
                self._fail(state, error)
            except Exception:
                logger.exception("The end of request %s could not be observed.", state.request_id)

    def _fail(self, state: RequestState, error: Exception) -> None:
        try:
            state.deliver(error)
        except Exception:
            logger.exception("Request %s could not be told of its end: %s", state.request_id, error)
        self._cut_off(state, "error")

    def _cut_off(self, state: RequestState, reason: str) -> None:
        self._remove(state)
        for out in state.outputs:
            out.finish_reason = out.finish_reason or reason
        state.observer.on_finish(state, time.time())

    def process(self, outputs: list[EngineOutput]) -> list[tuple[str, int | None]]:
        """Takes in a step's news and delivers them.

        Returns the outputs that ended here, by a stop string or an error, and that the engine core must be told to
        abort.
        """
        to_abort: list[tuple[str, int | None]] = []
        now = time.time()
        for news in outputs:
            state = self.requests.get(news.request_id)
            if state is None:
                continue
            if news.error is not None:
                blamed = news.param is not None
                self._fail(state, VLLMValidationError(news.error, news.param) if blamed else RuntimeError(news.error))
                continue
            out = state.outputs[news.index]
            if out.finish_reason is not None:
                continue
            try:
                count = self._take(state, out, news)
            except Exception as error:
                self._fail(state, _own_fault(state, error))
                to_abort.append((state.request_id, None))
                continue
            self._observe_tokens(state, out, count, now)
            if out.text.stop_string is not None and news.finish_reason is None:
                to_abort.append((state.request_id, news.index))
            finished = state.finished
            if finished:
                state.metrics.finished_time = now
            try:
                result = state.request_output(news.index, finished)
                if result is not None:
                    state.deliver(result)
            except Exception as error:
                self._fail(state, _own_fault(state, error))
                to_abort.append((state.request_id, None))
                continue
            if finished:
                self._remove(state)
                state.observer.on_finish(state, now)
        return to_abort

    def _take(self, state: RequestState, out: OutputState, news: EngineOutput) -> int:
        """Takes in the news of one output, up to a stop string; returns how many tokens these are."""
        if news.num_cached_tokens is not None and news.index == 0:
            state.num_cached_tokens = news.num_cached_tokens
            state.num_cache_write_tokens = news.num_cache_write_tokens
            state.metrics.first_scheduled_time = news.first_scheduled_time
        if news.prompt_logprobs is not None:
            state.prompt_logprobs = PromptLogprobs(news.prompt_logprobs, self.tokenizer)
        if news.logprobs is not None and out.logprobs is not None:
            rows = LogprobRows(news.logprobs, self.tokenizer)
            out.logprobs += map(rows.at, range(len(rows)))
            out.cumulative_logprob += sum(rows.chosen())
        last = len(news.new_token_ids) - 1
        for i, token_id in enumerate(news.new_token_ids):
            out.token_ids.append(token_id)
            ended = news.finish_reason is not None and i == last
            out.text.append(token_id, ended and news.finish_reason == "stop", ended)
            if out.text.stop_string is not None:
                out.finish_reason, out.stop_reason = "stop", out.text.stop_string
                return i + 1
        if news.finish_reason is not None:
            out.finish_reason, out.stop_reason = news.finish_reason, news.stop_reason
        return len(news.new_token_ids)

    def _observe_tokens(self, state: RequestState, out: OutputState, count: int, now: float) -> None:
        if not count:
            return
        if state.metrics.first_token_time is None:
            state.metrics.first_token_time = now
            state.observer.on_first_token(state, now)
        for _ in range(count):
            state.observer.on_token(now, out.last_token_time or None)
            state.metrics.last_token_time = out.last_token_time = now


def _own_fault(state: RequestState, error: Exception) -> RuntimeError:
    """What a request is told whose output we could not read or hand over."""
    told = RuntimeError(
        f"Request {state.request_id} has ended: its output could not be read ({type(error).__name__}: {error})."
    )
    told.__cause__ = error
    return told

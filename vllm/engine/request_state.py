"""A request on its way, on the API's side of the engine: its outputs, its timings, and where its news go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.engine.input_processor import ProcessedPrompt
from vllm.engine.logprobs import LogprobRows, PromptLogprobs
from vllm.engine.messages import EngineOutput, EngineRequest, ForkSequences
from vllm.engine.observer import ObservedOutput, RequestObserver
from vllm.engine.output_text import OutputText
from vllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.transformers_utils.tokenizer import Tokenizer

Receiver = Callable[[RequestOutput | Exception], None]
"""Is called with each `RequestOutput`, or with the exception that ended the request."""


class CoreOrders(NamedTuple):
    """What the engine core is to be told.

    Attributes:
        aborts: Outputs that have ended here: (request id, index or None for all).
        forks: Searches that go on.
    """

    aborts: list[tuple[str, int | None]]
    forks: list[ForkSequences]


class InFlight(ABC):
    """A request that the engine core works on. `OutputProcessor` hands it each piece of news in three calls: `take`,
    `observe`, `report`.

    Args:
        params: As observers see them.
        observer: Is told what happens to it.
    """

    def __init__(
        self,
        request: EngineRequest,
        prompt: ProcessedPrompt,
        params: SamplingParams,
        tokenizer: Tokenizer,
        deliver: Receiver,
        observer: RequestObserver,
    ) -> None:
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
        self.tokenizer = tokenizer

    @property
    @abstractmethod
    def outputs(self) -> Sequence[ObservedOutput]:
        """What there is so far."""

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """Sequences that it has in the engine at a time."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether nothing more comes."""

    @abstractmethod
    def take(self, news: EngineOutput, orders: CoreOrders) -> bool:
        """Takes in news, and adds to `orders` what follows from them; returns whether they were of any use."""

    @abstractmethod
    def observe(self, now: float) -> None:
        """Tells the observer of the news that were taken last."""

    @abstractmethod
    def report(self) -> RequestOutput | None:
        """What to deliver after the news that were taken last."""

    @abstractmethod
    def cut_off(self, reason: str) -> None:
        """Gives every output that has not ended this reason for its end."""

    def _take_first(self, news: EngineOutput) -> None:
        """Takes in what comes with the first token: what was cached, and the log-probabilities of the prompt."""
        if news.num_cached_tokens is not None and news.index == 0:
            self.num_cached_tokens = news.num_cached_tokens
            self.num_cache_write_tokens = news.num_cache_write_tokens
            self.metrics.first_scheduled_time = news.first_scheduled_time
        if news.prompt_logprobs is not None:
            self.prompt_logprobs = PromptLogprobs(news.prompt_logprobs, self.tokenizer)

    def _request_output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=outputs,
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs,
            metrics=self.metrics,
            num_cached_tokens=self.num_cached_tokens,
            num_cache_write_tokens=self.num_cache_write_tokens,
        )


@dataclass
class OutputState:
    """One of the `n` outputs of a request."""

    text: OutputText
    token_ids: list[int] = field(default_factory=list)
    logprobs: LogprobRows | None = None
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    last_token_time: float = 0.0
    num_taken: int = 0


class RequestState(InFlight):
    """A request whose tokens are drawn."""

    def __init__(
        self,
        request: EngineRequest,
        prompt: ProcessedPrompt,
        tokenizer: Tokenizer,
        deliver: Receiver,
        observer: RequestObserver,
    ) -> None:
        params = request.sampling_params
        super().__init__(request, prompt, params, tokenizer, deliver, observer)
        self._outputs = [
            OutputState(
                text=OutputText(tokenizer, prompt.token_ids, params),
                logprobs=None if params.logprobs is None else LogprobRows(tokenizer),
            )
            for _ in range(params.n)
        ]
        self._latest, self._count = 0, 0

    @property
    def outputs(self) -> list[OutputState]:
        return self._outputs

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    @property
    def finished(self) -> bool:
        return all(o.finish_reason is not None for o in self._outputs)

    def take(self, news: EngineOutput, orders: CoreOrders) -> bool:
        out = self._outputs[news.index]
        if out.finish_reason is not None:
            return False
        self._take_first(news)
        self._latest, self._count = news.index, self._take_tokens(out, news)
        if out.text.stop_string is not None and news.finish_reason is None:
            orders.aborts.append((self.request_id, news.index))
        return True

    def _take_tokens(self, out: OutputState, news: EngineOutput) -> int:
        """Takes in the tokens of one output, up to a stop string; returns how many these are."""
        if news.logprobs is not None and out.logprobs is not None:
            out.logprobs.append(news.logprobs)
            out.cumulative_logprob += sum(news.logprobs.chosen())
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

    def observe(self, now: float) -> None:
        out = self._outputs[self._latest]
        if not self._count:
            return
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = now
            self.observer.on_first_token(self, now)
        for _ in range(self._count):
            self.observer.on_token(now, out.last_token_time or None)
            self.metrics.last_token_time = out.last_token_time = now

    def report(self) -> RequestOutput | None:
        """News in the shape that the request asked for."""
        kind = self.params.output_kind
        if kind == RequestOutputKind.FINAL_ONLY and not self.finished:
            return None
        if kind == RequestOutputKind.DELTA:
            return self._request_output([self._delta(self._latest)])
        return self._request_output([self._cumulative(i) for i in range(len(self._outputs))])

    def cut_off(self, reason: str) -> None:
        for out in self._outputs:
            out.finish_reason = out.finish_reason or reason

    def _delta(self, index: int) -> CompletionOutput:
        out = self._outputs[index]
        first, out.num_taken = out.num_taken, len(out.token_ids)
        logprobs = None
        if out.logprobs is not None:
            logprobs, out.logprobs = out.logprobs, LogprobRows(self.tokenizer)
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
        out = self._outputs[index]
        return CompletionOutput(
            index=index,
            text=out.text.visible(out.finish_reason is not None),
            token_ids=list(out.token_ids),
            cumulative_logprob=None if out.logprobs is None else out.cumulative_logprob,
            logprobs=None if out.logprobs is None else out.logprobs.copy(),
            finish_reason=out.finish_reason,
            stop_reason=out.stop_reason,
        )

"""A beam search on its way, on the API's side of the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm.engine.beam_search import BeamSearch
from vllm.engine.input_processor import ProcessedPrompt
from vllm.engine.logprobs import LogprobRows
from vllm.engine.messages import EngineOutput, EngineRequest, ForkSequences
from vllm.engine.observer import ObservedOutput, RequestObserver
from vllm.engine.request_state import CoreOrders, InFlight, Receiver
from vllm.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from vllm.sampling_params import SamplingParams
from vllm.transformers_utils.tokenizer import Tokenizer


@dataclass(frozen=True)
class Search:
    """A beam search as a request.

    Attributes:
        beams: Chooses how the sequences go on.
        params: What was asked for, as observers see it.
        outputs: Makes the outputs that the caller gets when the search is over.
    """

    beams: BeamSearch
    params: SamplingParams
    outputs: Callable[[BeamSearch], list[CompletionOutput]]


class SearchState(InFlight):
    """Gathers the rows of a step, one for each beam, and lets the search choose the beams of the next step."""

    def __init__(
        self,
        request: EngineRequest,
        prompt: ProcessedPrompt,
        search: Search,
        tokenizer: Tokenizer,
        deliver: Receiver,
        observer: RequestObserver,
    ) -> None:
        super().__init__(request, prompt, search.params, tokenizer, deliver, observer)
        self._search = search
        self._rows: dict[int, TokenLogprobs] = {}
        self._outputs: list[CompletionOutput] = []

    @property
    def outputs(self) -> Sequence[ObservedOutput]:
        return self._outputs

    @property
    def num_outputs(self) -> int:
        return self._search.beams.params.beam_width

    @property
    def finished(self) -> bool:
        return not self._search.beams.active

    def take(self, news: EngineOutput, orders: CoreOrders) -> bool:
        self._take_first(news)
        if news.logprobs is None:
            raise RuntimeError("a step of a beam search has no log-probabilities")
        self._rows[news.index] = LogprobRows(self.tokenizer, news.logprobs).at(0)
        beams = self._search.beams
        if len(self._rows) < len(beams.active):
            return False
        rows, self._rows = [self._rows[i] for i in range(len(beams.active))], {}
        beams.advance(rows)
        if beams.active:
            chosen = [(origin, beam.tokens[-1]) for origin, beam in zip(beams.origins, beams.active, strict=True)]
            orders.forks.append(ForkSequences(self.request_id, chosen))
        else:
            orders.aborts.append((self.request_id, None))
            self._outputs = self._search.outputs(beams)
        return True

    def observe(self, now: float) -> None:
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = now
            self.observer.on_first_token(self, now)
        self.metrics.last_token_time = now
        if self.finished:
            self.observer.on_tokens(sum(len(output.token_ids) for output in self._outputs))

    def report(self) -> RequestOutput | None:
        return self._request_output(self._outputs) if self.finished else None

    def cut_off(self, reason: str) -> None:
        self._outputs = [CompletionOutput(0, "", [], finish_reason=reason)]

"""From token ids to what the caller sees: all requests in flight, on the API's side of the engine."""

from __future__ import annotations

import time

from vllm.engine.input_processor import ProcessedPrompt
from vllm.engine.messages import EngineOutput, EngineRequest
from vllm.engine.observer import RequestObserver
from vllm.engine.request_state import CoreOrders, InFlight, Receiver, RequestState
from vllm.engine.search_state import Search, SearchState
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.transformers_utils.tokenizer import Tokenizer

logger = init_logger(__name__)


class OutputProcessor:
    """Hands the news of the engine core to the requests that they belong to.

    What goes wrong with one request's text, stop strings, log-probabilities or receiver ends that request. What an
    observer raises is raised: it concerns all of them.

    Attributes:
        requests: Those in flight by their ids.
        num_outputs: Sequences that they have in the engine at a time.
    """

    def __init__(self, tokenizer: Tokenizer, observer: RequestObserver | None = None) -> None:
        self.tokenizer = tokenizer
        self.observer = observer or RequestObserver()
        self.requests: dict[str, InFlight] = {}
        self.num_outputs = 0

    def add(
        self, request: EngineRequest, prompt: ProcessedPrompt, deliver: Receiver, search: Search | None = None
    ) -> InFlight:
        """Registers a request before it goes to the engine core.

        Args:
            search: What decides how its sequences go on, if it is a beam search.

        Raises:
            ValueError: its id is in use.
        """
        if request.request_id in self.requests:
            raise ValueError(f"request id {request.request_id!r} is in use")
        state: InFlight
        if search is None:
            state = RequestState(request, prompt, self.tokenizer, deliver, self.observer)
        else:
            state = SearchState(request, prompt, search, self.tokenizer, deliver, self.observer)
        self.requests[request.request_id] = state
        self.num_outputs += state.num_outputs
        return state

    def _remove(self, state: InFlight) -> None:
        del self.requests[state.request_id]
        self.num_outputs -= state.num_outputs

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

    def _fail(self, state: InFlight, error: Exception) -> None:
        try:
            state.deliver(error)
        except Exception:
            logger.exception("Request %s could not be told of its end: %s", state.request_id, error)
        self._cut_off(state, "error")

    def _cut_off(self, state: InFlight, reason: str) -> None:
        self._remove(state)
        state.cut_off(reason)
        state.observer.on_finish(state, time.time())

    def process(self, outputs: list[EngineOutput]) -> CoreOrders:
        """Takes in a step's news and delivers them.

        Returns what the engine core must be told: which outputs ended here, by a stop string or an error, and how
        searches go on.
        """
        orders = CoreOrders([], [])
        now = time.time()
        for news in outputs:
            state = self.requests.get(news.request_id)
            if state is None:
                continue
            if news.error is not None:
                blamed = news.param is not None
                self._fail(state, VLLMValidationError(news.error, news.param) if blamed else RuntimeError(news.error))
                continue
            try:
                if not state.take(news, orders):
                    continue
            except Exception as error:
                self._fail_here(state, error, orders)
                continue
            state.observe(now)
            if state.finished:
                state.metrics.finished_time = now
            try:
                result = state.report()
                if result is not None:
                    state.deliver(result)
            except Exception as error:
                self._fail_here(state, error, orders)
                continue
            if state.finished:
                self._remove(state)
                state.observer.on_finish(state, now)
        return orders

    def _fail_here(self, state: InFlight, error: Exception, orders: CoreOrders) -> None:
        """Ends a request whose output could not be read or handed over."""
        told = RuntimeError(
            f"Request {state.request_id} has ended: its output could not be read ({type(error).__name__}: {error})."
        )
        told.__cause__ = error
        self._fail(state, told)
        orders.aborts.append((state.request_id, None))

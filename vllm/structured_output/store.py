"""Compiled constraints of the engine process."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from vllm.config import ModelConfig
from vllm.structured_output.constraint import CompiledConstraint
from vllm.transformers_utils.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import xgrammar

_MOST_BYTES = 64 * 2**20


class ConstraintStore:
    """Brings constraints into the form that is matched, in a thread, so that steps go on meanwhile.

    The vocabulary is read, and xgrammar imported, with the first one. The least recently used are forgotten; outputs
    that follow them keep them.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._info: xgrammar.TokenizerInfo | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="constraints")
        self._loaded: OrderedDict[bytes, tuple[int, Future[xgrammar.CompiledGrammar]]] = OrderedDict()
        self._num_bytes = 0

    def load(self, constraint: CompiledConstraint) -> Future[xgrammar.CompiledGrammar]:
        """The compiled grammar, at once if it is known."""
        if constraint.key in self._loaded:
            self._loaded.move_to_end(constraint.key)
            return self._loaded[constraint.key][1]
        future = self._thread.submit(self._load, constraint.data)
        self._loaded[constraint.key] = (len(constraint.data), future)
        self._num_bytes += len(constraint.data)
        while self._num_bytes > _MOST_BYTES and len(self._loaded) > 1:
            _, (size, _) = self._loaded.popitem(last=False)
            self._num_bytes -= size
        return future

    def _load(self, data: bytes) -> xgrammar.CompiledGrammar:
        import xgrammar

        from vllm.structured_output.vocabulary import tokenizer_info

        if self._info is None:
            tokenizer = load_tokenizer(self._config.tokenizer_path, self._config.trust_remote_code)
            self._info = tokenizer_info(tokenizer, self._config.vocab_size, self._config.eos_token_ids)
        return xgrammar.CompiledGrammar.deserialize_json(data.decode(), self._info)

    def shutdown(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

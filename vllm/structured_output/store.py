"""Compiled constraints of the engine process."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from vllm.config import ModelConfig
from vllm.structured_output.constraint import CompiledConstraint
from vllm.transformers_utils.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from vllm.structured_output.grammars import Grammar
    from vllm.structured_output.vocabulary import Vocabulary

_MOST_BYTES = 64 * 2**20


class ConstraintStore:
    """Brings constraints into the form that is matched, in a thread, so that steps go on meanwhile.

    The vocabulary is read, and the engines are imported, with the first one. The least recently used are forgotten;
    outputs that follow them keep them.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._vocabulary: Vocabulary | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="constraints")
        self._loaded: OrderedDict[bytes, tuple[int, Future[Grammar]]] = OrderedDict()
        self._num_bytes = 0

    def load(self, constraint: CompiledConstraint) -> Future[Grammar]:
        """The compiled grammar, at once if it is known."""
        if constraint.key in self._loaded:
            self._loaded.move_to_end(constraint.key)
            return self._loaded[constraint.key][1]
        future = self._thread.submit(self._load, constraint)
        self._loaded[constraint.key] = (len(constraint.data), future)
        self._num_bytes += len(constraint.data)
        while self._num_bytes > _MOST_BYTES and len(self._loaded) > 1:
            _, (size, _) = self._loaded.popitem(last=False)
            self._num_bytes -= size
        return future

    def _load(self, constraint: CompiledConstraint) -> Grammar:
        from vllm.structured_output.grammars import load_grammar
        from vllm.structured_output.vocabulary import Vocabulary

        if self._vocabulary is None:
            tokenizer = load_tokenizer(self._config.tokenizer_path, self._config.trust_remote_code)
            self._vocabulary = Vocabulary.of(tokenizer, self._config.vocab_size, self._config.eos_token_ids)
        return load_grammar(constraint.engine, constraint.data, self._vocabulary)

    def shutdown(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

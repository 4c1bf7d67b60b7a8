"""Compiled grammars of both engines, and one output on its way through one: the contract that matching rests on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

import numpy as np

from vllm.structured_output.vocabulary import Vocabulary

if TYPE_CHECKING:
    import llguidance
    import xgrammar

EngineName = Literal["guidance", "xgrammar"]


class Path(ABC):
    """One output on its way through a grammar."""

    @abstractmethod
    def fill(self, bitmask: np.ndarray, row: int) -> None:
        """Writes which tokens may come next. Other threads run meanwhile.

        Args:
            bitmask: int32 [rows, ceil(vocab_size / 32)], contiguous; bit i % 32 of word i // 32 stands for token i.

        Raises:
            RuntimeError: the grammar cannot be followed any further.
        """

    @abstractmethod
    def accept(self, token_id: int) -> bool:
        """Takes in a token; returns whether the grammar allows it.

        Raises:
            RuntimeError: the grammar cannot be followed any further.
        """

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """A stop token came where the grammar allows one."""


class Grammar(ABC):
    """A compiled grammar; any number of outputs follow it, in any thread."""

    @abstractmethod
    def start(self) -> Path:
        """The way of an output that has no token yet."""


def load_grammar(engine: EngineName, data: bytes, vocabulary: Vocabulary) -> Grammar:
    """Brings a serialised grammar into the form that is followed.

    Raises:
        ValueError: an engine does not take it.
    """
    return GuidanceGrammar(data.decode(), vocabulary) if engine == "guidance" else _load_xgrammar(data, vocabulary)


class GuidanceGrammar(Grammar):
    """A grammar of llguidance; its serialised form is its text.

    Raises:
        ValueError: it is malformed, or beyond the limits of llguidance's work.
    """

    def __init__(self, text: str, vocabulary: Vocabulary) -> None:
        import llguidance

        limits = llguidance.LLParserLimits(verbose_errors=False)
        self._start = llguidance.LLMatcher(vocabulary.for_llguidance, text, log_level=0, limits=limits)
        self._stops = frozenset(vocabulary.stop_token_ids)
        if self._start.is_error():
            raise ValueError(self._start.get_error().partition("\n  while processing")[0])

    def start(self) -> Path:
        return _GuidancePath(self._start.deep_copy(), self._stops)


class _GuidancePath(Path):
    def __init__(self, matcher: llguidance.LLMatcher, stops: frozenset[int]) -> None:
        self._matcher = matcher
        self._stops = stops
        self._is_over = False

    def fill(self, bitmask: np.ndarray, row: int) -> None:
        words = bitmask[row]
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            raise RuntimeError(_first_line(self._matcher.get_error()))

    def accept(self, token_id: int) -> bool:
        if token_id in self._stops:
            # A matcher that can take nothing else does not take these either.
            self._is_over = self._matcher.is_accepting()
            return self._is_over
        # An invalid token is an error of the matcher, as a limit is; trying first tells them apart.
        if not self._matcher.validate_tokens([token_id]):
            return False
        if not self._matcher.consume_token(token_id):
            raise RuntimeError(_first_line(self._matcher.get_error()))
        return True

    @property
    def is_over(self) -> bool:
        return self._is_over


class XgrammarGrammar(Grammar):
    """A grammar of xgrammar."""

    def __init__(self, compiled: xgrammar.CompiledGrammar) -> None:
        self.compiled = compiled

    def start(self) -> Path:
        return _XgrammarPath(self.compiled)


class _XgrammarPath(Path):
    def __init__(self, compiled: xgrammar.CompiledGrammar) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)

    def fill(self, bitmask: np.ndarray, row: int) -> None:
        self._matcher.fill_next_token_bitmask(bitmask, row)

    def accept(self, token_id: int) -> bool:
        return bool(self._matcher.accept_token(token_id))

    @property
    def is_over(self) -> bool:
        return bool(self._matcher.is_terminated())


def _load_xgrammar(data: bytes, vocabulary: Vocabulary) -> Grammar:
    import xgrammar

    return XgrammarGrammar(xgrammar.CompiledGrammar.deserialize_json(data.decode(), vocabulary.for_xgrammar))


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]

"""Grammars tried on whole texts with a vocabulary of bytes: a text is allowed if its bytes and then the end are."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from vllm.sampling_params import StructuredOutputsParams
from vllm.structured_output.constraint import constraint_source
from vllm.structured_output.grammars import load_grammar
from vllm.structured_output.matcher import TokenMatcher
from vllm.structured_output.messages import Backend
from vllm.structured_output.sources import Compiled, compile_source
from vllm.structured_output.vocabulary import Vocabulary

STOP = 256
VOCABULARY = Vocabulary([bytes([i]) for i in range(256)] + [b""], 257, [STOP])


def compiled(backend: Backend = "auto", **fields: Any) -> Compiled:
    """What a constraint is compiled to."""
    return compile_source(constraint_source(StructuredOutputsParams(**fields)), VOCABULARY, backend)


def allows(made: Compiled, text: str) -> bool:
    """Whether an output may be this text and no more, as the engine that loads the grammar follows it."""
    matcher = TokenMatcher(load_grammar(made.engine, made.data, VOCABULARY))
    bitmask = np.zeros((1, 9), np.int32)
    for token in [*text.encode(), STOP]:
        matcher.fill(bitmask, 0)
        assert matcher.error is None, matcher.error
        if not bitmask[0, token // 32] >> (token % 32) & 1:
            return False
        matcher.accept(token)
        assert matcher.error is None, matcher.error
    return matcher.ended


def allows_value(made: Compiled, value: Any) -> bool:
    return allows(made, json.dumps(value, ensure_ascii=False))

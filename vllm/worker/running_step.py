"""A step that a rank has started."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vllm.step import StepResult

Draw = Callable[[np.ndarray | None], Callable[[], StepResult]]
"""Draws the tokens of a step, given the masks of its masked entries, and returns a function that waits for them."""


class RunningStep:
    """The forward pass runs; the draw follows at once, or when the masks are there.

    Which tokens a grammar allows is known only when the token before has come back. The host finds out while the device
    computes the forward pass, which does not depend on it.

    Args:
        draw: Draws; called once.
        is_masked: The draw waits for `draw`.
        finish: Adds to the result what else the step has to tell.
    """

    def __init__(self, draw: Draw, is_masked: bool, finish: Callable[[StepResult], StepResult] | None = None) -> None:
        self._draw = draw
        self._finish = finish
        self._wait: Callable[[], StepResult] | None = None if is_masked else draw(None)

    @property
    def awaits_masks(self) -> bool:
        return self._wait is None

    def draw(self, token_masks: np.ndarray) -> None:
        """Draws the tokens of a step with masked entries; to be called before the next step is submitted.

        Args:
            token_masks: What may be drawn for each masked entry, in their order: bit i % 32 of word i // 32 allows
                token i; int32 [len(plan.masked), ceil(vocab_size / 32)].
        """
        self._wait = self._draw(token_masks)

    def wait(self) -> StepResult:
        """Waits for the tokens; called once.

        Raises:
            RuntimeError: `draw` has not been called.
        """
        if self._wait is None:
            raise RuntimeError("the masks of this step have not been given")
        result = self._wait()
        return result if self._finish is None else self._finish(result)

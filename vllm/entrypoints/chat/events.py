"""An answer as a stream of typed events: what the generation tells, and all that a dialect writes answers from.

The stream is one `PromptRead`, then a `Step` for each thing the engine tells of a choice, then one `AnswerEnd`. An
answer that comes at once is the same stream with one step a choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm.outputs import TokenLogprobs


class Usage(msgspec.Struct, frozen=True):
    """Counts of tokens.

    Attributes:
        cached: Prompt tokens whose KV was not computed for this request.
        written: Prompt tokens whose KV was computed for this request and is pinned from now on.
        completion: Generated tokens, those of outputs that are not shown included.
        reasoning: Those of them that are reasoning; None where it is not told apart, or not counted yet.
    """

    prompt: int
    cached: int
    written: int
    completion: int = 0
    reasoning: int | None = None

    def with_completion(self, completion: int, reasoning: int | None = None) -> Usage:
        return Usage(self.prompt, self.cached, self.written, completion, reasoning)


class Tokens(msgspec.Struct, frozen=True):
    """The tokens of a step; first among its events, since the text may come later or never.

    Attributes:
        logprobs: A row for each token, if log-probabilities were asked for.
    """

    ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] | None


class Reasoning(msgspec.Struct, frozen=True):
    """More of what the model thinks."""

    text: str


class Text(msgspec.Struct, frozen=True):
    """More of what the model says."""

    text: str


class CallBegun(msgspec.Struct, frozen=True):
    """A tool call begins; `index` counts the calls of a choice from 0."""

    index: int
    id: str
    name: str


class CallArguments(msgspec.Struct, frozen=True):
    """More of a call's arguments, JSON as the model writes it."""

    index: int
    text: str


class CallEnded(msgspec.Struct, frozen=True):
    """A call has all its arguments, or the answer ends within it."""

    index: int


class Finished(msgspec.Struct, frozen=True):
    """A choice is complete.

    Attributes:
        reason: `stop`, `length`, `tool_calls` (the model chose to call) or another reason of the engine's.
        stop_reason: The stop string or the id of the stop token that ended it; None for any other end.
    """

    reason: str
    stop_reason: int | str | None


PartEvent = Reasoning | Text | CallBegun | CallArguments | CallEnded
StepEvent = Tokens | PartEvent | Finished


class PromptRead(msgspec.Struct, frozen=True):
    """The prompt is computed; comes once, before all steps."""

    token_ids: list[int]
    usage: Usage


class Step(msgspec.Struct, frozen=True):
    """What is new in one choice.

    Attributes:
        events: In the order in which the model wrote it; may be empty.
        num_generated: Tokens of the choice so far.
    """

    choice: int
    events: Sequence[StepEvent]
    num_generated: int


class AnswerEnd(msgspec.Struct, frozen=True):
    """All choices are complete.

    Attributes:
        prompt_logprobs: A row for each token of the prompt (None for the first), if they were asked for.
    """

    usage: Usage
    prompt_logprobs: Sequence[TokenLogprobs | None] | None


AnswerEvent = PromptRead | Step | AnswerEnd

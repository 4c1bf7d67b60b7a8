"""Where an answer ends."""

from __future__ import annotations

from collections.abc import Iterable

from vllm.sequence import Sequence, SequenceStatus


class StopRules:
    """Ends of a form, stop tokens, and lengths.

    Args:
        max_model_len: Longest sequence.
        eos_token_ids: Tokens that end an answer.
    """

    def __init__(self, max_model_len: int, eos_token_ids: Iterable[int]) -> None:
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)

    def ends_by_length(self, seq: Sequence) -> bool:
        """Whether the last token that `seq` may have is drawn already, perhaps in flight."""
        most = seq.sampling_params.max_tokens or self._max_model_len
        return seq.num_output_tokens >= most or seq.num_tokens >= self._max_model_len

    def after(self, seq: Sequence, token: int) -> tuple[SequenceStatus | None, int | None]:
        """How `seq` has ended with `token`, its last one, and the token of `stop_token_ids` that has ended it; None
        where it goes on."""
        params = seq.sampling_params
        num_outputs = len(seq.token_ids) - seq.num_prompt_tokens
        # A form that is complete leaves nothing to say, whatever min_tokens and ignore_eos ask.
        if seq.matcher is not None and seq.matcher.ended:
            return SequenceStatus.FINISHED_STOPPED, None
        if num_outputs >= params.min_tokens:
            if token in self._eos_token_ids and not params.ignore_eos:
                return SequenceStatus.FINISHED_STOPPED, None
            if token in (params.stop_token_ids or ()):
                return SequenceStatus.FINISHED_STOPPED, token
        longest = self._max_model_len
        if num_outputs >= (params.max_tokens or longest) or len(seq.token_ids) >= longest:
            return SequenceStatus.FINISHED_LENGTH, None
        return None, None

    def token_ids(self, seq: Sequence) -> tuple[int, ...]:
        """Tokens that may not come before `min_tokens`."""
        if seq.is_system_prompt:
            return ()
        params = seq.sampling_params
        eos = () if params.ignore_eos else self._eos_token_ids
        return tuple({*eos, *(params.stop_token_ids or ())})

"""Heads that long prompts without a system part have in common."""

from __future__ import annotations

from collections import OrderedDict

from vllm.core.prefix_tree import common_prefix_len
from vllm.sequence import Sequence
from vllm.token_ids import TokenIds, token_array

# Raw prompts that begin with the same so many tokens are worth comparing; what is pinned of them is cut to a multiple
# of the step, so that users whose texts happen to begin alike do not move its end.
MIN_SHARED_TOKENS = 1024
_SHARED_STEP = 64
_MAX_HEADS = 256
_MAX_HEAD_TOKENS = 2_000_000


class SharedHeads:
    """Compares each long prompt with the latest one of its namespace that begins alike; what it keeps is bounded."""

    def __init__(self) -> None:
        self._heads: OrderedDict[tuple[bytes, int], TokenIds] = OrderedDict()
        self._num_tokens = 0

    def see(self, seq: Sequence) -> int:
        """Tokens that a prompt of more than `MIN_SHARED_TOKENS` shares with an earlier one; 0 if that is no head.

        A prompt that merely continues an earlier one is the next turn of a conversation, which the cache of suffixes
        serves; what they share is a head only if both go on differently after it.
        """
        key = (seq.namespace, hash(seq.token_ids[:MIN_SHARED_TOKENS].tobytes()))
        earlier = self._heads.pop(key, token_array([]))
        self._heads[key] = seq.token_ids[:]
        self._num_tokens += seq.num_prompt_tokens - len(earlier)
        while len(self._heads) > _MAX_HEADS or self._num_tokens > _MAX_HEAD_TOKENS:
            self._num_tokens -= len(self._heads.popitem(last=False)[1])
        same = common_prefix_len(seq.token_ids, earlier)
        if same < MIN_SHARED_TOKENS or same in (len(earlier), seq.num_prompt_tokens):
            return 0
        return same // _SHARED_STEP * _SHARED_STEP

"""What is known about the system parts of chats: the tokens that their prompts start with."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future

from vllm.transformers_utils.text_heads import TextHead

_MAX_PARTS = 1024
_MAX_BYTES = 128 << 20
_MAX_BYTES_OF_ONE = _MAX_BYTES // 16
"""Of an entry; a larger one would drive out many that others need."""
_BYTES_PER_TOKEN = 48
"""A number, and its places in two lists."""


class SystemPart:
    """Token ids that the prompts of a system part start with; none if there is no such part, or no certain end of it.

    Attributes:
        token_ids: Not to be changed.
        head: The head of their texts that need not be tokenised again.
    """

    __slots__ = ("_tail", "head", "token_ids")

    def __init__(self, token_ids: list[int], head: TextHead | None = None) -> None:
        self.token_ids = token_ids
        self.head = head
        self._tail = token_ids[len(head.token_ids) :] if head is not None else token_ids

    def size_in(self, ids: list[int], head: TextHead | None) -> int | None:
        """How many tokens of a prompt are its system part; None if it does not start with this one, or ends with it.

        Args:
            head: This part's head if `ids` are known to start with its tokens, which then need no look.
        """
        size = len(self.token_ids)
        if not 0 < size < len(ids):
            return None
        same = ids[:size] == self.token_ids if head is None else ids[len(head.token_ids) : size] == self._tail
        return size if same else None

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        text = sys.getsizeof(self.head.text) if self.head is not None else 0
        return len(self.token_ids) * _BYTES_PER_TOKEN + text


NO_PART = SystemPart([])


PartKey = tuple[Hashable, ...]


class SystemPartPending(Exception):
    """Another thread is finding out what is asked for.

    Attributes:
        key: What it is known by.
        part: Done when it is found out.
    """

    def __init__(self, key: PartKey, part: Future[SystemPart]) -> None:
        super().__init__("another thread is finding out this system part")
        self.key = key
        self.part = part


class SystemPartCache:
    """System parts by what they are known by; the least recently used go when there are too many, or too large ones."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: OrderedDict[PartKey, SystemPart] = OrderedDict()
        self._num_bytes = 0
        self._computing: dict[PartKey, Future[SystemPart]] = {}

    def get(
        self, key: PartKey, compute: Callable[[], SystemPart], awaited: Mapping[PartKey, SystemPart] | None = None
    ) -> SystemPart:
        """Returns the part; computes it once, however many threads ask for it at the same time.

        Args:
            awaited: Parts that the caller knows, if it cannot wait here for those that another thread computes.

        Raises:
            SystemPartPending: it is being computed, and `awaited` is given and lacks it.
        """
        if awaited is not None and key in awaited:
            return awaited[key]
        with self._lock:
            part = self._parts.get(key)
            if part is not None:
                self._parts.move_to_end(key)
                return part
            pending = self._computing.get(key)
            if pending is None:
                own: Future[SystemPart] = Future()
                self._computing[key] = own
        if pending is not None:
            if awaited is not None:
                raise SystemPartPending(key, pending)
            return pending.result()
        part = NO_PART
        try:
            part = compute()
        finally:
            with self._lock:
                del self._computing[key]
                self._store(key, part)
            own.set_result(part)  # also when computing failed: nobody may be left waiting
        return part

    def _store(self, key: PartKey, part: SystemPart) -> None:
        cost = _cost(key, part)
        if cost > _MAX_BYTES_OF_ONE:
            return
        self._parts[key] = part
        self._num_bytes += cost
        while len(self._parts) > _MAX_PARTS or self._num_bytes > _MAX_BYTES:
            self._num_bytes -= _cost(*self._parts.popitem(last=False))


def _cost(key: PartKey, part: SystemPart) -> int:
    """Bytes that an entry takes, about: its key may hold a template and the texts of the system messages."""
    return part.num_bytes + _size(key)


def _size(item: Hashable) -> int:
    inner = sum(_size(i) for i in item) if isinstance(item, tuple) else 0
    return sys.getsizeof(item) + inner

"""Responses that clients may come back to: by id, or as the conversation that a next one goes on with."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator
from typing import Any

import orjson

MAX_RESPONSES = 4096
MAX_BYTES = 256 * 2**20


class BackgroundRun:
    """The making of a response that no client waits for.

    Attributes:
        events: Its server-sent events so far, numbered from 0; None if nobody may read them.
        task: Does the work.
    """

    def __init__(self, keeps_events: bool) -> None:
        self.events: list[bytes] | None = [] if keeps_events else None
        self.task: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._ended = False

    @property
    def ended(self) -> bool:
        return self._ended

    def add(self, event: bytes) -> None:
        if self.events is not None:
            self.events.append(event)
            self._announce()

    def end(self) -> None:
        self._ended = True
        self._announce()

    def _announce(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def follow(self, start: int = 0) -> AsyncGenerator[bytes, None]:
        """Events from number `start` on, those to come included."""
        while True:
            # Taken before looking, so that nothing that comes in between is slept through.
            news = self._news
            pending = (self.events or [])[start:]
            if not pending and self._ended:
                return
            if not pending:
                await news.wait()
            for event in pending:
                yield event
            start += len(pending)


class StoredResponse:
    """A response and the conversation it belongs to.

    Attributes:
        response: The response object; grows until the response has ended.
        messages: Its input, and its answer once that is complete, as chat messages; without instructions.
        input_items: The same input as items; those of the responses before it come first, their answers included.
        run: The background work that makes it, or made it; None for one that a client waited for.
        tenant: Whose it is, where the server has several API keys.
    """

    def __init__(
        self,
        response: dict[str, Any],
        messages: list[dict[str, Any]],
        input_items: list[dict[str, Any]],
        run: BackgroundRun | None = None,
        tenant: str | None = None,
    ) -> None:
        self.response = response
        self.messages = messages
        self.input_items = input_items
        self.run = run
        self.tenant = tenant

    @property
    def id(self) -> str:
        return str(self.response["id"])

    @property
    def is_running(self) -> bool:
        return self.run is not None and not self.run.ended

    def num_bytes(self) -> int:
        events = (self.run.events if self.run is not None else None) or []
        held = (self.response, self.messages, self.input_items)
        return sum(len(orjson.dumps(part)) for part in held) + sum(map(len, events))


def kept_items(responses: list[StoredResponse], ids: set[str]) -> dict[str, dict[str, Any]]:
    """The items of these ids among inputs and outputs of responses; of several with one id, the first."""
    found: dict[str, dict[str, Any]] = {}
    for entry in responses:
        for item in (*entry.response["output"], *entry.input_items):
            if item["id"] in ids:
                found.setdefault(item["id"], item)
        if len(found) == len(ids):
            break
    return found


class ResponseStore:
    """Bounded in number and bytes: those not asked for the longest are forgotten first, running ones never."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, StoredResponse] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_running(self) -> int:
        return sum(entry.is_running for entry in self._entries.values())

    def get(self, response_id: str) -> StoredResponse | None:
        entry = self._entries.get(response_id)
        if entry is not None:
            self._entries.move_to_end(response_id)
        return entry

    def of_tenant(self, tenant: str | None) -> list[StoredResponse]:
        """A tenant's responses, those asked for last first."""
        return [entry for entry in reversed(self._entries.values()) if entry.tenant == tenant]

    def put(self, entry: StoredResponse) -> None:
        """Adds a response, or takes note that one has grown; may forget others, or a finished one that is too large."""
        self.remove(entry.id)
        self._entries[entry.id] = entry
        self._sizes[entry.id] = entry.num_bytes()
        self.num_bytes += self._sizes[entry.id]
        while len(self._entries) > self._max_responses or self.num_bytes > self._max_bytes:
            oldest = next((key for key, other in self._entries.items() if not other.is_running), None)
            if oldest is None:
                return
            self.remove(oldest)

    def remove(self, response_id: str) -> None:
        if self._entries.pop(response_id, None) is not None:
            self.num_bytes -= self._sizes.pop(response_id)

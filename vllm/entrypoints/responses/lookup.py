"""What clients may do with a response that is kept: read it, follow it, cancel it, forget it."""

from __future__ import annotations

import asyncio
from typing import Any

from vllm.engine.tenant import current_tenant
from vllm.entrypoints.http.errors import ApiError
from vllm.entrypoints.http.json_body import snippet
from vllm.entrypoints.http.streaming import EventStream
from vllm.entrypoints.responses.protocol import PageRequest
from vllm.entrypoints.responses.store import ResponseStore, StoredResponse
from vllm.exceptions import VLLMValidationError


class KeptResponses:
    """Answers the routes of single responses."""

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    def find(self, response_id: str, param: str = "response_id") -> StoredResponse:
        """A response of the tenant who asks; raises ApiError 404, naming `param`, for an id that is none."""
        stored = self._store.get(response_id)
        if stored is None or stored.tenant != current_tenant.get():
            raise ApiError(404, f"There is no response {snippet(response_id)}, or it was forgotten.", param)
        return stored

    async def get(self, response_id: str, stream: bool, starting_after: int | None) -> dict[str, Any] | EventStream:
        """A stored response, or the events of one that is made in the background as a stream.

        Args:
            starting_after: Number of the last event that the client has.

        Raises:
            ApiError: 404 for an id that is not in the store.
            VLLMValidationError: There are no events of this response.
        """
        stored = self.find(response_id)
        if not stream:
            return stored.response
        if stored.run is None or stored.run.events is None:
            raise VLLMValidationError(
                "Only responses that were created with background and stream can be streamed again.", "stream"
            )
        start = 0 if starting_after is None else starting_after + 1
        if stored.run.ended and start >= len(stored.run.events):
            raise VLLMValidationError(
                f"starting_after must be less than {len(stored.run.events) - 1}, the number of the last event, "
                f"got {starting_after}.",
                "starting_after",
            )
        return await EventStream.start(stored.run.follow(max(0, start)))

    async def list_input_items(self, response_id: str, page: PageRequest) -> dict[str, Any]:
        """A page of the items that a response was made from.

        Raises:
            ApiError: 404 for an id that is not in the store.
            VLLMValidationError: No item has the id to go on after.
        """
        items = self.find(response_id).input_items
        if page.order == "desc":
            items = items[::-1]
        start = 0
        if page.after is not None:
            found = [i for i, item in enumerate(items) if item["id"] == page.after]
            if not found:
                raise VLLMValidationError(f"after names {snippet(page.after)}, which is none of the items.", "after")
            start = found[0] + 1
        shown = items[start : start + page.limit]
        return {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": start + len(shown) < len(items),
        }

    async def cancel(self, response_id: str) -> dict[str, Any]:
        """Ends a response in the background; one that has ended is left as it is.

        Raises:
            ApiError: 404 for an id that is not in the store, 400 for a response that a client waited for.
        """
        stored = self.find(response_id)
        if stored.run is None:
            raise ApiError(400, "Only responses that were created with background can be cancelled.", "response_id")
        await self._stop(stored)
        return stored.response

    async def delete(self, response_id: str) -> dict[str, Any]:
        """Forgets a response; raises ApiError 404 for an id that is not in the store."""
        stored = self.find(response_id)
        self._store.remove(stored.id)
        await self._stop(stored)
        return {"id": stored.id, "object": "response", "deleted": True}

    async def _stop(self, stored: StoredResponse) -> None:
        if stored.is_running and stored.run is not None and stored.run.task is not None:
            stored.run.task.cancel()
            await asyncio.wait({stored.run.task})

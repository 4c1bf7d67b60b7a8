"""What request bodies may hold and how much of them is held at a time.

Whatever a body makes of itself is checked, copied and freed later, by code that holds the interpreter's lock to its
end: what streams of others wait for, in whichever thread it runs. The limits keep that at some tens of milliseconds.
"""

from __future__ import annotations

import numpy as np

from vllm.engine.work_lanes import LONG_BYTES
from vllm.entrypoints.http.errors import ApiError
from vllm.entrypoints.http.json_pieces import Marks, chunks_of_marks

MAX_BODY_BYTES = 16 * 2**20
MAX_BODY_VALUES = 524_288
MAX_BODY_NODES = 65_536
MAX_BODY_FIELDS = 1024
MAX_BODIES_BYTES = 256 * 2**20
RETRY_AFTER_S = 1

_COMMA, _BRACKET, _BRACE = b",[{"


class BodyBytes:
    """Bytes of bodies that are being read or parsed, of all requests together.

    Bodies of up to `LONG_BYTES` count, but are always taken, so that a few clients with long ones cannot shut out all
    others.

    Args:
        most: Above it, longer ones are refused.

    Attributes:
        held: Bytes that are held now.
    """

    def __init__(self, most: int = MAX_BODIES_BYTES) -> None:
        self._most = most
        self.held = 0

    def check(self, num_bytes: int, more: int) -> None:
        """Judges a body of `num_bytes` of which `more` are still to be taken.

        Raises:
            ApiError: 503, there is no room for them now.
        """
        if num_bytes > LONG_BYTES and self.held + more > self._most:
            # The rest of the body is not read, so the connection cannot serve another request.
            raise ApiError(
                503,
                f"The server holds {self.held // 2**20} MiB of request bodies that it has not read yet, and takes "
                f"{self._most // 2**20} MiB at a time; try again in {RETRY_AFTER_S} s.",
                headers={"Retry-After": str(RETRY_AFTER_S), "Connection": "close"},
            )

    def take(self, num_bytes: int) -> None:
        self.held += num_bytes

    def give_back(self, num_bytes: int) -> None:
        self.held -= num_bytes


def checked_marks(body: bytes | bytearray) -> list[Marks]:
    """Counts what the parser would have to make of a body, and refuses what would take it long; returns what
    `json_pieces.loads` reads it by.

    Counts are right for valid JSON; of anything else the parser says what is wrong.

    Raises:
        ApiError: 413, it has too many values, or too many strings, arrays and objects.
    """
    values = nodes = 0
    found = []
    for marks in chunks_of_marks(body):
        kinds = np.bincount(marks.letters, minlength=256)
        values += int(kinds[_COMMA])
        nodes += int(kinds[_BRACKET] + kinds[_BRACE]) + marks.num_strings
        if values > MAX_BODY_VALUES:
            raise ApiError(413, f"The request body may hold at most {MAX_BODY_VALUES} values; send several requests.")
        if nodes > MAX_BODY_NODES:
            raise ApiError(
                413,
                f"The request body may hold at most {MAX_BODY_NODES} strings, arrays and objects; "
                "send several requests.",
            )
        found.append(marks)
    return found

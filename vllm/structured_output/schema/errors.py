"""What can be wrong with a JSON schema."""

from __future__ import annotations

_MAX_TEXT_CHARS = 60


class SchemaError(ValueError):
    """A schema that is malformed, or has more combinations than anyone will wait for."""


def shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_TEXT_CHARS else text[:_MAX_TEXT_CHARS] + "…"

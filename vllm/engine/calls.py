"""Calls of the engine core besides requests: what their arguments may be.

They are checked where they come in, so that what is wrong is said in the caller's terms, and once more by their types
where they are carried out, before anything is touched.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import check_float

MAX_NAME_CHARS = 256
MAX_TTL_SECONDS = 10 * 365 * 86400.0
MAX_BUDGET_TOKENS = 2**40
PinName = Literal["hard", "soft"]


class PinOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a declared system prompt is pinned; see `LLMEngine.add_system_prompt`.

    Attributes:
        source: Who declared it, for listings.
    """

    name: str | None = None
    ttl: float | None = None
    pin: PinName = "hard"
    source: str = "declared"

    @classmethod
    def checked(cls, name: Any, ttl: Any, pin: Any, source: str = "declared") -> PinOptions:
        """Raises `VLLMValidationError` for a value that is not allowed."""
        _check_name(name)
        _check_ttl(ttl)
        if pin not in ("hard", "soft"):
            raise VLLMValidationError(f"pin must be 'hard' or 'soft', got {pin!r}.", "pin")
        return cls(name, ttl, pin, source)


class PromptChanges(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What changes of a system prompt: the fields that are set."""

    name: str | UnsetType | None = UNSET
    ttl: float | UnsetType | None = UNSET

    @classmethod
    def checked(cls, changes: dict[str, Any]) -> PromptChanges:
        """Raises `VLLMValidationError` for a value that is not allowed, or a field that cannot be changed."""
        for field in changes:
            if field not in cls.__struct_fields__:
                raise VLLMValidationError(f"{field} of a system prompt cannot be changed; name and ttl can.", field)
        _check_name(changes.get("name"))
        _check_ttl(changes.get("ttl"))
        return cls(**changes)

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not UNSET}


def check_prompt_id(prompt_id: Any) -> None:
    """Raises `VLLMValidationError` for what cannot be the id of a system prompt."""
    if not isinstance(prompt_id, str):
        raise VLLMValidationError(f"The id of a system prompt is a string, got {prompt_id!r}.", "id")


def _check_name(name: Any) -> None:
    if name is None:
        return
    if not isinstance(name, str):
        raise VLLMValidationError(f"name must be a string, got {name!r}.", "name")
    if not 1 <= len(name) <= MAX_NAME_CHARS:
        raise VLLMValidationError(f"name must have 1 to {MAX_NAME_CHARS} characters, got {len(name)}.", "name")


def _check_ttl(ttl: Any) -> None:
    if ttl is not None:
        check_float("ttl", ttl, 0.0, MAX_TTL_SECONDS, low_open=True)

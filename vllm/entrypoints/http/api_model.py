"""What request bodies of all dialects are made of, and what their answers are named and dated with."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast


class _FirstErrorOnly(FailFast):
    """Judges a list by its first wrong entry: a million of them must not make a million errors."""

    # As part of a union it must have a hash, which pydantic's own has not.
    __hash__ = object.__hash__


_T = TypeVar("_T")
ListOf = Annotated[list[_T], _FirstErrorOnly()]


class ApiModel(BaseModel):
    """A request body; unknown fields are accepted."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


def now() -> int:
    """Seconds since 1970, as `created` fields hold them."""
    return int(time.time())


def random_id() -> str:
    return uuid.uuid4().hex

"""How values travel between the processes of one server: as msgspec messages, never pickled."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from vllm.config import VllmConfig
from vllm.token_ids import TokenIds, from_bytes


def to_wire(value: object) -> memoryview:
    """Token ids travel as their memory; the `enc_hook` of whoever encodes messages.

    Raises:
        TypeError: it is something else, which no message holds.
    """
    if not isinstance(value, array):
        raise TypeError(f"no message holds a {type(value).__name__}")
    return memoryview(value).cast("B")


def from_wire(kind: type, value: bytes) -> TokenIds:
    """The other way, as `dec_hook`: token ids are the only type of messages that is not msgspec's own."""
    return from_bytes(value)


def sendable(config: VllmConfig) -> VllmConfig:
    """The same with the fields of its model's configuration in place of the object of transformers'."""
    fields = msgspec.json.decode(config.model.hf_config.to_json_string())
    return replace(config, model=replace(config.model, hf_config=fields))


def received(config: VllmConfig, hf_config_of: Callable[[dict[str, Any]], Any]) -> VllmConfig:
    """What `sendable` was made of; `hf_config_of` makes the configuration of a model from its fields."""
    fields: Any = config.model.hf_config
    return replace(config, model=replace(config.model, hf_config=hf_config_of(fields)))

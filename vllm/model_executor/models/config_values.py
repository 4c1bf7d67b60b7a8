"""What families read from a configuration, and how they refuse what they do not understand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vllm.exceptions import StartupError
from vllm.model_executor.models.spec import RopeSpec
from vllm.ops.activation import Activation
from vllm.transformers_utils.architectures import ARCHITECTURES

# Scalings whose frequencies do not depend on the length of the sequence at hand. LongRoPE has two sets: the longest
# sequence that is served says which.
_SCALINGS = ("linear", "llama3", "longrope", "yarn")
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
_WINDOWS = {"full_attention": False, "sliding_attention": True}


def refused(config: PretrainedConfig, what: str, allowed: str) -> StartupError:
    """The error for a value that is not understood.

    Args:
        what: The value, by its key.
        allowed: What is.
    """
    return StartupError(
        f"The model (model type {config.model_type!r}) has {what}; supported: {allowed}. Supported architectures: "
        f"{', '.join(ARCHITECTURES)}."
    )


def refuse(config: PretrainedConfig, **unsupported: Any) -> None:
    """Refuses values other than these, by key; keys that the configuration lacks count as these."""
    for key, only in unsupported.items():
        value = getattr(config, key, only)
        if value != only and not (not value and not only):
            raise refused(config, f"{key} {value!r}", repr(only))


def activation(config: PretrainedConfig, key: str = "hidden_act") -> Activation:
    """The activation function that a key names."""
    name = getattr(config, key)
    if name not in _ACTIVATIONS:
        raise refused(config, f"{key} {name!r}", ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[name]


def heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """(num_heads, num_kv_heads, head_dim)."""
    num_heads = int(config.num_attention_heads)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // num_heads)
    return num_heads, num_kv_heads, head_dim


def biases(config: PretrainedConfig, key: str, parts: str) -> frozenset[str]:
    """The parts (words of a string) that have biases, if the key is true."""
    return frozenset(parts.split()) if getattr(config, key, False) else frozenset()


def window(config: PretrainedConfig, max_positions: int) -> int | None:
    """`sliding_window`; None where it is not set, or where no sequence is longer."""
    size = getattr(config, "sliding_window", None)
    return None if size is None or size >= max_positions else int(size)


def windows(config: PretrainedConfig, max_positions: int) -> list[int | None]:
    """Window of each layer, by `layer_types`; see `window`."""
    size = getattr(config, "sliding_window", None)
    types: Sequence[str] = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for kind in types:
        if kind not in _WINDOWS:
            raise refused(config, f"layer_types {kind!r}", ", ".join(_WINDOWS))
        if _WINDOWS[kind] and not size:
            raise refused(config, f"windows in layer_types but sliding_window {size!r}", "a number of tokens")
    if len(types) != config.num_hidden_layers:
        raise refused(config, f"{len(types)} layer_types for {config.num_hidden_layers} layers", "one for each")
    return [window(config, max_positions) if _WINDOWS[kind] else None for kind in types]


def rope(
    config: PretrainedConfig,
    max_positions: int,
    *,
    layer_type: str | None = None,
    interleaved: bool = False,
) -> RopeSpec:
    """Rotary positions by the configuration's `rope_parameters` (in older checkpoints `rope_theta` and
    `rope_scaling`).

    Args:
        max_positions: Longest sequence.
        layer_type: Whose parameters, where kinds of layers have their own.
        interleaved: As of `RopeSpec`.
    """
    parameters = _rope_parameters(config, layer_type)
    kind = parameters["rope_type"]
    if kind == "default":
        size = int(heads(config)[2] * float(parameters.get("partial_rotary_factor") or 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
        return RopeSpec(tuple((1.0 / float(parameters["rope_theta"]) ** exponents).tolist()), 1.0, interleaved)
    if kind not in _SCALINGS:
        raise refused(config, f"RoPE scaling {kind!r}", f"default, {', '.join(_SCALINGS)}")
    with torch.device("cpu"):  # not the device that the network is being made on
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](
            config, torch.device("cpu"), seq_len=max_positions, layer_type=layer_type
        )
    return RopeSpec(tuple(frequencies.float().tolist()), float(factor), interleaved)


def _rope_parameters(config: PretrainedConfig, layer_type: str | None) -> dict[str, Any]:
    """One spelling of them: `rope_type`, `rope_theta` and those of the scaling."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if layer_type is not None:
        parameters = parameters[layer_type]
    parameters = dict(parameters)
    parameters.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    return parameters

"""What families read from a configuration, and how they refuse what they do not understand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vllm.exceptions import StartupError
from vllm.model_executor.models.spec import RopeSpec
from vllm.ops.activation import Activation

# Scalings whose frequencies do not depend on the length of the sequence at hand. LongRoPE has two sets: the longest
# sequence that is served says which.
_SCALINGS = ("linear", "llama3", "longrope", "yarn")
_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "attention_factor"),
    *("original_max_position_embeddings", "max_position_embeddings", "beta_fast", "beta_slow", "truncate"),
    *("mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
}
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
        f"The model (model type {config.model_type!r}) has {what}; supported: {allowed}. See docs/models.md for what "
        "is served of each architecture."
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


def layer_types(config: PretrainedConfig) -> list[str]:
    """`layer_types`, one for each layer: `full_attention` or `sliding_attention`."""
    types = list(getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)
    for kind in types:
        if kind not in _WINDOWS:
            raise refused(config, f"layer_types {kind!r}", ", ".join(_WINDOWS))
    if len(types) != config.num_hidden_layers:
        raise refused(config, f"{len(types)} layer_types for {config.num_hidden_layers} layers", "one for each")
    return types


def window(config: PretrainedConfig, max_positions: int) -> int | None:
    """`sliding_window`; None where it is not set, or where no sequence is longer."""
    size = getattr(config, "sliding_window", None)
    return None if size is None or size >= max_positions else int(size)


def windows(config: PretrainedConfig, max_positions: int) -> list[int | None]:
    """Window of each layer, by `layer_types`; see `window`."""
    size = getattr(config, "sliding_window", None)
    types = layer_types(config)
    if not size and any(map(_WINDOWS.get, types)):
        raise refused(config, f"windows in layer_types but sliding_window {size!r}", "a number of tokens")
    return [window(config, max_positions) if _WINDOWS[kind] else None for kind in types]


def rope(
    config: PretrainedConfig,
    max_positions: int,
    *,
    layer_type: str | None = None,
    head_dim: int | None = None,
    interleaved: bool = False,
    also_read: frozenset[str] = frozenset(),
) -> RopeSpec:
    """Rotary positions by the configuration's `rope_parameters` (in older checkpoints `rope_theta` and
    `rope_scaling`).

    Args:
        max_positions: Longest sequence.
        layer_type: Whose parameters, where kinds of layers have their own.
        head_dim: Of the layer, where layers differ.
        interleaved: As of `RopeSpec`.
        also_read: Keys of the parameters that the family reads itself.
    """
    parameters = rope_parameters(config, layer_type)
    unknown = sorted(parameters.keys() - _ROPE_KEYS - also_read)
    if unknown:
        raise refused(config, f"RoPE parameters {', '.join(unknown)}", ", ".join(sorted(_ROPE_KEYS | also_read)))
    kind = parameters["rope_type"]
    if kind == "dynamic":
        # Changes nothing up to the trained length, and then every key with each new token.
        trained = int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
        if max_positions > trained:
            raise refused(
                config, f"RoPE scaling 'dynamic' beyond {trained} tokens", f"--max-model-len {trained} or less"
            )
        kind = "default"
    if kind in ("default", "proportional"):
        size = head_dim or heads(config)[2]
        turned = int(size * float(parameters.get("partial_rotary_factor") or 1.0))
        # "proportional": the frequencies of a whole head, of which the first ones turn and the others stay.
        span = turned if kind == "default" else size
        exponents = torch.arange(0, turned, 2, dtype=torch.float32, device="cpu") / span
        frequencies = 1.0 / float(parameters["rope_theta"]) ** exponents
        if kind == "proportional":
            frequencies = frequencies[: turned // 2] / float(parameters.get("factor") or 1.0)
            frequencies = torch.cat((frequencies, frequencies.new_zeros(size // 2 - len(frequencies))))
        return RopeSpec(tuple(frequencies.tolist()), 1.0, interleaved)
    if kind not in _SCALINGS:
        raise refused(
            config, f"RoPE scaling (rope_type) {kind!r}", f"default, dynamic, proportional, {', '.join(_SCALINGS)}"
        )
    with torch.device("cpu"):  # not the device that the network is being made on
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](
            config, torch.device("cpu"), seq_len=max_positions, layer_type=layer_type
        )
    return RopeSpec(tuple(frequencies.float().tolist()), float(factor), interleaved)


def rope_parameters(config: PretrainedConfig, layer_type: str | None = None) -> dict[str, Any]:
    """One spelling of them: `rope_type`, `rope_theta` and those of the scaling."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if layer_type is not None:
        parameters = parameters[layer_type]
    parameters = dict(parameters)
    parameters.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    return parameters

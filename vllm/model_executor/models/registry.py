"""From a configuration to the network that it describes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import cast

from transformers import PretrainedConfig

from vllm.exceptions import StartupError
from vllm.model_executor.models.spec import DecoderSpec
from vllm.transformers_utils.architectures import ARCHITECTURES

Family = Callable[[PretrainedConfig, int], DecoderSpec]
"""(configuration, longest sequence) → what the network computes. Raises StartupError for values that it does not
understand."""


def decoder_spec(config: PretrainedConfig, max_positions: int) -> DecoderSpec:
    """What the network of a configuration computes.

    Args:
        max_positions: Longest sequence; some models turn long ones by other frequencies.

    Raises:
        StartupError: the architecture is not supported, or the configuration asks for something that is not.
    """
    architecture = (config.architectures or ["?"])[0]
    if architecture not in ARCHITECTURES:
        raise StartupError(
            f"{architecture} (model type {config.model_type!r}) is not supported; supported architectures: "
            f"{', '.join(ARCHITECTURES)}."
        )
    module = import_module(f"vllm.model_executor.models.{ARCHITECTURES[architecture]}")
    return cast(Family, module.decoder)(config, max_positions)

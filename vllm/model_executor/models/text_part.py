"""The language model of a checkpoint that also reads images or sounds; requests with those are refused elsewhere."""

from __future__ import annotations

from dataclasses import replace

from vllm.model_executor.models.spec import DecoderSpec

_OTHERS = ("vision_tower.", "audio_tower.", "multi_modal_projector.", "embed_vision.", "embed_audio.")


def text_part(spec: DecoderSpec) -> DecoderSpec:
    """The same network, found among a larger checkpoint's tensors by either of the names that transformers has given
    them."""
    names = replace(
        spec.names,
        prefixes={"language_model.": "", "model.language_model.": "model."},
        others=(*_OTHERS, *(f"model.{name}" for name in _OTHERS)),
    )
    return replace(spec, names=names)

"""Which tensor of a checkpoint goes where, as rows of data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vllm.model_executor.layers.quantization.select import scheme_of
from vllm.model_executor.layers.quantization.stored import WHOLE, Stored
from vllm.model_executor.models.spec import CheckpointNames, DecoderSpec, LayerSpec
from vllm.transformers_utils.quantization_config import QuantizationConfig, WeightFormat


class Weight(NamedTuple):
    """Where one tensor of a checkpoint goes.

    Attributes:
        module: Path of the module in the network.
        parts: Parts of that module whose rows the tensor holds, one behind the other; empty where it has none.
        kind: `weight`, `bias`, or what else the module holds.
        twin: Another part of that module with the same rows.
        optional: A checkpoint may lack it.
    """

    module: str
    parts: tuple[str, ...]
    kind: str
    twin: str | None = None
    optional: bool = False


Formats = Mapping[str, WeightFormat | None]
"""Linear layer of a decoder layer (`mixer.qkv`) → how its weights are quantised; None, or no entry: they are whole."""


def layer_formats(spec: DecoderSpec, index: int, quantization: QuantizationConfig | None) -> Formats:
    """Formats of a decoder layer's linear layers.

    Raises:
        ValueError: the parts of one have different formats.
    """
    if quantization is None:
        return {}
    formats: dict[str, WeightFormat | None] = {}
    for module, (whole, parts) in _linears(spec.layers[index]).items():
        names = [spec.names.layer(index, p) for p in ((whole,) if _fused(whole, parts, spec.names) else parts)]
        found = {quantization.format_of(some) for some in names}
        if len(found) > 1:
            called = ", ".join(some[0] for some in names)
            raise ValueError(f"{called} are one matrix here, and the checkpoint quantises them differently")
        formats[module] = found.pop()
    return formats


def _linears(layer: LayerSpec) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Linear layer → (name for all of it, its parts that are in checkpoints)."""
    mixer, ffn = layer.mixer, layer.ffn
    return {
        "mixer.qkv": ("", ("q", "k")) if mixer.v_is_k else ("qkv", ("q", "k", "v")),
        "mixer.o": ("o", ("o",)),
        "ffn.gate_up": ("gate_up", ("gate", "up") if ffn.gated else ("up",)),
        "ffn.down": ("down", ("down",)),
    }


def _fused(whole: str, parts: tuple[str, ...], names: CheckpointNames) -> bool:
    return whole in names.parts and len(parts) > 1


def weight_map(spec: DecoderSpec, quantization: QuantizationConfig | None = None) -> dict[str, Weight]:
    """Name in the checkpoint → where it goes; all that must be there, and what may."""
    names = spec.names
    rows = {f"{names.embedding}.weight": Weight("embedding", (), "weight")}
    for kind in _kinds(spec.final_norm_bias):
        rows[f"{names.final_norm}.{kind}"] = Weight("norm", (), kind)
    if not spec.tied:
        rows[f"{names.head}.weight"] = Weight("head.table", (), "weight")
    for i, layer in enumerate(spec.layers):
        for name, weight in _layer(layer, names, layer_formats(spec, i, quantization)):
            module = f"layers.{i}.{weight.module}".rstrip(".")
            rows[f"{names.layers}.{i}.{name}"] = weight._replace(module=module)
    return rows


def _kinds(has_bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if has_bias else ("weight",)


def _layer(layer: LayerSpec, all_names: CheckpointNames, formats: Formats) -> Iterator[tuple[str, Weight]]:
    mixer, norms, names = layer.mixer, layer.norms, all_names.parts
    biases = mixer.biases | layer.ffn.biases
    for module, (whole, parts) in _linears(layer).items():
        format = formats.get(module)
        stored = WHOLE if format is None else scheme_of(format).stored
        if _fused(whole, parts, all_names):
            yield from _linear(module, names[whole], parts, not biases.isdisjoint(parts), stored)
            continue
        for part in parts:
            twin = "v" if mixer.v_is_k and part == "k" else None
            yield from _linear(module, names[part], (part,), part in biases, stored, twin)
    if mixer.qk_norm is not None:
        for part in ("q_norm", "k_norm"):
            yield f"{names[part]}.weight", Weight(f"mixer.{part}", (), "weight")
    if mixer.sinks:
        yield names["sinks"], Weight("mixer.attention", (), "sinks")
    if layer.has_scalar:
        yield names["scalar"], Weight("", (), "scalar")
    places = {
        "pre_mixer": ("pre_mixer", norms.pre_mixer),
        "post_mixer": ("after_mixer.norm", norms.post_mixer),
        "pre_ffn": ("pre_ffn", norms.pre_ffn and not layer.parallel),
        "post_ffn": ("after_ffn.norm", norms.post_ffn),
    }
    for part, (module, there) in places.items():
        if there:
            for kind in _kinds(norms.has_bias):
                yield f"{names[part]}.{kind}", Weight(module, (), kind)


def _linear(
    module: str,
    name: str,
    parts: tuple[str, ...],
    has_bias: bool,
    stored: Mapping[str, Stored],
    twin: str | None = None,
) -> Iterator[tuple[str, Weight]]:
    """The tensors of a linear layer's part, or of several that the checkpoint has in one."""
    for kind, tensor in stored.items():
        yield f"{name}.{kind}", Weight(module, parts, kind, twin, tensor.optional)
    if has_bias:
        yield f"{name}.bias", Weight(module, parts, "bias", twin)

"""Which tensor of a checkpoint goes where, as rows of data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vllm.model_executor.models.spec import DecoderSpec, LayerSpec


class Weight(NamedTuple):
    """Where one tensor of a checkpoint goes.

    Attributes:
        module: Path of the module in the network.
        parts: Parts of that module whose rows the tensor holds, one behind the other; empty where it has none.
        kind: `weight`, `bias`, or what else the module holds.
        twin: Another part of that module with the same rows.
    """

    module: str
    parts: tuple[str, ...]
    kind: str
    twin: str | None = None


def weight_map(spec: DecoderSpec) -> dict[str, Weight]:
    """Name in the checkpoint → where it goes; all that must be there."""
    names = spec.names
    rows = {f"{names.embedding}.weight": Weight("embedding", (), "weight")}
    for kind in _kinds(spec.final_norm_bias):
        rows[f"{names.final_norm}.{kind}"] = Weight("norm", (), kind)
    if not spec.tied:
        rows[f"{names.head}.weight"] = Weight("head.table", (), "weight")
    for i, layer in enumerate(spec.layers):
        for name, weight in _layer(layer, names.parts):
            module = f"layers.{i}.{weight.module}".rstrip(".")
            rows[f"{names.layers}.{i}.{name}"] = weight._replace(module=module)
    return rows


def _kinds(has_bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if has_bias else ("weight",)


def _layer(layer: LayerSpec, names: Mapping[str, str]) -> Iterator[tuple[str, Weight]]:
    mixer, ffn, norms = layer.mixer, layer.ffn, layer.norms
    if mixer.v_is_k:
        yield from _merged("mixer.qkv", "", ("q", "k"), mixer.biases, names, twins={"k": "v"})
    else:
        yield from _merged("mixer.qkv", "qkv", ("q", "k", "v"), mixer.biases, names)
    yield from _merged("mixer.o", "o", ("o",), mixer.biases, names)
    yield from _merged("ffn.gate_up", "gate_up", ("gate", "up") if ffn.gated else ("up",), ffn.biases, names)
    yield from _merged("ffn.down", "down", ("down",), ffn.biases, names)
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


def _merged(
    module: str,
    whole: str,
    parts: tuple[str, ...],
    biases: frozenset[str],
    names: Mapping[str, str],
    twins: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, Weight]]:
    """A linear layer of several parts, which the checkpoint has one by one or, if it has a name for the whole, in one
    tensor. `twins`: part → another one that has the same rows."""
    if whole in names and len(parts) > 1:
        yield f"{names[whole]}.weight", Weight(module, parts, "weight")
        if not biases.isdisjoint(parts):
            yield f"{names[whole]}.bias", Weight(module, parts, "bias")
        return
    for part in parts:
        for kind in _kinds(part in biases):
            yield f"{names[part]}.{kind}", Weight(module, (part,), kind, (twins or {}).get(part))

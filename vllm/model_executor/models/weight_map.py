"""Which tensor of a checkpoint goes where, as rows of data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vllm.model_executor.layers.quantization.select import stored_of
from vllm.model_executor.layers.quantization.stored import Stored
from vllm.model_executor.models.spec import MLP, CheckpointNames, DecoderSpec, LayerSpec, MoE
from vllm.transformers_utils.quantization_config import QuantizationConfig, WeightFormat


class Weight(NamedTuple):
    """Where one tensor of a checkpoint goes.

    Attributes:
        module: Path of the module in the network.
        parts: Parts of that module whose rows the tensor holds, one behind the other; empty where it has none.
        kind: `weight`, `bias`, or what else the module holds.
        twin: Another part of that module with the same rows.
        whole: Name of the tensor that this is a piece of; a checkpoint has either that one or all of its pieces.
        optional: A checkpoint may lack it.
    """

    module: str
    parts: tuple[str, ...]
    kind: str
    twin: str | None = None
    optional: bool = False
    whole: str | None = None


Formats = Mapping[str, WeightFormat | None]
"""Linear layer of a decoder layer (`mixer.qkv`) → how its weights are quantised; None, or no entry: they are whole."""


def layer_formats(spec: DecoderSpec, index: int, quantization: QuantizationConfig | None) -> Formats:
    """Formats of a decoder layer's linear layers.

    Raises:
        ValueError: the parts of one have different formats, or experts have one.
    """
    if quantization is None:
        return {}
    formats: dict[str, WeightFormat | None] = {}
    for module, (whole, parts) in linears(spec.layers[index]).items():
        names = [spec.names.layer(index, p) for p in ((whole,) if _fused(whole, parts, spec.names) else parts)]
        found = {quantization.format_of(some) for some in names}
        if len(found) > 1:
            called = ", ".join(some[0] for some in names)
            raise ValueError(f"{called} are one matrix here, and the checkpoint quantises them differently")
        formats[module] = found.pop()
    ffn = spec.layers[index].ffn
    if isinstance(ffn, MoE) and not ffn.mxfp4:
        known = [part for part in ("expert.gate", "experts.gate_up") if part in spec.names.parts]
        called_so = [tuple(name.format(0) for name in spec.names.layer(index, part)) for part in known]
        if quantization.experts is not None or any(quantization.format_of(some) for some in called_so):
            raise ValueError(
                f"its experts are quantised by {quantization.method!r}; served are whole ones, and gpt-oss' in MXFP4"
            )
    return formats


def linears(layer: LayerSpec) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Linear layer → (name for all of it, its parts that are in checkpoints)."""
    mixer, ffn = layer.mixer, layer.ffn
    found: dict[str, tuple[str, tuple[str, ...]]] = {
        "mixer.qkv": ("", ("q", "k")) if mixer.v_is_k else ("qkv", ("q", "k", "v")),
        "mixer.o": ("o", ("o",)),
    }
    mlp, module, prefix = _mlp_of(layer), "ffn", ""
    if isinstance(ffn, MoE):
        module, prefix = "ffn.shared", "" if ffn.beside else "shared."
    if mlp is not None:
        parts = ("gate", "up") if mlp.gated else ("up",)
        found[f"{module}.gate_up"] = (f"{prefix}gate_up", tuple(prefix + part for part in parts))
        found[f"{module}.down"] = (f"{prefix}down", (f"{prefix}down",))
    return found


def _mlp_of(layer: LayerSpec) -> MLP | None:
    """The MLP that every token takes."""
    return layer.ffn.shared if isinstance(layer.ffn, MoE) else layer.ffn


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
    if spec.head_bias:
        rows[f"{names.head}.bias"] = Weight("head", (), "bias")
    for i, layer in enumerate(spec.layers):
        for name, weight in _layer(layer, names, layer_formats(spec, i, quantization)):
            module = f"layers.{i}.{weight.module}".rstrip(".")
            whole = None if weight.whole is None else f"{names.layers}.{i}.{weight.whole}"
            rows[f"{names.layers}.{i}.{name}"] = weight._replace(module=module, whole=whole)
    return rows


def _kinds(has_bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if has_bias else ("weight",)


def _layer(layer: LayerSpec, all_names: CheckpointNames, formats: Formats) -> Iterator[tuple[str, Weight]]:
    mixer, norms, names = layer.mixer, layer.norms, all_names.parts
    mlp = _mlp_of(layer)
    biases = mixer.biases | (mlp.biases if mlp is not None else frozenset())
    for module, (whole, parts) in linears(layer).items():
        format = formats.get(module)
        stored = stored_of(format)
        # What the layer calls its parts; those of a shared MLP have names of their own in the checkpoint.
        own = tuple(part.removeprefix("shared.") for part in parts)
        if _fused(whole, parts, all_names):
            yield from _linear(module, names[whole], own, not biases.isdisjoint(own), stored)
            continue
        for name, part in zip(parts, own, strict=True):
            twin = "v" if mixer.v_is_k and part == "k" else None
            yield from _linear(module, names[name], (part,), part in biases, stored, twin)
    if isinstance(layer.ffn, MoE):
        yield from _experts(layer.ffn, names)
    if mixer.qk_norm is not None:
        for part in ("q_norm", "k_norm"):
            yield f"{names[part]}.weight", Weight(f"mixer.{part}", (), "weight")
    if mixer.sinks:
        yield names["sinks"], Weight("mixer", (), "sinks")
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


def _experts(moe: MoE, names: Mapping[str, str]) -> Iterator[tuple[str, Weight]]:
    for kind in _kinds(moe.router_bias):
        yield f"{names['router']}.{kind}", Weight("ffn.router", (), kind)
    if moe.correction:
        yield names["correction"], Weight("ffn.router", (), "correction")
    if moe.expert_factors:
        yield names["expert_factors"], Weight("ffn.router", (), "expert_factors")
    kinds = {"blocks": "_blocks", "scales": "_scales"} if moe.mxfp4 else {"weight": ""}
    if moe.biases:
        kinds["bias"] = "_bias"
    for stack, parts in (("gate_up", ("gate", "up")), ("down", ("down",))):
        whole = names[f"experts.{stack}"]
        for kind, end in kinds.items():
            yield f"{whole}{end}", Weight("ffn.experts", parts, kind)
        if "weight" in kinds and "expert.gate" in names:
            for part in parts:
                for i in range(moe.num_experts):
                    name = names[f"expert.{part}"].format(i)
                    yield f"{name}.weight", Weight("ffn.experts", (f"{i}.{part}",), "weight", whole=whole)
    if moe.shared_gate:
        yield f"{names['shared_gate']}.weight", Weight("ffn", (), "shared_gate")
    if moe.beside is not None:
        yield names["router_scale"], Weight("ffn.router.norm", (), "weight")
        for part in ("post_shared", "pre_experts", "post_experts"):
            yield f"{names[part]}.weight", Weight(f"ffn.{part}", (), "weight")


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

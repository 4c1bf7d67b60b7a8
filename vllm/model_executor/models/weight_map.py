"""Which tensor of a checkpoint goes where, as rows of data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vllm.model_executor.models.spec import MLP, DecoderSpec, LayerSpec, MoE


class Weight(NamedTuple):
    """Where one tensor of a checkpoint goes.

    Attributes:
        module: Path of the module in the network.
        parts: Parts of that module whose rows the tensor holds, one behind the other; empty where it has none.
        kind: `weight`, `bias`, or what else the module holds.
        twin: Another part of that module with the same rows.
        whole: Name of the tensor that this is a piece of; a checkpoint has either that one or all of its pieces.
    """

    module: str
    parts: tuple[str, ...]
    kind: str
    twin: str | None = None
    whole: str | None = None


def weight_map(spec: DecoderSpec) -> dict[str, Weight]:
    """Name in the checkpoint → where it goes; all that must be there, and the pieces that may stand for a whole."""
    names = spec.names
    rows = {f"{names.embedding}.weight": Weight("embedding", (), "weight")}
    for kind in _kinds(spec.final_norm_bias):
        rows[f"{names.final_norm}.{kind}"] = Weight("norm", (), kind)
    if not spec.tied:
        rows[f"{names.head}.weight"] = Weight("head.table", (), "weight")
    if spec.head_bias:
        rows[f"{names.head}.bias"] = Weight("head", (), "bias")
    for i, layer in enumerate(spec.layers):
        for name, weight in _layer(layer, names.parts):
            module = f"layers.{i}.{weight.module}".rstrip(".")
            whole = None if weight.whole is None else f"{names.layers}.{i}.{weight.whole}"
            rows[f"{names.layers}.{i}.{name}"] = weight._replace(module=module, whole=whole)
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
    if isinstance(ffn, MoE):
        yield from _experts(ffn, names)
    else:
        yield from _mlp("ffn", "", ffn, names)
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


def _mlp(module: str, prefix: str, mlp: MLP, names: Mapping[str, str]) -> Iterator[tuple[str, Weight]]:
    """An MLP whose parts are named `prefix` and theirs."""
    own = {part.removeprefix(prefix): name for part, name in names.items() if part.startswith(prefix)}
    gate_up = ("gate", "up") if mlp.gated else ("up",)
    yield from _merged(f"{module}.gate_up", "gate_up", gate_up, mlp.biases, own)
    yield from _merged(f"{module}.down", "down", ("down",), mlp.biases, own)


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
    if moe.shared is not None:
        yield from _mlp("ffn.shared", "" if moe.beside else "shared.", moe.shared, names)
    if moe.shared_gate:
        yield f"{names['shared_gate']}.weight", Weight("ffn", (), "shared_gate")
    if moe.beside is not None:
        yield names["router_scale"], Weight("ffn.router.norm", (), "weight")
        for part in ("post_shared", "pre_experts", "post_experts"):
            yield f"{names[part]}.weight", Weight(f"ffn.{part}", (), "weight")


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

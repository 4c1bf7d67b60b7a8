"""How the matrices of a checkpoint are quantised, from `quantization_config` of its config.json.

Read once into plain values; which tensors belong to a format, and how it is multiplied by, is told in
`model_executor/layers/quantization`. Names are those of vLLM's `--quantization`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from vllm.exceptions import StartupError


@dataclass(frozen=True)
class Fp8Format:
    """8-bit floats, e4m3.

    Attributes:
        scales: A factor a `tensor`, a `channel` (output feature) or a `block` of 128 × 128 weights.
        scale_name: Of the checkpoint's tensor of factors.
        static: The checkpoint may have factors of the inputs, too (`input_scale`).
        at_load: The checkpoint's weights are whole; they are quantised as they are loaded.
    """

    scales: Literal["tensor", "channel", "block"]
    scale_name: str = "weight_scale"
    static: bool = False
    at_load: bool = False


@dataclass(frozen=True)
class Int4Format:
    """4-bit integers: `(q - zero) · scale`, weights only.

    Attributes:
        layout: Whose packed order the checkpoint has.
        group: Input features that share a scale; 0: all of them.
        symmetric: The checkpoint has no zeros: they are 8.
        act_order: Groups are of input features that need not be neighbours (`g_idx`).
        zeros_less_one: The zeros are stored less 1 (GPTQ's first format).
    """

    layout: Literal["awq", "gptq", "compressed-tensors"]
    group: int
    symmetric: bool
    act_order: bool = False
    zeros_less_one: bool = False


@dataclass(frozen=True)
class Int8Format:
    """8-bit integers, symmetric; inputs are quantised by token.

    Attributes:
        scales: A factor a `tensor` or a `channel`.
    """

    scales: Literal["tensor", "channel"]


@dataclass(frozen=True)
class Fp4Format:
    """4-bit floats, e2m1, weights only.

    Attributes:
        kind: `mx`: a power of two for 32 weights (e8m0). `nv`: an e4m3 factor for 16 weights, and one for the tensor.
        layout: Whose names the checkpoint has; `gpt-oss`: blocks of stacked experts.
    """

    kind: Literal["mx", "nv"]
    layout: Literal["compressed-tensors", "modelopt", "gpt-oss"]


@dataclass(frozen=True)
class GGUFFormat:
    """Blocks of a GGUF file, kept as they are.

    Attributes:
        types: Part of the layer (`q`; empty for a layer without parts) and GGUF's name of its type.
    """

    types: tuple[tuple[str, str], ...]


WeightFormat = Fp8Format | Int4Format | Int8Format | Fp4Format | GGUFFormat

_GROUPS = (32, 64, 128)
_ALIASES = {
    "awq_marlin": "awq",
    "gptq_marlin": "gptq",
    "gptq_bitblas": "gptq",
    "modelopt_fp4": "modelopt",
    "modelopt_mixed": "modelopt",
    "gpt_oss_mxfp4": "mxfp4",
    "int8": "int8_cpu",
}
METHODS = ("fp8", "awq", "gptq", "compressed-tensors", "modelopt", "mxfp4", "gguf", "int8_cpu")
"""What `--quantization` takes, besides the names that mean the same."""
_AT_LOAD = ("fp8", "int8_cpu")


def method_name(name: str | None) -> str | None:
    """A value of `--quantization` by its plainest name; None for `none`.

    Raises:
        StartupError: it is unknown.
    """
    if name in (None, "none"):
        return None
    known = _ALIASES.get(str(name), str(name))
    if known not in METHODS:
        raise StartupError(f"--quantization {name} is not supported by this server; choose from {', '.join(METHODS)}.")
    return known


@dataclass(frozen=True)
class Rule:
    """Modules whose names match one of `targets` have weights in `format`; `Linear`: all of them."""

    targets: tuple[str, ...]
    format: WeightFormat


@dataclass(frozen=True)
class QuantizationConfig:
    """Formats of the matrices of a network.

    Attributes:
        method: By its plainest name.
        rules: The first that matches holds.
        ignored: Modules that are not quantised.
        experts: Format of stacked experts, where they have one that linear layers do not.
    """

    method: str
    rules: tuple[Rule, ...] = ()
    ignored: tuple[str, ...] = ()
    experts: Fp4Format | None = None

    def format_of(self, names: Iterable[str]) -> WeightFormat | None:
        """Format of a module that a checkpoint may call by any of `names`; None: its weights are whole."""
        names = tuple(names)
        if any(_matches(pattern, name) for pattern in self.ignored for name in names):
            return None
        for rule in self.rules:
            if any(t == "Linear" or _matches(t, name) for t in rule.targets for name in names):
                return rule.format
        return None


def _matches(pattern: str, name: str) -> bool:
    """A pattern is a whole name, whole parts of one, a glob, or (`re:`) a regular expression for its beginning."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    if "*" in pattern or "?" in pattern:
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def quantization_of(values: Mapping[str, Any] | None, asked: str | None, source: str) -> QuantizationConfig | None:
    """How a checkpoint's matrices are quantised; None where they are whole and stay so.

    Args:
        values: Its `quantization_config`.
        asked: The method of `--quantization`, as `method_name` returns it.
        source: What to call the checkpoint in messages.

    Raises:
        StartupError: the method or one of its values is not understood, or the flag contradicts the checkpoint.
    """
    if not values:
        if asked in (None, "gguf"):
            return None
        if asked not in _AT_LOAD:
            raise StartupError(
                f"--quantization {asked} needs a checkpoint that is quantised so, and {source} has no "
                f"quantization_config; {' and '.join(_AT_LOAD)} quantise whole weights at load."
            )
        if asked == "fp8":
            return QuantizationConfig("fp8", (Rule(("Linear",), Fp8Format("channel", at_load=True)),))
        return QuantizationConfig("int8_cpu")
    reader = _Reader(values, f"quantization_config of {source}")
    found = reader.method
    if found not in _READERS:
        raise StartupError(
            f"{source} holds weights quantised by {found!r}; supported are {', '.join(_READERS)} and GGUF."
        )
    if asked not in (None, found):
        raise StartupError(
            f"--quantization {asked} contradicts {source}, which is quantised by {found!r}; leave the flag out."
        )
    return _READERS[found](reader)


class _Reader:
    """Values of a `quantization_config`, checked as they are read."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source
        method = values.get("quant_method")
        if method is None and "quant_algo" in values:
            method = "modelopt"
        self.method = _ALIASES.get(str(method), str(method))

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name, default)
        return default if value is None else value

    def one_of(self, name: str, allowed: Sequence[Any], default: Any = None) -> Any:
        return self.checked(name, self.get(name, default), allowed)

    def checked(self, name: str, value: Any, allowed: Sequence[Any]) -> Any:
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            shown = ", ".join(repr(v) for v in allowed)
            raise StartupError(f"{self.source}: {name} is {value!r}; supported: {shown}.")
        return value

    def group(self, value: Any, name: str = "group_size") -> int:
        """0 for one group of all input features."""
        return 0 if value in (-1, None) else int(self.checked(name, value, _GROUPS))

    def names(self, *keys: str) -> tuple[str, ...]:
        """All that lists of module names under `keys` hold."""
        found: list[str] = []
        for key in keys:
            value = self.get(key, [])
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise StartupError(f"{self.source}: {key} must be a list of names, got {value!r:.100}.")
            found += value
        return tuple(found)

    def of(self, name: str) -> _Reader:
        """The object under a name."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise StartupError(f"{self.source}: {name} must be an object, got {value!r:.100}.")
        return _Reader(value, f"{self.source}: {name}")


def _all(method: str, format: WeightFormat, ignored: tuple[str, ...]) -> QuantizationConfig:
    return QuantizationConfig(method, (Rule(("Linear",), format),), ignored)


def _fp8(r: _Reader) -> QuantizationConfig:
    r.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    static = r.one_of("activation_scheme", ("dynamic", "static"), "dynamic") == "static"
    ignored = r.names("modules_to_not_convert", "ignored_layers")
    if r.get("weight_block_size") is None:
        return _all("fp8", Fp8Format("tensor", static=static), ignored)
    r.one_of("weight_block_size", ([128, 128],))
    return _all("fp8", Fp8Format("block", "weight_scale_inv"), ignored)


def _awq(r: _Reader) -> QuantizationConfig:
    r.checked("bits", r.get("bits", r.get("w_bit", 4)), (4,))
    r.checked("version", str(r.get("version", "gemm")).lower(), ("gemm",))
    group = r.group(r.get("group_size", r.get("q_group_size", 128)))
    symmetric = not r.one_of("zero_point", (True, False), True)
    return _all("awq", Int4Format("awq", group, symmetric), r.names("modules_to_not_convert"))


def _gptq(r: _Reader) -> QuantizationConfig:
    r.one_of("bits", (4,), 4)
    if r.get("dynamic"):
        raise StartupError(f"{r.source}: dynamic (other bits for some modules) is not supported.")
    form = Int4Format(
        layout="gptq",
        group=r.group(r.get("group_size", 128)),
        # Checkpoints have zeros all the same.
        symmetric=False,
        act_order=r.one_of("desc_act", (True, False), False),
        zeros_less_one=r.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq") == "gptq",
    )
    return _all("gptq", form, r.names("modules_to_not_convert"))


def _modelopt(r: _Reader) -> QuantizationConfig:
    inner = r.of("quantization") if "quantization" in r.values else r
    algorithm = str(inner.get("quant_algo", "none")).upper()
    inner.checked("quant_algo", algorithm, ("NVFP4", "FP8"))
    ignored = inner.names("exclude_modules", "ignore")
    if algorithm == "FP8":
        return _all("modelopt", Fp8Format("tensor", static=True), ignored)
    inner.one_of("group_size", (16,), 16)
    return _all("modelopt", Fp4Format("nv", "modelopt"), ignored)


def _mxfp4(r: _Reader) -> QuantizationConfig:
    """gpt-oss: its experts alone are quantised."""
    return QuantizationConfig("mxfp4", experts=Fp4Format("mx", "gpt-oss"))


def _compressed_tensors(r: _Reader) -> QuantizationConfig:
    for name in ("sparsity_config", "transform_config"):
        if r.of(name).values and r.of(name).get("format", name) not in ("dense",):
            raise StartupError(f"{r.source}: {name} is not supported.")
    if r.get("quantization_status", "compressed") != "compressed":
        raise StartupError(f"{r.source}: quantization_status is {r.get('quantization_status')!r}, not 'compressed'.")
    groups = r.of("config_groups")
    rules = [_compressed_group(groups.of(name), r.get("format")) for name in groups.values]
    if not rules:
        raise StartupError(f"{r.source}: config_groups is empty.")
    # What names single modules goes ahead of what means all of them.
    rules.sort(key=lambda rule: "Linear" in rule.targets)
    return QuantizationConfig("compressed-tensors", tuple(rules), r.names("ignore"))


def _compressed_group(group: _Reader, whole_format: str | None) -> Rule:
    weights = group.of("weights")
    inputs = group.of("input_activations")
    targets = group.names("targets") or ("Linear",)
    kind = weights.one_of("type", ("float", "int"), "int")
    bits = weights.one_of("num_bits", (4, 8))
    strategy = str(weights.get("strategy", "tensor"))
    packing = group.get("format") or whole_format
    if packing == "mixed-precision":
        packing = None
    known = {
        ("float", 8): ("float-quantized", "naive-quantized"),
        ("int", 8): ("int-quantized", "naive-quantized"),
        ("int", 4): ("pack-quantized",),
        ("float", 4): ("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
    }[kind, bits]
    if packing is not None or kind == "float":
        group.checked("format", packing or known[0], known)
    if kind == "float" and bits == 8:
        inputs.one_of("type", ("float",), "float")
        scales = weights.checked("strategy", strategy, ("tensor", "channel", "block"))
        if scales == "block":
            weights.one_of("block_structure", ([128, 128],), [128, 128])
        return Rule(targets, Fp8Format(scales, static=inputs.get("dynamic", True) is False))
    if kind == "int" and bits == 8:
        weights.one_of("symmetric", (True,), True)
        inputs.one_of("symmetric", (True,), True)
        if not inputs.values:
            raise StartupError(f"{group.source}: 8-bit weights without 8-bit inputs (W8A16) are not supported.")
        return Rule(targets, Int8Format(weights.checked("strategy", strategy, ("channel", "tensor"))))
    if inputs.values and not (kind == "float" and strategy in ("tensor_group", "group")):
        raise StartupError(f"{group.source}: 4-bit weights with quantised inputs are not supported.")
    if kind == "int":
        weights.checked("strategy", strategy, ("group", "channel"))
        size = weights.group(weights.get("group_size") if strategy == "group" else None)
        symmetric = weights.one_of("symmetric", (True, False), True)
        ordered = weights.get("actorder") not in (None, False, "static", "weight")
        return Rule(targets, Int4Format("compressed-tensors", size, symmetric, ordered))
    nv = packing == "nvfp4-pack-quantized" or (packing is None and weights.get("group_size") == 16)
    weights.one_of("group_size", (16,) if nv else (32,), 16 if nv else 32)
    return Rule(targets, Fp4Format("nv" if nv else "mx", "compressed-tensors"))


_READERS = {
    "fp8": _fp8,
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
}

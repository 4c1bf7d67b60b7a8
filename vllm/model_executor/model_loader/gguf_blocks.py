"""Which matrices of a GGUF file stay in their blocks on the CPU."""

from __future__ import annotations

from collections import Counter

from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.gguf import block_sizes
from vllm.model_executor.model_loader.gguf_weights import GGUFNames
from vllm.model_executor.models.spec import DecoderSpec
from vllm.model_executor.models.weight_map import weight_map
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.transformers_utils.gguf import GGUFFile, gguf_file
from vllm.transformers_utils.quantization_config import GGUFFormat, QuantizationConfig, Rule

logger = init_logger(__name__)

_MERGED = (".qkv", ".gate_up")
_TABLES = ("embedding", "head.table")
_WHOLE = ("F32", "F16", "BF16", "F64")


def blocks_for_cpu(path: str, spec: DecoderSpec, num_ranks: int) -> QuantizationConfig | None:
    """A rule for each layer, and for embedding and output projection, that the compiled CPU kernels multiply by as the
    file has it; None: there is none. Says once in the log what is dequantised.

    A layer of several parts (q, k and v) stays in blocks if all of them can.

    Args:
        path: Of the file.
        num_ranks: Tensor-parallel ranks; a share of a layer must consist of whole blocks and tiles.

    Raises:
        StartupError: the file has tensors that the network lacks.
    """
    types, parts_of = _types(gguf_file(path), spec)
    rules = []
    dequantised: Counter[str] = Counter()
    for module, names in parts_of.items():
        found = {part: types[name] for name, parts in names.items() for part in parts}
        kinds = {kind for kind, _ in found.values()}
        if kinds <= set(_WHOLE):
            continue
        if all(_fits(module, kind, shape, num_ranks) for kind, shape in found.values()) and _in_tiles(
            module, spec, num_ranks
        ):
            format = GGUFFormat(tuple((part, kind) for part, (kind, _) in found.items()))
            rules.append(Rule(tuple(names), format))
        else:
            dequantised.update(kind for kind, _ in found.values())
    if dequantised:
        which = ", ".join(f"{count} of {kind}" for kind, count in sorted(dequantised.items()))
        logger.info("Matrices that are dequantised as they are loaded, since no kernel takes them: %s.", which)
    return QuantizationConfig("gguf", tuple(rules)) if rules else None


def _types(
    file: GGUFFile, spec: DecoderSpec
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, dict[str, tuple[str, ...]]]]:
    """(name of a matrix without `.weight` → type and shape; module → its matrices and the parts that each holds)."""
    rows = weight_map(spec)
    types: dict[str, tuple[str, tuple[int, ...]]] = {}
    parts_of: dict[str, dict[str, tuple[str, ...]]] = {}
    for name, (place, _, _) in GGUFNames(file, spec).places().items():
        tensor, row = file.tensors[name], rows.get(place)
        if row is None or row.kind != "weight" or len(tensor.shape) != 2:
            continue
        stem = place.removesuffix(".weight")
        types[stem] = tensor.type.name, tensor.shape
        parts = row.parts if row.twin is None else (*row.parts, row.twin)
        if not row.module.endswith(_MERGED):
            parts = ("",)
        parts_of.setdefault(row.module, {})[stem] = parts
    return types, parts_of


def _fits(module: str, kind: str, shape: tuple[int, ...], num_ranks: int) -> bool:
    """The kernels know the type, and no rank's share cuts a block."""
    if kind not in cpu_kernels.BLOCK_TYPES:
        return False
    if module in _TABLES:
        return num_ranks == 1
    return module.endswith(_MERGED) or shape[1] % (block_sizes(kind)[0] * num_ranks) == 0


def _in_tiles(module: str, spec: DecoderSpec, num_ranks: int) -> bool:
    """The parts of a merged layer are whole tiles."""
    if not module.endswith(_MERGED):
        return True
    layer = spec.layers[int(module.split(".")[1])]
    mixer = layer.mixer
    heads = (mixer.num_heads, mixer.num_kv_heads)
    sizes = [layer.ffn.size] if module.endswith("gate_up") else [count * mixer.head_dim for count in heads]
    return all(size % (cpu_kernels.TILE * num_ranks) == 0 for size in sizes)

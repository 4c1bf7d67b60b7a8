"""Reads the weights of a checkpoint."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import PretrainedConfig

from vllm.exceptions import StartupError
from vllm.logger import init_logger
from vllm.model_executor.model_loader.gguf_weights import gguf_weights
from vllm.transformers_utils.gguf import GGUFFile
from vllm.transformers_utils.quantization_config import QuantizationConfig

logger = init_logger(__name__)

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_NOT_A_WEIGHT = "rotary_emb.inv_freq"
"""Old checkpoints store this buffer, which follows from the configuration."""


def iterate_weights(
    model_path: str, load_format: str, hf_config: PretrainedConfig, quantization: QuantizationConfig | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Hugging Face name, tensor) with a progress bar on stderr.

    Files are memory-mapped. A tensor may lie on such a mapping: copy it to keep it.

    Args:
        model_path: Directory, or `.gguf` file.
        load_format: `gguf` (tensors come dequantised to float32, but those that stay in blocks) or `safetensors`
            (tensors come as stored).
        hf_config: Shape of the network, which GGUF tensors are checked against.
        quantization: Which tensors of a GGUF file stay in blocks; None: none of them.

    Raises:
        StartupError: a file that is missing, truncated or damaged; the message names it.
    """
    if load_format == "gguf":
        file = GGUFFile(model_path)
        total, weights = len(file.tensors), gguf_weights(file, hf_config, quantization)
    elif load_format == "safetensors":
        shards = _find_shards(Path(model_path))
        total, weights = sum(map(len, shards.values())), _read_shards(shards)
    else:
        raise StartupError(f"Weights cannot be read as {load_format!r}; known are 'gguf' and 'safetensors'.")
    quiet = not logger.isEnabledFor(logging.INFO)
    yield from tqdm(weights, desc="Loading weights", total=total, unit="tensor", file=sys.stderr, disable=quiet)


def _find_shards(folder: Path) -> dict[Path, list[str]]:
    """File → names of the tensors to take from it. Opens every file, so that damage shows before loading starts."""
    index = folder / _INDEX_FILE
    if (folder / _SINGLE_FILE).is_file() or not index.is_file():
        files = [folder / _SINGLE_FILE] if (folder / _SINGLE_FILE).is_file() else sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            raise StartupError(f"{folder} holds {len(files)} safetensors files but no {_SINGLE_FILE} and no index.")
        return {files[0]: _tensor_names(files[0])}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StartupError(f"{index} cannot be read: {error!r}.") from error
    shards: dict[Path, list[str]] = {}
    for name, file in pairs:
        if name.endswith(_NOT_A_WEIGHT):
            continue
        if Path(file).name != file:
            raise StartupError(f"{index} names a file outside its directory: {file!r}.")
        shards.setdefault(folder / file, []).append(name)
    for path, names in shards.items():
        lost = set(names) - set(_tensor_names(path))
        if lost:
            raise StartupError(f"{path} lacks the tensor {min(lost)} that {index.name} says it holds.")
    return shards


def _tensor_names(path: Path) -> list[str]:
    if not path.is_file():
        raise StartupError(f"The weight file {path} is missing.")
    try:
        with safe_open(path, framework="pt") as file:
            return [name for name in file.keys() if not name.endswith(_NOT_A_WEIGHT)]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StartupError(f"The weight file {path} is truncated or damaged: {error}.") from error


def _read_shards(shards: dict[Path, list[str]]) -> Iterator[tuple[str, torch.Tensor]]:
    for path, names in shards.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)

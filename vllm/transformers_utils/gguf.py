"""Reads GGUF files: header and tensors.

The header is parsed here rather than with `gguf.GGUFReader`, which builds several objects for each of a vocabulary's
tokens and merges and takes seconds over it; sizes of quantised blocks and dequantisation are the `gguf` library's.
"""

from __future__ import annotations

import math
import mmap
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import gguf
import numpy as np
import torch

from vllm.exceptions import StartupError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF value type → struct code, little-endian."""


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: `shape` in row-major order (rows first), `offset` and `num_bytes` in the file."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


class GGUFFile:
    """A memory-mapped GGUF file.

    Attributes:
        metadata: Key → Python value (arrays as lists).
        tensors: Name → where it lies.

    Raises:
        StartupError: the file cannot be opened, is no GGUF, is truncated or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise StartupError(f"Cannot open {self.path}: {error.strerror}.") from error
        except ValueError:  # an empty file cannot be mapped
            raise StartupError(f"{self.path} is empty, not a GGUF file.") from None
        if self._data[:4] != _MAGIC:
            raise StartupError(f"{self.path} is not a GGUF file.")
        self._at = 4
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, ValueError, KeyError, OverflowError) as error:
            raise StartupError(f"{self.path} is truncated or damaged: {error}.") from error

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(key, default)

    def load(self, tensor: GGUFTensor) -> torch.Tensor:
        """The tensor dequantised: float32, `tensor.shape`, memory of its own."""
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[tensor.type]
        raw = np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.offset)
        row_bytes = tensor.shape[-1] // block_values * block_bytes
        try:
            values = gguf.dequantize(raw.reshape(*tensor.shape[:-1], row_bytes), tensor.type)
        except NotImplementedError:
            raise StartupError(
                f"{self.path}: tensor {tensor.name} is quantised as {tensor.type.name}, which cannot be read."
            ) from None
        return torch.from_numpy(np.array(values, dtype=np.float32).reshape(tensor.shape))

    def blocks(self, tensor: GGUFTensor) -> torch.Tensor:
        """The tensor as it is stored: uint8 [..., blocks, bytes of a block], read-only memory of the file."""
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[tensor.type]
        raw = np.frombuffer(self._data, np.uint8, tensor.num_bytes, tensor.offset)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(raw).view(*tensor.shape[:-1], tensor.shape[-1] // block_values, block_bytes)

    def _parse(self) -> None:
        version, num_tensors, num_keys = self._unpack("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} of the format, known are {_VERSIONS}")
        for _ in range(num_keys):
            key = self._string()
            (kind,) = self._unpack("I")
            self.metadata[key] = self._value(kind)
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"alignment {alignment}")
        data_start = math.ceil(self._at / alignment) * alignment
        for name, shape, kind, offset in entries:
            block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if shape[-1] % block_values:
                raise ValueError(f"rows of {shape[-1]} values in tensor {name} do not fill blocks of {block_values}")
            num_bytes = math.prod(shape) // block_values * block_bytes
            start = data_start + offset
            if start + num_bytes > len(self._data):
                raise ValueError(f"tensor {name} ends at byte {start + num_bytes} of {len(self._data)}")
            self.tensors[name] = GGUFTensor(name, shape, kind, start, num_bytes)

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
        name = self._string()
        (num_dims,) = self._unpack("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise ValueError(f"tensor {name} has {num_dims} dimensions")
        shape = self._unpack(f"{num_dims}Q")[::-1]
        kind, offset = self._unpack("IQ")
        return name, shape, gguf.GGMLQuantizationType(kind), offset

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack(_SCALARS[kind])[0]
        item_kind, count = self._unpack("IQ")
        if count > len(self._data) - self._at:
            raise ValueError(f"an array of {count} values does not fit in the file")
        if item_kind in (_STRING, _ARRAY):
            return [self._value(item_kind) for _ in range(count)]
        return list(self._unpack(f"{count}{_SCALARS[item_kind]}"))

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        end = self._at + length
        if end > len(self._data):
            raise ValueError(f"a string of {length} bytes does not fit in the file")
        raw = self._data[self._at : end]
        self._at = end
        return raw.decode("utf-8")

    def _unpack(self, code: str) -> tuple[Any, ...]:
        layout = struct.Struct("<" + code)
        values = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return values


_in_use: WeakValueDictionary[tuple[str, int, int], GGUFFile] = WeakValueDictionary()


def gguf_file(path: str | Path) -> GGUFFile:
    """The file, read once for all who use it at the same time: parsing a vocabulary takes most of a second.

    Raises:
        StartupError: as of `GGUFFile`.
    """
    try:
        status = Path(path).stat()
    except OSError as error:
        raise StartupError(f"Cannot open {path}: {error.strerror}.") from error
    key = (str(path), status.st_size, status.st_mtime_ns)
    file = _in_use.get(key)
    if file is None:
        file = _in_use[key] = GGUFFile(path)
    return file

"""Reads GGUF files: header, network shape, and weights under their Hugging Face names.

The header is parsed here rather than with `gguf.GGUFReader`, which builds several objects for each of a vocabulary's
tokens and merges and takes seconds over it; sizes of quantised blocks and dequantisation are the `gguf` library's.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import gguf
import numpy as np
import torch
from transformers import PretrainedConfig

from vllm.exceptions import StartupError
from vllm.transformers_utils.llama_config import LlamaConfig

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF value type → struct code, little-endian."""

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"


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


def gguf_config(file: GGUFFile) -> LlamaConfig:
    """The network's shape as a Hugging Face configuration.

    Raises:
        StartupError: an architecture or a variant of it that is not supported, or a missing key.
    """
    architecture = file.get("general.architecture")
    if architecture != "llama":
        raise StartupError(f"{file.path} holds architecture {architecture!r}; supported in GGUF is 'llama'.")

    def need(key: str) -> Any:
        value = file.get(f"llama.{key}")
        if value is None:
            raise StartupError(f"{file.path} lacks the key llama.{key}.")
        return value

    if file.get("llama.expert_count"):
        raise StartupError(f"{file.path} is a mixture of experts, which is not supported.")
    num_heads, hidden_size = need("attention.head_count"), need("embedding_length")
    num_kv_heads = file.get("llama.attention.head_count_kv", num_heads)
    if not all(isinstance(n, int) and n > 0 for n in (num_heads, num_kv_heads, hidden_size)):
        raise StartupError(f"{file.path} has a number of heads that varies by layer, which is not supported.")
    head_dim = file.get("llama.attention.key_length") or hidden_size // num_heads
    if file.get("llama.attention.value_length", head_dim) != head_dim:
        raise StartupError(f"{file.path} has keys and values of different size, which is not supported.")
    if file.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise StartupError(f"{file.path} rotates only a part of each head, which is not supported.")
    embedding = file.tensors.get("token_embd.weight")
    tokens = file.get("tokenizer.ggml.tokens")
    if embedding is None and tokens is None:
        raise StartupError(f"{file.path} has neither an embedding nor a vocabulary.")
    vocab_size = embedding.shape[0] if embedding is not None else len(tokens)
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=need("feed_forward_length"),
        num_hidden_layers=need("block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=need("context_length"),
        rms_norm_eps=need("attention.layer_norm_rms_epsilon"),
        rope_parameters=_rope_parameters(file),
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=file.get("tokenizer.ggml.eos_token_id"),
    )


def _rope_parameters(file: GGUFFile) -> dict[str, Any]:
    theta = float(file.get("llama.rope.freq_base", 10000.0))
    plain = {"rope_type": "default", "rope_theta": theta}
    factors = file.tensors.get(_ROPE_FACTORS)
    if factors is not None:
        divisors = file.load(factors)
        return plain if bool((divisors == 1).all()) else _llama3_parameters(file, divisors, theta)
    kind = file.get("llama.rope.scaling.type", "none")
    linear = file.get("llama.rope.scale_linear")
    if kind == "none" and linear in (None, 1.0):
        return plain
    if kind in ("none", "linear"):
        factor = float(file.get("llama.rope.scaling.factor", linear or 1.0))
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    raise StartupError(f"{file.path} scales its rotary embedding as {kind!r}; supported are 'none' and 'linear'.")


def _llama3_parameters(file: GGUFFile, divisors: torch.Tensor, theta: float) -> dict[str, Any]:
    """Recognises Llama 3's scaling in the divisors of the rotary frequencies (shape [head_dim / 2]).

    The file stores the divisors themselves. Hugging Face's configuration stores what they are computed from, of which
    only the largest varies between released models; the candidate is computed and must match.
    """
    factor = round(float(divisors.max()), 3)
    half = divisors.numel()
    wavelength = 2 * math.pi * theta ** (torch.arange(half, dtype=torch.float64) / half)
    smooth = ((8192 / wavelength - 1.0) / 3.0).clamp(0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not torch.allclose(expected, divisors.double(), rtol=1e-3):
        raise StartupError(f"{file.path} scales its rotary embedding in a way that is not supported ({_ROPE_FACTORS}).")
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def gguf_weights(file: GGUFFile, config: PretrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (Hugging Face name, float32 tensor), one tensor in memory at a time.

    Raises:
        StartupError: an unknown tensor, a missing one, or a shape that contradicts the configuration.
    """
    shapes = _expected_shapes(config)
    missing = shapes.keys() - {_hf_name(file, name) for name in file.tensors}
    if missing:
        raise StartupError(f"{file.path} lacks the weights of {min(missing)} ({len(missing)} missing in all).")
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for tensor in file.tensors.values():
        name = _hf_name(file, tensor.name)
        if name is None:
            continue
        if tensor.shape != shapes.get(name):
            raise StartupError(
                f"{file.path}: tensor {tensor.name} has shape {tensor.shape}, expected {shapes.get(name)}."
            )
        weight = file.load(tensor)
        num_heads = next((count for part, count in heads.items() if part in name), None)
        yield name, weight if num_heads is None else _to_half_rotation(weight, num_heads)


def _hf_name(file: GGUFFile, name: str) -> str | None:
    """None for what is no weight."""
    if name == _ROPE_FACTORS:
        return None
    if name in _TOP_TENSORS:
        return _TOP_TENSORS[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _LAYER_TENSORS:
        raise StartupError(f"{file.path} holds the tensor {name}, which a llama network of the supported kind lacks.")
    return f"model.layers.{int(match[1])}.{_LAYER_TENSORS[match[2]]}.weight"


def _expected_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    head_dim = config.head_dim or hidden // config.num_attention_heads
    num_kv_heads = config.num_key_value_heads or config.num_attention_heads
    q_size, kv_size = config.num_attention_heads * head_dim, num_kv_heads * head_dim
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        shapes.update({f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()})
    return shapes


def _to_half_rotation(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorders the rows of a query or key projection ([heads * head_dim, hidden]) to Hugging Face's rotary layout.

    GGUF rotates neighbours together (rows 2i and 2i+1 of a head), Hugging Face halves (i and i + head_dim/2).
    """
    rows, hidden = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)

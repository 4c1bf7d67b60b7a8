"""Weights of a GGUF file under the names that the network's own checkpoints have."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator

import torch
from transformers import PretrainedConfig

from vllm.exceptions import StartupError
from vllm.model_executor.models.registry import decoder_spec
from vllm.model_executor.models.spec import DecoderSpec
from vllm.model_executor.models.weight_map import weight_map
from vllm.transformers_utils.gguf import GGUFFile
from vllm.transformers_utils.gguf_config import NOT_WEIGHTS, architecture_of
from vllm.transformers_utils.quantization_config import QuantizationConfig

_PARTS = {
    "attn_norm": "pre_mixer",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_qkv": "qkv",
    "attn_output": "o",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "post_attention_norm": "post_mixer",
    "ffn_norm": "pre_ffn",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
    "post_ffw_norm": "post_ffn",
}
"""Name of a layer's tensor → the part of the layer, as `spec.LAYER_NAMES` has it."""


def gguf_weights(
    file: GGUFFile, config: PretrainedConfig, quantization: QuantizationConfig | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name in a Hugging Face checkpoint, tensor), one tensor in memory at a time.

    Tensors are float32. Those that stay in blocks are uint8 [N, blocks, bytes of a block] and lie in the file.

    Args:
        quantization: Says which stay in blocks; see `gguf_blocks`.

    Raises:
        StartupError: an unknown tensor, or a missing one.
    """
    names = GGUFNames(file, decoder_spec(config, config.max_position_embeddings))
    rules = () if quantization is None else quantization.rules
    yield from names.weights({f"{target}.weight" for rule in rules for target in rule.targets})


class GGUFNames:
    """Places of a file's tensors in a network.

    Args:
        spec: The network.
    """

    def __init__(self, file: GGUFFile, spec: DecoderSpec) -> None:
        self.file = file
        self.spec = spec
        self.architecture = architecture_of(file)
        self._wanted = weight_map(spec).keys()
        self._parts = _PARTS | dict(self.architecture.parts)
        names = spec.names
        self._top = {"token_embd": names.embedding, "output_norm": names.final_norm, "output": names.head}

    def places(self) -> dict[str, tuple[str, int, str]]:
        """Name in the file → (name in a checkpoint, layer, its part); layer -1 for what is in none.

        Raises:
            StartupError: an unknown tensor.
        """
        return {name: self._place(name) for name in self.file.tensors if name not in NOT_WEIGHTS}

    def weights(self, in_blocks: Container[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """As `gguf_weights`.

        Args:
            in_blocks: Names in a checkpoint of those that are not dequantised.
        """
        found = self.places()
        missing = self._wanted - {place for place, _, _ in found.values()}
        if missing:
            raise StartupError(f"{self.file.path} lacks the weights of {min(missing)} ({len(missing)} missing in all).")
        for name, (place, layer, part) in found.items():
            tensor = self.file.tensors[name]
            weight = self.file.blocks(tensor) if place in in_blocks else self.file.load(tensor)
            offset = self._offset(layer, part)
            if offset:
                # llama.cpp's conversion adds it, so that all its norms multiply by what is stored.
                weight -= offset
            if self.architecture.pairs and part in ("q", "k"):
                weight = self._halves(name, weight, layer, part)
            yield place, weight

    def _place(self, name: str) -> tuple[str, int, str]:
        stem, _, kind = name.rpartition(".")
        if stem in self._top and kind in ("weight", "bias"):
            return f"{self._top[stem]}.{kind}", -1, stem
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        part = "" if match is None else self._parts.get(match[2], "")
        names = self.spec.names
        if match is None or part not in names.parts or int(match[1]) >= len(self.spec.layers):
            raise self._unknown(name)
        place = f"{names.layers}.{int(match[1])}.{names.parts[part]}.{match[3]}"
        if place not in self._wanted:
            raise self._unknown(name)
        return place, int(match[1]), part

    def _unknown(self, name: str) -> StartupError:
        return StartupError(
            f"{self.file.path} holds the tensor {name}, which a network of architecture "
            f"{self.file.get('general.architecture')!r} with its other values lacks."
        )

    def _offset(self, layer: int, part: str) -> float:
        """What the network adds to the weights of a norm."""
        if part == "output_norm":
            return self.spec.final_norm.offset
        if part in ("q_norm", "k_norm"):
            norm = self.spec.layers[layer].mixer.qk_norm
            return 0.0 if norm is None else norm.offset
        if part in ("pre_mixer", "post_mixer", "pre_ffn", "post_ffn"):
            return self.spec.layers[layer].norms.norm.offset
        return 0.0

    def _halves(self, name: str, weight: torch.Tensor, layer: int, part: str) -> torch.Tensor:
        """Reorders the rows of a query or key projection, [heads * head_dim, ...]: here rows 2i and 2i+1 of a head turn
        together, at Hugging Face i and i + head_dim/2."""
        mixer = self.spec.layers[layer].mixer
        num_heads = mixer.num_heads if part == "q" else mixer.num_kv_heads
        if len(weight) != num_heads * mixer.head_dim:
            raise StartupError(
                f"{self.file.path}: tensor {name} has shape {tuple(weight.shape)}, expected "
                f"{num_heads * mixer.head_dim} rows."
            )
        return weight.unflatten(0, (num_heads, mixer.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

"""Matrices in the blocks of GGUF types, and what the `gguf` library makes of them."""

from __future__ import annotations

import gguf
import numpy as np
import torch

from vllm.ops.cpu.kernels import BLOCK_TYPES, BlockRows

GGUF_TYPES = BLOCK_TYPES[:-1]
# Offsets of the half-precision scales in a block of those types that the library does not quantise to.
_SCALES_AT = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}


def gguf_blocks(name: str, n: int, k: int, seed: int = 0) -> tuple[np.ndarray, torch.Tensor]:
    """uint8 [N, bytes of a row], and the weights that it stands for, float32 [N, K]."""
    kind = gguf.GGMLQuantizationType[name]
    rng = np.random.default_rng(seed)
    if name in _SCALES_AT:
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (n, k // weights, size), dtype=np.uint8)
        for at in _SCALES_AT[name]:
            scales = (rng.standard_normal((n, k // weights, 1)) * 0.01).astype(np.float16)
            blocks[..., at : at + 2] = scales.view(np.uint8)
        raw = blocks.reshape(n, -1)
    else:
        raw = gguf.quantize(rng.standard_normal((n, k)).astype(np.float32), kind)
    return raw, torch.from_numpy(gguf.dequantize(raw, kind).astype(np.float32))


def block_rows(name: str, n: int, k: int, seed: int = 0) -> tuple[BlockRows, torch.Tensor]:
    """As the kernels take it, and the weights in float32 [N, K]."""
    raw, weight = gguf_blocks(name, n, k, seed)
    return BlockRows(torch.from_numpy(raw), k, name), weight

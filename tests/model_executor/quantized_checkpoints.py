"""Matrices in the formats of published checkpoints, packed here by the published layouts, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig

from vllm.ops.quantization import pack_int4

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


class Packed(NamedTuple):
    """The tensors of a matrix by the ends of their names, and the matrix in float32."""

    tensors: dict[str, torch.Tensor]
    matrix: torch.Tensor


class Form(NamedTuple):
    """A `quantization_config`, and what packs a matrix [N, K] so."""

    config: dict[str, Any]
    pack: Callable[[torch.Tensor], Packed]


def _fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8_tensor(weight: torch.Tensor) -> Packed:
    scale = weight.abs().max() / 448
    codes = _fp8(weight, scale)
    return Packed({"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.1)}, codes.float() * scale)


def fp8_channel(weight: torch.Tensor) -> Packed:
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = _fp8(weight, scale.float())
    return Packed({"weight": codes, "weight_scale": scale}, codes.float() * scale.float())


def fp8_block(weight: torch.Tensor, name: str = "weight_scale_inv") -> Packed:
    n, k = weight.shape
    rows, columns = -(-n // 128), -(-k // 128)
    padded = torch.zeros(rows * 128, columns * 128)
    padded[:n, :k] = weight
    scale = padded.view(rows, 128, columns, 128).abs().amax((1, 3)) / 448
    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:n, :k]
    codes = _fp8(weight, wide)
    return Packed({"weight": codes, name: scale}, codes.float() * wide)


def int8_channel(weight: torch.Tensor) -> Packed:
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().clamp(-127, 127).to(torch.int8)
    return Packed({"weight": codes, "weight_scale": scale}, codes.float() * scale)


class Codes(NamedTuple):
    """Codes uint8 [N, K], scales and zeros [N, groups]."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def matrix(self, group: int) -> torch.Tensor:
        scales, zeros = (x.repeat_interleave(group, 1) for x in (self.scales.float(), self.zeros.float()))
        return (self.codes.float() - zeros) * scales


def int4_codes(weight: torch.Tensor, group: int, symmetric: bool) -> Codes:
    n, k = weight.shape
    parts = weight.view(n, k // group, group)
    if symmetric:
        scales = (parts.abs().amax(2) / 7).half()
        zeros = torch.full((n, k // group), 8, dtype=torch.uint8)
    else:
        low, high = parts.amin(2), parts.amax(2)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15).to(torch.uint8)
    codes = (parts / scales.float().unsqueeze(2)).round() + zeros.unsqueeze(2)
    return Codes(codes.clamp(0, 15).to(torch.uint8).view(n, k), scales, zeros)


def awq(group: int) -> Form:
    def pack(weight: torch.Tensor) -> Packed:
        size = group if group > 0 else weight.shape[1]
        form = int4_codes(weight, size, symmetric=False)
        tensors = {
            "qweight": pack_int4(form.codes.T, 1, AWQ_ORDER),
            "qzeros": pack_int4(form.zeros.T, 1, AWQ_ORDER),
            "scales": form.scales.T,
        }
        return Packed(tensors, form.matrix(size))

    return Form({"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}, pack)


def gptq(group: int, act_order: bool = False, version: str = "gptq") -> Form:
    def pack(weight: torch.Tensor) -> Packed:
        k = weight.shape[1]
        size = group if group > 0 else k
        order = torch.arange(k)
        if act_order:
            order = torch.randperm(k, generator=torch.Generator().manual_seed(k))
        form = int4_codes(weight[:, order], size, symmetric=False)
        back = torch.argsort(order)
        zeros = form.zeros.clamp(min=1)
        form = form._replace(zeros=zeros)
        stored = zeros - 1 if version == "gptq" else zeros
        tensors = {
            "qweight": pack_int4(form.codes[:, back].T, 0),
            "qzeros": pack_int4(stored.T, 1),
            "scales": form.scales.T,
            "g_idx": (back // size).int(),
        }
        return Packed(tensors, form.matrix(size)[:, back])

    values = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": act_order}
    return Form(values | {"sym": False, "checkpoint_format": version}, pack)


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None, packing: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def pack_quantized(group: int, symmetric: bool) -> Form:
    def pack(weight: torch.Tensor) -> Packed:
        size = group if group > 0 else weight.shape[1]
        form = int4_codes(weight, size, symmetric)
        tensors = {
            "weight_packed": pack_int4(form.codes, 1),
            "weight_scale": form.scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack_int4(form.zeros, 0)
        return Packed(tensors, form.matrix(size))

    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group" if group > 0 else "channel"}
    weights["group_size"] = group if group > 0 else None
    return Form(compressed(weights, None, "pack-quantized"), pack)


def _e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    nearest = (values.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    return (nearest + 8 * (values < 0)).to(torch.uint8)


def _fp4(weight: torch.Tensor, scales: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two codes a byte, and the matrix."""
    wide = scales.repeat_interleave(group, 1)
    codes = _e2m1_codes(weight / wide)
    values = E2M1[(codes & 7).int()] * torch.where(codes >= 8, -1.0, 1.0)
    return codes[:, 0::2] | codes[:, 1::2] << 4, values * wide


def mxfp4(weight: torch.Tensor) -> Packed:
    exponents = (weight.view(len(weight), -1, 32).abs().amax(2) / 6).log2().ceil()
    packed, matrix = _fp4(weight, torch.exp2(exponents), 32)
    return Packed({"weight_packed": packed, "weight_scale": (exponents + 127).to(torch.uint8)}, matrix)


def nvfp4(modelopt: bool) -> Callable[[torch.Tensor], Packed]:
    def pack(weight: torch.Tensor) -> Packed:
        whole = weight.abs().max() / (6 * 448)
        of_group = (weight.view(len(weight), -1, 16).abs().amax(2) / 6 / whole).to(torch.float8_e4m3fn)
        stored = whole if modelopt else 1 / whole
        packed, matrix = _fp4(weight, of_group.float() * (stored if modelopt else 1 / stored), 16)
        names = ("weight", "weight_scale_2", "input_scale")
        if not modelopt:
            names = ("weight_packed", "weight_global_scale", "input_global_scale")
        tensors = {names[0]: packed, names[1]: stored.view(1), names[2]: torch.ones(1), "weight_scale": of_group}
        return Packed(tensors, matrix)

    return pack


_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
_FP4 = {"num_bits": 4, "type": "float", "symmetric": True}

FORMS: dict[str, Form] = {
    "fp8 tensor": Form({"quant_method": "fp8", "activation_scheme": "static"}, fp8_tensor),
    "fp8 block": Form({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, fp8_block),
    "fp8 channel": Form(compressed(_FLOAT8 | {"strategy": "channel"}, _TOKEN, "float-quantized"), fp8_channel),
    "fp8 compressed block": Form(
        compressed(_FLOAT8 | {"strategy": "block", "block_structure": [128, 128]}, _TOKEN, "float-quantized"),
        lambda weight: fp8_block(weight, "weight_scale"),
    ),
    "fp8 modelopt": Form({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}, fp8_tensor),
    "int8": Form(
        compressed(
            {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            _TOKEN | {"type": "int"},
            "int-quantized",
        ),
        int8_channel,
    ),
    "mxfp4": Form(
        compressed(_FP4 | {"strategy": "group", "group_size": 32}, None, "mxfp4-pack-quantized"),
        mxfp4,
    ),
    "nvfp4": Form(
        compressed(_FP4 | {"strategy": "tensor_group", "group_size": 16}, None, "nvfp4-pack-quantized"),
        nvfp4(modelopt=False),
    ),
    "nvfp4 modelopt": Form(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}, nvfp4(modelopt=True)
    ),
    **{f"awq {group}": awq(group) for group in (32, 64, 128, -1)},
    **{f"gptq {group}": gptq(group) for group in (32, 64, 128, -1)},
    "gptq v2": gptq(64, version="gptq_v2"),
    "gptq act-order": gptq(32, act_order=True),
    **{f"pack {group}": pack_quantized(group, symmetric=True) for group in (32, 64, 128, -1)},
    **{f"pack asymmetric {group}": pack_quantized(group, symmetric=False) for group in (32, 128, -1)},
}


def llama_config(**changes: Any) -> LlamaConfig:
    """Sizes that all groups divide; q, k and v of different sizes, no multiples of 128 some of them."""
    options: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(**(options | changes))


def llama_tensors(config: LlamaConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random checkpoint with whole weights in float32."""
    generator = torch.Generator().manual_seed(seed)
    hidden, wide = config.hidden_size, config.intermediate_size
    q, kv = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    shapes = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    tensors = {
        f"model.layers.{i}.{name}.weight": torch.randn(shape, generator=generator) * 0.3
        for i in range(config.num_hidden_layers)
        for name, shape in shapes.items()
    }
    for i in range(config.num_hidden_layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(hidden)
    tensors["model.norm.weight"] = torch.ones(hidden)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(config.vocab_size, hidden, generator=generator)
    return tensors


def quantised(tensors: dict[str, torch.Tensor], form: Form) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A checkpoint's layers packed, and the same checkpoint with whole weights of the same values."""
    packed, whole = {}, {}
    for name, tensor in tensors.items():
        if ".layers." not in name or tensor.dim() == 1 or not name.endswith("_proj.weight"):
            packed[name] = whole[name] = tensor
            continue
        pieces, whole[name] = form.pack(tensor)
        packed |= {f"{name.removesuffix('weight')}{kind}": x.contiguous() for kind, x in pieces.items()}
    return packed, whole

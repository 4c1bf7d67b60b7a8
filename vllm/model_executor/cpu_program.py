"""A decoder as a program of the compiled CPU kernels: all layers of a step in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm.attention.layer import ForwardContext
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RowNorm
from vllm.model_executor.layers.quantization.cpu_packed import CpuPacked
from vllm.model_executor.models.spec import DecoderSpec, LayerSpec
from vllm.ops.cpu import kernels as cpu_kernels

if TYPE_CHECKING:
    from vllm.model_executor.models.decoder import Decoder

logger = init_logger(__name__)


def misfit_of_sizes(spec: DecoderSpec, num_ranks: int, dtype: torch.dtype) -> str | None:
    """Why the matrices of a network cannot be packed, or None."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {str(dtype).removeprefix('torch.')} is neither float32 nor bfloat16"
    sizes = {"hidden_size": {spec.hidden_size}}
    sizes["intermediate_size"] = {layer.ffn.size // num_ranks for layer in spec.layers}
    mixers = {layer.mixer for layer in spec.layers}
    sizes["the size of all heads"] = {mixer.num_heads * mixer.head_dim // num_ranks for mixer in mixers}
    for name, found in sizes.items():
        for size in found:
            if size % cpu_kernels.TILE:
                return f"{name} {size} is no multiple of {cpu_kernels.TILE}"
    return None


class CpuProgram:
    """The layers of a network, their matrices moved into packed copies one by one.

    Args:
        model: Its linear layers are emptied; embedding and output projection stay with it.
    """

    def __init__(self, model: Decoder) -> None:
        method = model.build.method
        if not isinstance(method, CpuPacked):
            raise TypeError("a program is made of packed matrices")
        layers = [
            cpu_kernels.LayerWeights(
                _norm_weight(layer.pre_mixer),
                _norm_weight(layer.pre_ffn),
                method.pack(layer.mixer.qkv),
                method.pack(layer.mixer.o),
                method.pack(layer.ffn.gate_up, interleave=True),
                method.pack(layer.ffn.down),
            )
            for layer in model.layers
        ]
        wish, rotary = model.attention_specs[0], model.rotaries[0]
        self._stack = cpu_kernels.DecoderStack(
            layers,
            _norm_weight(model.norm),
            rotary.cos_sin,
            wish.num_heads,
            wish.num_kv_heads,
            wish.head_dim,
            model.norm.norm.eps,
        )
        if model.dtype == torch.bfloat16:
            # Results differ in the last bits, so whoever compares two runs wants to know.
            how = cpu_kernels.ARITHMETICS[cpu_kernels.arithmetic()]
            logger.info("bfloat16 is multiplied %s, the fastest here.", how)

    @staticmethod
    def misfit(spec: DecoderSpec) -> str | None:
        """What a network has that the kernels do not compute, or None."""
        first = spec.layers[0]
        if any(layer != first for layer in spec.layers):
            return "its layers differ"
        if spec.embedding_multiplier != 1.0 or spec.logits_multiplier != 1.0 or spec.logits_softcap is not None:
            return "its embeddings or logits are scaled or capped"
        if spec.final_norm != first.norms.norm or spec.final_norm_bias:
            return "its last norm is another one than those of its layers"
        return _misfit_of_layer(first)

    def steps(
        self,
        head: cpu_kernels.PackedMatrix,
        embeddings: torch.Tensor,
        rows: cpu_kernels.SequenceRows,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> cpu_kernels.CompiledSteps:
        """Whole steps over the sequences of a model runner."""
        self._stack.use_caches(k_caches, v_caches)
        return cpu_kernels.CompiledSteps(self._stack, head, embeddings, rows)

    def forward(self, embeddings: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[T, hidden_size] → float32 states, as `Decoder.forward`."""
        caches = context.k_caches, context.v_caches
        return self._stack.forward(embeddings, context.positions, *caches, context.prepared[0], context.wanted)


def _norm_weight(norm: nn.Module) -> torch.Tensor:
    """float32 [hidden_size]."""
    if not isinstance(norm, RowNorm):
        raise TypeError(f"a program needs a norm where the network has {type(norm).__name__}")
    return norm.weight.float() + norm.norm.offset


def _misfit_of_layer(layer: LayerSpec) -> str | None:
    mixer, norms = layer.mixer, layer.norms
    if norms.norm.kind != "rms" or norms.has_bias or not (norms.pre_mixer and norms.pre_ffn):
        return "its norms are not root mean squares ahead of each block"
    if norms.post_mixer or norms.post_ffn or layer.parallel or layer.residual_multiplier != 1.0:
        return "it adds to the residual stream in another way"
    if layer.ffn.activation != "silu" or not layer.ffn.gated:
        return f"its activation is {layer.ffn.activation}{'' if layer.ffn.gated else ' without a gate'}"
    if mixer.rope is None or mixer.rope.interleaved or 2 * len(mixer.rope.frequencies) != mixer.head_dim:
        return "its positions are not those of whole heads turned by halves"
    if mixer.qk_norm is not None:
        return "it normalises queries and keys"
    if mixer.v_norm is not None or mixer.query_growth is not None or layer.has_scalar:
        return "it normalises values, or scales queries by position or its layers' outputs"
    if mixer.window is not None or mixer.softcap is not None or mixer.sinks:
        return "its attention has a window, a cap or sinks"
    if mixer.scale != mixer.head_dim**-0.5:
        return f"its scores are scaled by {mixer.scale:g}"
    return None

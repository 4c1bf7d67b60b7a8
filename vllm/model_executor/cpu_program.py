"""A decoder as a program of the compiled CPU kernels: all layers of a step in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm.attention.layer import ForwardContext
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import HeadNorms, RowNorm
from vllm.model_executor.layers.moe import MixtureOfExperts
from vllm.model_executor.layers.quantization.cpu_packed import CpuPacked
from vllm.model_executor.models.spec import DecoderSpec, MoE
from vllm.ops.cpu import kernels as cpu_kernels

if TYPE_CHECKING:
    from vllm.model_executor.models.decoder import AttentionBlock, Decoder, DecoderLayer

logger = init_logger(__name__)


def misfit_of_sizes(spec: DecoderSpec, num_ranks: int, dtype: torch.dtype) -> str | None:
    """Why the matrices of a network cannot be packed, or None."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {str(dtype).removeprefix('torch.')} is neither float32 nor bfloat16"
    if not spec.logits_multiplier > 0:
        return f"its logits are multiplied by {spec.logits_multiplier:g}"
    sizes = {"hidden_size": {spec.hidden_size}}
    mlps = [layer.ffn.shared if isinstance(layer.ffn, MoE) else layer.ffn for layer in spec.layers]
    sizes["intermediate_size"] = {mlp.size // num_ranks for mlp in mlps if mlp is not None}
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

    Attributes:
        stack: What the kernels run.
    """

    def __init__(self, model: Decoder) -> None:
        method = model.build.method
        if not isinstance(method, CpuPacked):
            raise TypeError("a program is made of packed matrices")
        self.stack = cpu_kernels.DecoderProgram(
            [_layer(layer, method) for layer in model.layers], _norm(model.norm), model.embedding_multiplier
        )
        has_window = [spec.window is not None for spec in model.attention_specs]
        self._full_plan = has_window.index(False) if False in has_window else 0
        self._window_plan = has_window.index(True) if True in has_window else 0
        if model.dtype == torch.bfloat16:
            # Results differ in the last bits, so whoever compares two runs wants to know.
            how = cpu_kernels.ARITHMETICS[cpu_kernels.arithmetic()]
            logger.info("bfloat16 is multiplied %s, the fastest here.", how)

    @staticmethod
    def misfit(spec: DecoderSpec) -> str | None:
        """What a network has that the kernels do not compute, or None; sizes and heads apart (`misfit_of_sizes`, and
        `misfit` of the attention backend)."""
        for layer in spec.layers:
            if isinstance(layer.ffn, MoE):
                return "they have experts"
            if layer.ffn.activation not in cpu_kernels.ACTIVATIONS:
                return f"its activation is {layer.ffn.activation}"
        return None

    def steps(
        self,
        head: cpu_kernels.PackedHead,
        embeddings: torch.Tensor | cpu_kernels.BlockMatrix,
        rows: cpu_kernels.SequenceRows,
        k_caches: list[torch.Tensor],
        v_caches: list[torch.Tensor],
    ) -> cpu_kernels.CompiledSteps:
        """Whole steps over the sequences of a model runner."""
        self.stack.use_caches(k_caches, v_caches)
        return cpu_kernels.CompiledSteps(self.stack, head, embeddings, rows)

    def forward(self, embeddings: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Rows of the embedding table [T, hidden_size] → float32 states, as `Decoder.forward`."""
        caches = context.k_caches, context.v_caches
        # Plans of one cache group do not differ: the kernels cut a batch by the window of each layer themselves.
        batch, within = context.prepared[self._full_plan], None
        if context.window_slots is not None:
            within = context.prepared[self._window_plan]
        return self.stack.forward(embeddings, context.positions, *caches, batch, context.wanted, within)


def _layer(layer: DecoderLayer, method: CpuPacked) -> cpu_kernels.DecoderLayer:
    """Takes the matrices out of `layer`."""
    mixer, ffn = layer.mixer, layer.ffn
    if isinstance(ffn, MixtureOfExperts):
        raise TypeError("experts are no part of a program")
    return cpu_kernels.DecoderLayer(
        _attention(mixer),
        method.pack(mixer.qkv),
        method.pack(mixer.o),
        method.pack(ffn.gate_up, interleave=ffn.gated),
        method.pack(ffn.down),
        before_attention=_norm(layer.pre_mixer),
        after_attention=_norm(layer.after_mixer.norm),
        before_mlp=_norm(layer.pre_ffn),
        after_mlp=_norm(layer.after_ffn.norm),
        activation=ffn.activation,
        gated=ffn.gated,
        parallel=layer.parallel,
        residual_factor=layer.after_mixer.multiplier,
        layer_factor=1.0 if layer.scalar is None else float(layer.scalar),
    )


def _attention(mixer: AttentionBlock) -> cpu_kernels.AttentionOptions:
    wish, rope, sinks = mixer.attention.spec, mixer.rope(), mixer.attention.sinks
    return cpu_kernels.AttentionOptions(
        wish.num_heads,
        wish.num_kv_heads,
        wish.head_dim,
        wish.scale,
        wish.window,
        wish.softcap,
        None if sinks is None else sinks.float(),
        _norm(mixer.q_norm),
        _norm(mixer.k_norm),
        _norm(mixer.v_norm),
        None if rope is None else cpu_kernels.Rope(rope.cos_sin, rope.interleaved),
        mixer.query_factors(),
    )


def _norm(norm: nn.Module | None) -> cpu_kernels.Norm | None:
    """As the kernels take it; None where the network has none."""
    if isinstance(norm, RowNorm):
        return cpu_kernels.Norm.of(norm.norm, norm.weight, norm.bias)
    if isinstance(norm, HeadNorms):
        heads, size = norm.heads
        if norm.weight is None:
            return cpu_kernels.Norm(size, norm.norm.eps, kind=norm.norm.kind)
        weight = norm.weight.float().flatten() + norm.norm.offset
        return cpu_kernels.Norm(size, norm.norm.eps, weight, kind=norm.norm.kind, heads=heads)
    return None

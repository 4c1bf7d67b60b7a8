"""Networks from configurations, small and random, and steps over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig

from vllm.attention.backends.base import AttentionBackend
from vllm.attention.backends.torch import TorchAttentionBackend
from vllm.attention.layer import ForwardContext
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.model_executor.cpu_program import CpuProgram
from vllm.model_executor.layers.quantization.cpu_packed import CpuPacked
from vllm.model_executor.layers.quantization.unquantized import Unquantized
from vllm.model_executor.models.decoder import Build, Decoder
from vllm.model_executor.models.registry import decoder_spec
from vllm.ops.attention.metadata import AttentionMetadata

BLOCK = 4


def make_decoder(
    config: PretrainedConfig,
    dtype: torch.dtype = torch.float32,
    *,
    packed: bool = False,
    max_positions: int | None = None,
) -> Decoder:
    """The network of a configuration, its weights undefined.

    Args:
        packed: `finish` packs its matrices for the compiled CPU kernels, which then compute whole steps if they can.
    """
    spec = decoder_spec(config, max_positions or config.max_position_embeddings)
    compiled = packed and CpuProgram.misfit(spec) is None
    method = CpuPacked(int8=False) if packed else Unquantized()
    build = Build(
        TensorParallelGroup(), method, max_positions or config.max_position_embeddings, dtype, compiled=compiled
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Decoder(spec, build).eval()
    finally:
        torch.set_default_dtype(before)


def logits_of(
    model: Decoder,
    token_ids: list[int],
    backend: AttentionBackend | None = None,
    block: int = BLOCK,
    chunks: Sequence[int] | None = None,
) -> torch.Tensor:
    """Logits at every position of one sequence, over a KV cache of its own.

    Args:
        chunks: Tokens of each step; None: all in one.
    """
    backend = backend or TorchAttentionBackend()
    blocks = list(reversed(range(-(-len(token_ids) // block))))
    rows = [(cache.k, cache.v) for cache in model.caches()]
    k_caches = [torch.zeros(len(blocks) * block, k.num_heads, k.dim, dtype=k.dtype) for k, _ in rows]
    v_caches = [torch.zeros(len(blocks) * block, v.num_heads, v.dim, dtype=v.dtype) for _, v in rows]
    logits, first = [], 0
    for size in chunks or [len(token_ids)]:
        positions = torch.arange(first, first + size)
        slots = torch.tensor(blocks)[positions // block] * block + positions % block
        metadata = AttentionMetadata(slots, torch.tensor([blocks]), [size], [first + size], [], block)
        context = ForwardContext(
            backend=backend,
            prepared=backend.prepare(metadata, model.attention_specs),
            positions=positions,
            slot_mapping=slots,
            k_caches=k_caches,
            v_caches=v_caches,
        )
        with torch.inference_mode():
            logits.append(model.logits(model(torch.tensor(token_ids[first : first + size]), context)).clone())
        first += size
    return torch.cat(logits)

"""Networks from configurations, small and random, and steps over them."""

from __future__ import annotations

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
from vllm.model_executor.models.spec import DecoderSpec
from vllm.ops.attention.metadata import AttentionMetadata, PrefixGroup
from vllm.ops.cpu.kernels import SequenceRows
from vllm.ops.sampling import SamplingTables
from vllm.transformers_utils.quantization_config import QuantizationConfig

BLOCK = 4


def make_decoder(
    config: PretrainedConfig,
    dtype: torch.dtype = torch.float32,
    *,
    packed: bool = False,
    int8: bool = False,
    max_positions: int | None = None,
    tp: TensorParallelGroup | None = None,
) -> Decoder:
    """The network of a configuration, its weights undefined.

    Args:
        packed: `finish` packs its matrices for the compiled CPU kernels, which then compute whole steps if they can.
        int8: Its matrices become int8 as they are packed.
        tp: Place of this rank among several.
    """
    max_positions = max_positions or config.max_position_embeddings
    spec = decoder_spec(config, max_positions)
    return decoder_of(spec, dtype, packed=packed, int8=int8, max_positions=max_positions, tp=tp)


def decoder_of(
    spec: DecoderSpec,
    dtype: torch.dtype = torch.float32,
    *,
    packed: bool = False,
    int8: bool = False,
    max_positions: int = 64,
    quantization: QuantizationConfig | None = None,
    tp: TensorParallelGroup | None = None,
) -> Decoder:
    """`make_decoder` of a network that no configuration need describe."""
    tp = tp or TensorParallelGroup()
    compiled = packed and tp.world_size == 1 and CpuProgram.misfit(spec) is None
    method = CpuPacked(int8) if packed else Unquantized()
    build = Build(tp, method, max_positions, dtype, compiled=compiled, quantization=quantization)
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
    *,
    pinned: int = 0,
    chunk: int | None = None,
    device: str = "cpu",
) -> torch.Tensor:
    """Logits at every position of one sequence, over a KV cache of its own.

    Args:
        pinned: So many of the tokens are a pinned prompt: computed first, into an extent that the others read.
        chunk: At most so many tokens are computed in a step; None: all that can be.
        device: Where the network is.
    """
    backend = backend or TorchAttentionBackend()
    own = list(reversed(range(-(-(len(token_ids) - pinned) // block))))
    extent = list(range(len(own), len(own) + -(-pinned // block)))
    num_slots = (len(own) + len(extent)) * block
    rows = [(cache.k, cache.v) for cache in model.caches()]
    k_caches = [torch.zeros(num_slots, k.num_heads, k.dim, dtype=k.dtype, device=device) for k, _ in rows]
    v_caches = [torch.zeros(num_slots, v.num_heads, v.dim, dtype=v.dtype, device=device) for _, v in rows]

    def step(blocks: list[int], offset: int, start: int, end: int) -> torch.Tensor:
        """Tokens from `start` to `end`, whose own tokens lie in `blocks` and begin at `offset`."""
        positions = torch.arange(start, end, device=device)
        places = positions - offset
        slots = torch.tensor(blocks, device=device)[places // block] * block + places % block
        groups = [PrefixGroup(0, end - start, extent[0] * block, offset)] if offset else []
        metadata = AttentionMetadata(
            slots, torch.tensor([blocks], device=device), [end - start], [end - offset], groups, block
        )
        prepared = backend.prepare(metadata, model.attention_specs)
        context = ForwardContext(backend, prepared, positions, slots, k_caches, v_caches)
        return model.logits(model(torch.tensor(token_ids[start:end], device=device), context))

    pieces = []
    with torch.inference_mode():
        for blocks, first, last in ((extent, 0, pinned), (own, pinned, len(token_ids))):
            size = chunk or max(1, last - first)
            for start in range(first, last, size):
                pieces.append(step(blocks, first, start, min(start + size, last)))
    return torch.cat(pieces)


@torch.inference_mode()
def logits_of_compiled_steps(model: Decoder, token_ids: list[int], *, pinned: int) -> torch.Tensor:
    """Logits at the positions behind a pinned prompt, each token a step, and a step one call of the compiled kernels
    from token ids to logits, as the engine decodes."""
    block = 16
    own = list(range(-(-(len(token_ids) - pinned) // block)))
    extent = list(range(len(own), len(own) + -(-pinned // block)))
    width = max(len(own), len(extent))
    tables = torch.tensor([blocks + [0] * (width - len(blocks)) for blocks in (own, extent)])
    ids = torch.tensor([[*token_ids, 0]] * 2)
    rows = SequenceRows(ids, tables, torch.tensor([pinned, 0]), block)
    num_slots = (len(own) + len(extent)) * block
    k_caches, v_caches = (
        [torch.zeros(num_slots, row.num_heads, row.dim, dtype=row.dtype) for row in (c.k for c in model.caches())]
        for _ in range(2)
    )
    steps = model.compiled_steps(rows, k_caches, v_caches)
    assert steps is not None
    sampling = SamplingTables.make(2, model.spec.vocab_size, torch.device("cpu"))
    steps.hidden([1], [0], [pinned], [False], [])
    out = []
    for position in range(pinned, len(token_ids)):
        logits = torch.empty(1, model.spec.vocab_size)
        groups = [PrefixGroup(0, 1, extent[0] * block, pinned)]
        (drawn,) = steps.draw([0], [position], [1], [True], groups, sampling, logits_out=logits)
        assert drawn == int(logits.argmax())
        ids[0, : len(token_ids)] = torch.tensor(token_ids)  # the draw has put its token there
        out.append(logits)
    return torch.cat(out)

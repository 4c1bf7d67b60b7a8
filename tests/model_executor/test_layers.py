"""Layers against plain torch and transformers, and split over two ranks against unsplit."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.exceptions import StartupError
from vllm.model_executor.layers.embedding import VocabParallelEmbedding
from vllm.model_executor.layers.layernorm import RowNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.unquantized import Unquantized
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models import config_values
from vllm.ops.norm import Norm
from vllm.ops.rope import rope_and_write

HIDDEN, WIDE, VOCAB = 8, 12, 11


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_block(tp: TensorParallelGroup) -> tuple[VocabParallelEmbedding, MergedColumnParallelLinear, RowParallelLinear]:
    """Embedding, a column-parallel layer of two parts and a row-parallel one, with biases, as a rank loads them."""
    embedding = VocabParallelEmbedding(VOCAB, HIDDEN, tp)
    embedding.load((), "weight", random(VOCAB, HIDDEN, seed=1))
    column = MergedColumnParallelLinear(
        HIDDEN, {"gate": WIDE, "up": WIDE}, frozenset({"gate", "up"}), tp, Unquantized()
    )
    for i, part in enumerate(("gate", "up")):
        column.load((part,), "weight", random(WIDE, HIDDEN, seed=2 + i))
        column.load((part,), "bias", random(WIDE, seed=4 + i))
    row = RowParallelLinear(WIDE, HIDDEN, True, tp, Unquantized())
    row.load((), "weight", random(HIDDEN, WIDE, seed=6))
    row.load((), "bias", random(HIDDEN, seed=7))
    return embedding, column, row


def forward(tp: TensorParallelGroup, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    embedding, column, row = make_block(tp)
    embedded = embedding(token_ids)
    gate, up = column(embedded).chunk(2, dim=-1)
    hidden = row(functional.silu(gate) * up, embedded.clone())
    return {"embedded": embedded, "hidden": hidden, "logits": embedding.logits(hidden)}


def rank_main(rank: int, world_size: int, port: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    group = TensorParallelGroup(rank, world_size, dist.group.WORLD)
    found = forward(group, torch.arange(VOCAB))
    results.put((rank, {name: tensor.tolist() for name, tensor in found.items()}))
    dist.destroy_process_group()


def test_unsplit_layers_are_plain_ones() -> None:
    found = forward(TensorParallelGroup(), torch.arange(VOCAB))
    embedded = random(VOCAB, HIDDEN, seed=1)
    gate, up = (functional.linear(embedded, random(WIDE, HIDDEN, seed=2 + i), random(WIDE, seed=4 + i)) for i in (0, 1))
    product = functional.linear(functional.silu(gate) * up, random(HIDDEN, WIDE, seed=6), random(HIDDEN, seed=7))
    hidden = embedded + product
    torch.testing.assert_close(found["embedded"], embedded)
    torch.testing.assert_close(found["hidden"], hidden)
    torch.testing.assert_close(found["logits"], hidden @ embedded.T)


@pytest.mark.nightly
def test_two_ranks_compute_what_one_does() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    # The vocabulary of 11 does not split evenly: the second rank's last row is padding.
    mp.spawn(rank_main, args=(2, port, results), nprocs=2)
    want = forward(TensorParallelGroup(), torch.arange(VOCAB))
    assert want["logits"].shape == (VOCAB, VOCAB)
    for _ in range(2):
        rank, found = results.get()
        for name, tensor in want.items():
            torch.testing.assert_close(torch.tensor(found[name]), tensor, msg=lambda m, n=name, r=rank: f"{n} {r}: {m}")


def test_a_rank_holds_its_share() -> None:
    embedding, column, row = make_block(TensorParallelGroup(1, 2))
    assert torch.equal(embedding.weight[:5], random(VOCAB, HIDDEN, seed=1)[6:])
    assert torch.equal(embedding.weight[5], torch.zeros(HIDDEN))
    halves = [random(WIDE, HIDDEN, seed=2 + i)[WIDE // 2 :] for i in (0, 1)]
    assert torch.equal(column.weight, torch.cat(halves)), "each part is split, not the whole"
    assert torch.equal(row.weight, random(HIDDEN, WIDE, seed=6)[:, WIDE // 2 :])
    assert torch.equal(row.bias, torch.zeros(HIDDEN)), "the first rank adds it"


def test_what_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"KV heads \(3\) cannot be split over 2 tensor-parallel ranks"):
        TensorParallelGroup(0, 2).divide(3, "KV heads")


def test_wrong_shapes_are_refused() -> None:
    embedding, column, row = make_block(TensorParallelGroup())
    with pytest.raises(ValueError, match=r"gate.weight has shape \(12, 9\), expected \(12, 8\)"):
        column.load(("gate",), "weight", torch.zeros(WIDE, HIDDEN + 1))
    with pytest.raises(ValueError, match="weight has shape"):
        row.load((), "weight", torch.zeros(HIDDEN + 1, WIDE))
    with pytest.raises(ValueError, match="the embedding has 10 rows, the vocabulary 11 tokens"):
        embedding.load((), "weight", torch.zeros(VOCAB - 1, HIDDEN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    norm = RowNorm(64, Norm(1e-5)).to(dtype)
    norm.weight.copy_(random(64, seed=1))
    x = (10 * random(5, 64, seed=2)).to(dtype)
    found = norm(x)
    wide = x.double()
    want = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), want, atol=tolerance, rtol=tolerance)
    assert found.dtype == dtype


SCALINGS = [
    {"rope_type": "default", "rope_theta": 100000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["rope_type"])
def test_rotary_embedding(scaling: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=256, rope_parameters=dict(scaling)
    )
    positions = torch.tensor([0, 1, 5, 63, 64, 200, 255])
    x = random(len(positions), 2, 32)
    spec = config_values.rope(config, 256)
    rope = RotaryEmbedding(spec.frequencies, spec.factor, spec.interleaved, 256).rope()
    slots, k_cache, v_cache = torch.arange(len(positions)), torch.empty(7, 1, 32), torch.empty(7, 1, 32)
    # Two query heads, then a key and a value head that both are the first query head.
    qkv = torch.cat((x, x[:, :1], x[:, :1]), dim=1).flatten(1)
    found = rope_and_write(qkv, positions, rope, None, slots, k_cache, v_cache, 2)
    cos, sin = LlamaRotaryEmbedding(config)(x, positions.unsqueeze(0))
    want, _ = apply_rotary_pos_emb(x.transpose(0, 1).unsqueeze(0), x.transpose(0, 1).unsqueeze(0), cos, sin)
    want = want[0].transpose(0, 1)
    torch.testing.assert_close(found, want, atol=2e-5, rtol=0)
    torch.testing.assert_close(k_cache, want[:, :1], atol=2e-5, rtol=0)
    assert torch.equal(v_cache, x[:, :1])


def test_long_rope_takes_the_frequencies_of_the_longest_sequence() -> None:
    parameters = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, max_position_embeddings=256, rope_parameters=parameters | factors
    )
    short, long = (config_values.rope(config, length) for length in (64, 65))
    assert short.frequencies[0] == 1.0 and long.frequencies[0] == 0.5
    # sqrt(1 + ln(256 / 64) / ln(64)), the factor of Ding et al., 2024
    assert short.factor == long.factor == pytest.approx(1.1547, abs=1e-4)


def test_unsupported_scaling() -> None:
    config = LlamaConfig(rope_parameters={"rope_type": "spiral", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(
        StartupError, match=r"\(rope_type\) 'spiral'; supported: default, dynamic, proportional, linear"
    ):
        config_values.rope(config, 64)

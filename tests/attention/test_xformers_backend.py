"""The xformers backend over random batches, against dense attention in float64.

Its operators need a GPU. Without one, what it asks of them is carried out in torch, from xformers' own masks.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.attention.random_batch import MIXED, Batch, Member
from vllm.attention.backends import get_backend
from vllm.attention.spec import AttentionSpec
from vllm.exceptions import StartupError
from vllm.ops.attention.metadata import AttentionMetadata

CHAINS = [
    Member((33, 20), 5, 1),
    Member((33, 20), 40, 9),
    Member((33,), 3, 3),
    Member((20,), 8, 1),
    Member((), 4, 2),
    Member((47, 33), 1, 1),
]


def partial_in_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_bias: Any, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`memory_efficient_attention_partial` by its definition."""
    mask = attn_bias.materialize((q.shape[1], k.shape[1]), dtype=torch.float32)
    scores = torch.einsum("bmghd,bnghd->bghmn", q.float(), k.float()) * scale + mask
    # Slots that nobody may read hold large values, but no weight.
    out = torch.einsum("bghmn,bnghd->bmghd", scores.softmax(dim=-1), v.float()).to(q.dtype)
    return out, scores.logsumexp(dim=-1)


@pytest.mark.parametrize("members", [MIXED, CHAINS])
@pytest.mark.parametrize("merged_groups", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (8, 1)])
def test_calls_and_masks(
    members: list[Member], merged_groups: bool, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xformers", reason="xformers is not installed")
    from vllm.attention.backends import xformers

    monkeypatch.setattr(xformers.fmha, "memory_efficient_attention_partial", partial_in_torch)
    backend = xformers.XFormersAttentionBackend(torch.device("cpu"))
    batch = Batch(members, 16, heads, kv_heads, 64, torch.float32, seed=heads)
    spec = batch.spec()
    assert backend.misfit(spec) is None
    (prepared,) = backend.prepare(batch.metadata(merged_groups), [spec])
    out = backend.attend(batch.q, batch.k, batch.v, spec, prepared)
    torch.testing.assert_close(out.double(), batch.reference(batch.spec()), atol=3e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("members", [MIXED, CHAINS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (6, 2, 128), (8, 1, 96)])
def test_on_a_gpu(members: list[Member], dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    pytest.importorskip("xformers", reason="xformers is not installed")
    device = torch.device("cuda")
    batch = Batch(members, 16, heads, kv_heads, dim, dtype, seed=dim)
    backend = get_backend("XFORMERS", [batch.spec()], 16, device)
    on_host = batch.metadata(True)
    metadata = AttentionMetadata(
        on_host.slot_mapping.to(device),
        on_host.block_tables.to(device),
        on_host.query_lens,
        on_host.context_lens,
        on_host.groups,
        on_host.block_size,
    )
    q, k, v = (x.to(device) for x in (batch.q, batch.k, batch.v))
    (prepared,) = backend.prepare(metadata, [batch.spec()])
    out = backend.attend(q, k, v, batch.spec(), prepared)
    tolerance = 4e-3 if dtype == torch.float16 else 3e-2
    torch.testing.assert_close(out.cpu().double(), batch.reference(batch.spec()), atol=tolerance, rtol=0)


SPEC = AttentionSpec(2, 1, 64, 64, 0.125, torch.bfloat16)


def test_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match="XFORMERS needs a GPU"):
        get_backend("XFORMERS", [SPEC], 16, torch.device("cpu"))
    with pytest.raises(StartupError, match="XFORMERS computes in float16 or bfloat16, not float32"):
        get_backend("XFORMERS", [replace(SPEC, dtype=torch.float32)], 16, torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.delitem(sys.modules, "vllm.attention.backends.xformers", raising=False)
    with pytest.raises(StartupError, match=r"XFORMERS needs the package xformers.*pip install"):
        get_backend("xformers", [SPEC], 16, torch.device("cuda"))

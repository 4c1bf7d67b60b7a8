"""Attention over part of the keys and the merge of parts, against dense softmax in float64."""

from __future__ import annotations

import pytest
import torch

from vllm.ops.attention.partial import attention_with_lse, merge

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask.double()
    return scores.softmax(dim=-1) @ v.double(), scores.logsumexp(dim=-1)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 700), (3, 5), (37, 129), (130, 33)])
def test_one_part(dtype: torch.dtype, head_dim: int, rows: int, keys: int) -> None:
    q, k, v = (random((2, 3, n, head_dim), dtype, seed) for seed, n in enumerate((rows, keys, keys)))
    out, lse = attention_with_lse(q, k, v, head_dim**-0.5)
    want, want_lse = dense(q, k, v, head_dim**-0.5)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=10 * TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mask(dtype: torch.dtype) -> None:
    q, k, v = (random((2, 3, 21, 64), dtype, seed) for seed in range(3))
    mask = torch.zeros(2, 1, 21, 21, dtype=dtype).masked_fill_(torch.ones(21, 21).triu(1).bool(), float("-inf"))
    out, lse = attention_with_lse(q, k, v, 0.125, mask)
    want, want_lse = dense(q, k, v, 0.125, mask)
    torch.testing.assert_close(out.double(), want, atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=10 * TOLERANCE[dtype], rtol=0)


def test_keys_with_the_strides_of_a_cache() -> None:
    cache = random((50, 3, 64), torch.float32, 0)
    values = random((50, 3, 64), torch.float32, 1)
    q = random((1, 3, 7, 64), torch.float32, 2)
    k, v = (c[11:40].transpose(0, 1).unsqueeze(0) for c in (cache, values))
    out, lse = attention_with_lse(q, k, v, 0.125)
    want, want_lse = dense(q, k, v, 0.125)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_merge_is_attention_over_all_keys(dtype: torch.dtype) -> None:
    q, k, v = (random((2, 3, n, 64), dtype, seed) for seed, n in enumerate((9, 100, 100)))
    want, want_lse = dense(q, k, v, 0.125)
    parts = [attention_with_lse(q, k[:, :, a:b], v[:, :, a:b], 0.125) for a, b in ((0, 1), (1, 60), (60, 100))]
    out, lse = parts[0]
    for part, part_lse in parts[1:]:
        out, lse = merge(out, lse, part, part_lse)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), want, atol=2 * TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=10 * TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_merge_of_parts_of_very_different_weight(offset: float) -> None:
    # exp(300) overflows float32: only differences of log-sum-exps may be exponentiated.
    a, b = random((4, 64), torch.float32, 0), random((4, 64), torch.float32, 1)
    lse_a, lse_b = torch.full((4,), offset), torch.zeros(4)
    out, lse = merge(a, lse_a, b, lse_b)
    assert torch.equal(out, a if offset > 0 else b)
    assert torch.equal(lse, torch.maximum(lse_a, lse_b))


def test_merge_with_an_empty_part() -> None:
    a, lse_a = random((4, 64), torch.float32, 0), random((4,), torch.float32, 1)
    empty, lse_empty = torch.zeros(4, 64), torch.full((4,), float("-inf"))
    for one, two in (((a, lse_a), (empty, lse_empty)), ((empty, lse_empty), (a, lse_a))):
        out, lse = merge(*one, *two)
        assert torch.equal(out, a) and torch.equal(lse, lse_a)

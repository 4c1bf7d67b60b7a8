"""Mixture of experts: which experts a token goes to, and the products with their matrices (Shazeer et al., 2017).

With s the scores of a token's experts, made from the logits l of the router:

    softmax      s = softmax(l); the k largest are chosen, and are the weights, divided by their sum if `renormalise`
    chosen       s = l; the k largest are chosen, and the weights are the softmax over them
    sigmoid      s = sigmoid(l); the k largest of s + correction are chosen, s without it are the weights, divided by
                 their sum if `renormalise` (DeepSeek-AI, 2024). With groups, only experts of the `top_groups` groups
                 whose two best sum to the most can be chosen
    sparsemixer  s = l; k times the largest of what is left is chosen, and its weight is its softmax among those left
                 that lie within 2 · jitter of it (Liu et al., 2024)

All weights are multiplied by `scale`. An expert computes `down(activation(gate(x)) · up(x))`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.nn import functional

from vllm.ops.activation import FUNCTIONS, Activation

Scoring = Literal["softmax", "chosen", "sigmoid", "sparsemixer"]


@dataclass(frozen=True)
class Routing:
    """How experts are chosen and weighted; see above.

    Attributes:
        top_k: Experts of a token.
        num_groups, top_groups: Equal shares of the experts, in order, and how many of them a token may go to.
        epsilon: Added to the sum that weights are divided by.
        jitter: Of `sparsemixer`.
    """

    top_k: int
    scoring: Scoring = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    epsilon: float = 0.0
    jitter: float = 0.0


@dataclass(frozen=True)
class ClampedSwiGLU:
    """`(u + 1) · g · sigmoid(alpha · g)`, g the gate up to `limit`, u the other within ± `limit` (OpenAI, 2025)."""

    alpha: float
    limit: float


class Experts(NamedTuple):
    """Weights of all experts, stacked.

    Attributes:
        gate_up: [E, 2F, H], rows of gate and up alternating, so that one tile of a product has both of a feature; or
            packed, with `gate_up_scales`.
        down: [E, H, F]; or packed, with `down_scales`.
        activation: Of the gate.
        gate_up_bias, down_bias: [E, 2F], alternating too, and [E, H].
        gate_up_scales, down_scales: Of MXFP4 weights; see `vllm.ops.mxfp4`.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    activation: Activation | ClampedSwiGLU
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    gate_up_scales: torch.Tensor | None = None
    down_scales: torch.Tensor | None = None


def route(logits: torch.Tensor, correction: torch.Tensor | None, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of each token and their weights, in plain torch.

    Args:
        logits: [T, E].
        correction: [E], for `sigmoid`.

    Returns int64 [T, top_k] and float32 [T, top_k].
    """
    wide = logits.float()
    if routing.scoring == "sparsemixer":
        return _sparse_mix(wide, routing)
    if routing.scoring == "chosen":
        values, chosen = wide.topk(routing.top_k, dim=-1)
        weights = values.softmax(dim=-1)
    elif routing.scoring == "softmax":
        weights, chosen = wide.softmax(dim=-1).topk(routing.top_k, dim=-1)
    else:
        scores = wide.sigmoid()
        ranked = scores if correction is None else scores + correction
        if routing.num_groups > 1:
            ranked = ranked.masked_fill(~_in_best_groups(ranked, routing), -torch.inf)
        chosen = ranked.topk(routing.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)
    if routing.renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + routing.epsilon)
    return chosen, weights * routing.scale


def _in_best_groups(ranked: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Whether an expert belongs to one of the best groups; bool [T, E]."""
    groups = ranked.unflatten(-1, (routing.num_groups, -1))
    best = groups.topk(2, dim=-1).values.sum(dim=-1).topk(routing.top_groups, dim=-1).indices
    inside = torch.zeros(groups.shape[:2], dtype=torch.bool, device=ranked.device).scatter(1, best, True)
    return inside.unsqueeze(-1).expand_as(groups).flatten(1)


def _sparse_mix(scores: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, weights = [], []
    left = scores
    for _ in range(routing.top_k):
        best, index = left.max(dim=-1, keepdim=True)
        far = (best - scores) / scores.abs().clamp(min=best) > 2 * routing.jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(dim=-1).gather(-1, index))
        chosen.append(index)
        left = left.scatter(-1, index, -torch.inf)
    return torch.cat(chosen, dim=-1), torch.cat(weights, dim=-1) * routing.scale


def apply_experts(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each token's experts, weighted and summed, in plain torch: `residual + Σₖ weightₖ · expertₖ(x)`.

    Args:
        x: [T, H].
        chosen: Experts of each token, int64 [T, K].
        weights: float32 [T, K].
        residual: [T, H].

    Returns [T, H] in the dtype of `x`, summed in float32.
    """
    if experts.gate_up_scales is not None:
        raise ValueError("packed experts are multiplied by on a GPU only")
    out = x.new_zeros(x.shape, dtype=torch.float32) if residual is None else residual.float()
    # Experts in order, so that the sum of a token does not depend on the batch.
    flat = chosen.flatten()
    order = flat.sort(stable=True).indices
    for expert, pairs in _runs(flat, order, len(experts.gate_up)):
        tokens = pairs // chosen.shape[1]
        bias = None if experts.gate_up_bias is None else experts.gate_up_bias[expert]
        middle = gated(functional.linear(x[tokens], experts.gate_up[expert], bias), experts.activation)
        bias = None if experts.down_bias is None else experts.down_bias[expert]
        part = functional.linear(middle, experts.down[expert], bias)
        out.index_add_(0, tokens, part.float() * weights.flatten()[pairs, None])
    return out.to(x.dtype)


def gated(gate_up: torch.Tensor, activation: Activation | ClampedSwiGLU) -> torch.Tensor:
    """The activation of gates times the rest: [T, 2F], alternating → [T, F]."""
    if not isinstance(activation, ClampedSwiGLU):
        return FUNCTIONS[activation](gate_up[:, ::2]) * gate_up[:, 1::2]
    gate, up = gate_up[:, ::2].float(), gate_up[:, 1::2].float()
    gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return ((up + 1.0) * gate * torch.sigmoid(activation.alpha * gate)).to(gate_up.dtype)


def _runs(flat: torch.Tensor, order: torch.Tensor, num_experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(expert, pairs of token and place that go to it), of those that some token goes to."""
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    for expert, pairs in enumerate(order.split(counts)):
        if len(pairs):
            yield expert, pairs


def mix_experts(
    x: torch.Tensor,
    logits: torch.Tensor,
    correction: torch.Tensor | None,
    expert_factors: torch.Tensor | None,
    routing: Routing,
    experts: Experts,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Routes and computes, in plain torch.

    Args:
        x: What the experts take, [T, H].
        logits: Of the router, [T, E].
        correction: Of scores, float32 [E], for `sigmoid`.
        expert_factors: Of the weights, by expert, [E].
        residual: [T, H], which the result is added to; may be overwritten.

    Returns [T, H] in the dtype of `x`.
    """
    chosen, weights = route(logits, correction, routing)
    if expert_factors is not None:
        weights = weights * expert_factors[chosen]
    return apply_experts(x, chosen, weights, experts, residual)

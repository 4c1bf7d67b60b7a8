"""Mixtures of experts: a router, the matrices of all experts in stacks, and what every token takes besides.

Each rank holds its share of the middle of every expert, so that all ranks choose alike and sum once.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from vllm.distributed.communication import all_reduce
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.model_executor.layers.layernorm import RowNorm
from vllm.model_executor.layers.linear import RowParallelLinear, copy_checked, shard
from vllm.model_executor.models.spec import MoE
from vllm.ops import mxfp4
from vllm.ops.dispatch import mix_experts
from vllm.ops.linear import linear
from vllm.ops.moe import Experts
from vllm.ops.norm import Norm
from vllm.platforms.devices import is_gpu


class StreamJoin(Protocol):
    """How the output of a block joins the residual stream; see `decoder.Join`."""

    is_sum: bool

    def add(self, out: torch.Tensor, residual: torch.Tensor) -> torch.Tensor: ...


class SharedMLP(Protocol):
    """The MLP that every token takes; see `decoder.FeedForward`."""

    down: RowParallelLinear

    def middle(self, x: torch.Tensor) -> torch.Tensor: ...


def _parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Router(nn.Module):
    """Scores of all experts for each token; every rank holds all of it.

    Attributes:
        correction: Added to the scores for the choice; float32 [E], or None.
        expert_factors: What the output of each expert is multiplied by; [E], or None.
    """

    def __init__(self, spec: MoE, hidden_size: int) -> None:
        super().__init__()
        self.bias: nn.Parameter | None
        self.correction: nn.Parameter | None
        self.expert_factors: nn.Parameter | None
        dtype = torch.float32 if spec.router_float32 else None
        self.weight = _parameter(spec.num_experts, hidden_size, dtype=dtype)
        self.register_parameter("bias", _parameter(spec.num_experts, dtype=dtype) if spec.router_bias else None)
        correction = _parameter(spec.num_experts, dtype=torch.float32) if spec.correction else None
        self.register_parameter("correction", correction)
        factors = _parameter(spec.num_experts) if spec.expert_factors else None
        self.register_parameter("expert_factors", factors)
        self.norm: RowNorm | None = None
        self._factor = 1.0
        if spec.beside is not None:
            self.norm = RowNorm(hidden_size, spec.beside)
            self._factor = hidden_size**-0.5

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads what `kind` names; it has no parts."""
        copy_checked(getattr(self, kind), tensor, kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] → [T, E]."""
        if self.norm is not None:
            x = self.norm(x) * self._factor
        return linear(x.to(self.weight.dtype), self.weight, self.bias)


class StackedExperts(nn.Module):
    """The matrices of all experts, this rank's share of each.

    Args:
        spec: What they compute, and how the checkpoint has them.

    Attributes:
        weights: What `ops.moe` takes; there once `finish` has run.
    """

    def __init__(self, spec: MoE, hidden_size: int, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.tp = tp
        self.spec = spec
        self.size = tp.divide(spec.size, "expert size")
        self.gate_up_bias: nn.Parameter | None
        self.down_bias: nn.Parameter | None
        shapes = {"gate_up": (2 * self.size, hidden_size), "down": (hidden_size, self.size)}
        for name, (rows, columns) in shapes.items():
            if spec.mxfp4:
                blocks, scales = mxfp4.shapes(rows, columns)
                self.register_parameter(f"{name}_blocks", _parameter(spec.num_experts, *blocks, dtype=torch.uint8))
                self.register_parameter(f"{name}_scales", _parameter(spec.num_experts, *scales, dtype=torch.uint8))
            else:
                self.register_parameter(f"{name}_weight", _parameter(spec.num_experts, rows, columns))
            self.register_parameter(f"{name}_bias", _parameter(spec.num_experts, rows) if spec.biases else None)
        self.weights: Experts | None = None
        self._dtype = torch.get_default_dtype()

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads a `weight`, a `bias`, or the `blocks` or `scales` of MXFP4 weights (`kind`).

        Args:
            parts: `gate` and `up`, or `down`, of all experts; or one of them of one expert: `<i>.gate`.
        """
        expert, _, part = parts[0].rpartition(".")
        if expert:
            self._load_rows(getattr(self, f"{_stack(part)}_{kind}")[int(expert)], part, kind, tensor, dim=0)
            return
        if len(tensor) != self.spec.num_experts:
            raise ValueError(f"{kind} is of {len(tensor)} experts, expected {self.spec.num_experts}")
        if self.spec.columns and kind == "weight":
            tensor = tensor.transpose(1, 2)
        target = getattr(self, f"{_stack(parts[0])}_{kind}")
        if len(parts) == 1:
            self._load_rows(target, parts[0], kind, tensor, dim=1)
            return
        if tensor.shape[1] != 2 * self.spec.size:
            raise ValueError(f"{kind} has shape {tuple(tensor.shape)}, expected {2 * self.spec.size} rows of an expert")
        halves = (tensor[:, ::2], tensor[:, 1::2]) if self.spec.columns else tensor.chunk(2, dim=1)
        for name, half in zip(parts, halves, strict=True):
            self._load_rows(target, name, kind, half, dim=1)

    def _load_rows(self, target: torch.Tensor, part: str, kind: str, tensor: torch.Tensor, dim: int) -> None:
        """One part, whose rows are dimension `dim` of both."""
        if part == "down":
            if kind == "bias":
                # The ranks' results are summed: only one of them adds the bias.
                tensor = torch.zeros_like(tensor) if self.tp.rank else tensor
            else:
                tensor = shard(tensor, dim + 1, target.shape[dim + 1], self.tp, f"{part} {kind}")
        else:
            tensor = shard(tensor, dim, self.size, self.tp, f"{part} {kind}")
            target = target.unflatten(dim, (self.size, 2)).select(dim + 1, 0 if part == "gate" else 1)
        copy_checked(target, tensor, f"{part} {kind}")

    def unpacks_on(self, device: torch.device) -> bool:
        """Whether packed weights become whole when they are loaded, where no kernel multiplies by them."""
        return self.spec.mxfp4 and not (is_gpu(device) and self._dtype == torch.bfloat16)

    def bytes_of_unpacking(self, device: torch.device) -> int:
        """Bytes that the weights take beyond those of the checkpoint."""
        if not self.unpacks_on(device):
            return 0
        packed = [getattr(self, f"{name}_{kind}") for name in ("gate_up", "down") for kind in ("blocks", "scales")]
        whole = sum(2 * part.numel() for part in packed[::2]) * self._dtype.itemsize
        return whole - sum(part.nbytes for part in packed)

    def finish(self) -> None:
        """Brings the loaded weights into the form in which the device multiplies by them."""
        gate_up, gate_up_scales = self._finished("gate_up")
        down, down_scales = self._finished("down")
        self.weights = Experts(
            gate_up, down, self.spec.activation, self.gate_up_bias, self.down_bias, gate_up_scales, down_scales
        )

    def _finished(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A stack and its scales; what was loaded is given back where it is in another form."""
        if not self.spec.mxfp4:
            return getattr(self, f"{name}_weight"), None
        blocks, scales = getattr(self, f"{name}_blocks"), getattr(self, f"{name}_scales")
        finished: tuple[torch.Tensor, torch.Tensor | None]
        if self.unpacks_on(blocks.device):
            finished = mxfp4.dequantise(blocks, scales, self._dtype), None
        else:
            finished = mxfp4.arrange(blocks, scales)
        blocks.data, scales.data = blocks.new_empty(0), scales.new_empty(0)
        return finished

    def forward(
        self, x: torch.Tensor, logits: torch.Tensor, router: Router, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """x [T, H], logits [T, E] → `residual + Σ weight · expert(x)`; the residual stream may be overwritten."""
        if self.weights is None:
            raise RuntimeError("experts are asked to multiply before their weights are finished")
        mine = residual if self.tp.rank == 0 else None
        factors = router.expert_factors
        out = mix_experts(x, logits, router.correction, factors, self.spec.routing, self.weights, mine)
        return all_reduce(out, self.tp)


def _stack(part: str) -> str:
    return "down" if part == "down" else "gate_up"


class MixtureOfExperts(nn.Module):
    """Experts, and the shared MLP beside them.

    Args:
        spec: What they compute.
        shared: The MLP, where the spec has one.
    """

    def __init__(self, spec: MoE, hidden_size: int, shared: nn.Module | None, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.router = Router(spec, hidden_size)
        self.experts = StackedExperts(spec, hidden_size, tp)
        self.shared: SharedMLP | None = shared  # type: ignore[assignment]
        self.shared_gate = _parameter(1, hidden_size) if spec.shared_gate else None

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads the `shared_gate` (`kind`); it has no parts."""
        copy_checked(getattr(self, kind), tensor, kind)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, join: StreamJoin) -> torch.Tensor:
        """The stream [T, H] after the block; the one before it may be overwritten."""
        logits = self.router(x)
        before = residual if join.is_sum else None
        if self.shared is not None:
            middle = self.shared.middle(x)
            if self.shared_gate is None:
                before = self.shared.down(middle, before)
            else:
                shared = self.shared.down(middle).mul_(torch.sigmoid(linear(x, self.shared_gate, None)))
                before = shared if before is None else before + shared
        out = self.experts(x, logits, self.router, before)
        return out if join.is_sum else join.add(out, residual)


class ExpertsBesideMLP(MixtureOfExperts):
    """Experts and an MLP with norms of their own; see `spec.MoE`."""

    def __init__(self, spec: MoE, hidden_size: int, shared: nn.Module | None, tp: TensorParallelGroup) -> None:
        super().__init__(spec, hidden_size, shared, tp)
        norm = spec.beside or Norm(0.0)
        self.post_shared, self.pre_experts, self.post_experts = (RowNorm(hidden_size, norm) for _ in range(3))

    def forward(self, x: torch.Tensor, residual: torch.Tensor, join: StreamJoin) -> torch.Tensor:
        """As of a mixture; x is the stream normalised for the MLP."""
        if self.shared is None:
            raise RuntimeError("there is no MLP beside the experts")
        dense = self.post_shared(self.shared.down(self.shared.middle(x)))
        experts = self.experts(self.pre_experts(residual), self.router(residual), self.router, None)
        return join.add(dense + self.post_experts(experts), residual)

"""What the runner, the graphs and the loader know of a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from vllm.attention.layer import ForwardContext
from vllm.attention.spec import AttentionSpec
from vllm.kv_cache.spec import LayerCache
from vllm.ops.cpu.kernels import CompiledSteps, SequenceRows


class CausalLM(nn.Module, ABC):
    """Token ids → hidden states → logits.

    Attributes:
        hidden_size: Of the states that `forward` returns.
        dtype: Of those states and of the weights.
        attention_specs: What its layers ask of attention, each different wish once; `ForwardContext.prepared` has a
            plan for each, in this order.
    """

    hidden_size: int
    dtype: torch.dtype
    attention_specs: Sequence[AttentionSpec]

    @abstractmethod
    def caches(self) -> list[LayerCache]:
        """What each layer keeps between steps, from the first to the last."""

    @abstractmethod
    def layer_kinds(self) -> list[int]:
        """One index of each kind of layer: layers of one kind launch the same kernels over the same sizes."""

    @abstractmethod
    @contextmanager
    def only_layers(self, indexes: Sequence[int]) -> Iterator[None]:
        """Within it, the network is these layers alone, for trials."""

    @abstractmethod
    def forward(self, token_ids: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """int64 [T] → hidden states of the wanted tokens [R, hidden_size]; writes K and V of every token."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[R, hidden_size] → [R, vocab_size]; into `out`, contiguous, if it is given."""

    @abstractmethod
    def most_likely(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] → token id of the highest score, the first of equals; int64 [R]."""

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes the checkpoint's tensors, by their Hugging Face names.

        Raises:
            StartupError: a tensor is unknown, missing or of another shape than the configuration says.
        """

    @abstractmethod
    def finish(self) -> None:
        """Brings the loaded weights into the form in which the device multiplies them."""

    @abstractmethod
    def compiled_steps(
        self, rows: SequenceRows, k_caches: list[torch.Tensor], v_caches: list[torch.Tensor]
    ) -> CompiledSteps | None:
        """Whole steps in one call each, over the sequences of a model runner; None where they are not compiled."""

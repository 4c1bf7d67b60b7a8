"""The Llama architecture (Touvron et al., 2023): pre-norm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PretrainedConfig

from vllm.attention.layer import Attention, ForwardContext
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.exceptions import StartupError
from vllm.logger import init_logger
from vllm.model_executor.layers.embedding import VocabParallelEmbedding
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    RowParallelLinear,
    copy_checked,
)
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.ops.activation import silu_and_mul
from vllm.ops.cpu import kernels as cpu_kernels

logger = init_logger(__name__)

# Checkpoint projection → (our module, its part).
_MERGED = {
    "q_proj": ("qkv_proj", "q_proj"),
    "k_proj": ("qkv_proj", "k_proj"),
    "v_proj": ("qkv_proj", "v_proj"),
    "gate_proj": ("gate_up_proj", "gate_proj"),
    "up_proj": ("gate_up_proj", "up_proj"),
}


class LlamaMLP(nn.Module):
    def __init__(self, config: PretrainedConfig, tp: TensorParallelGroup) -> None:
        super().__init__()
        bias = bool(getattr(config, "mlp_bias", False))
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = MergedColumnParallelLinear(config.hidden_size, parts, bias, tp)
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size, bias, tp)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_and_mul(self.gate_up_proj(x)), residual)


class LlamaAttention(nn.Module):
    def __init__(self, config: PretrainedConfig, layer_index: int, head_dim: int, tp: TensorParallelGroup) -> None:
        super().__init__()
        bias = bool(getattr(config, "attention_bias", False))
        num_heads = config.num_attention_heads
        num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
        parts = {
            "q_proj": num_heads * head_dim,
            "k_proj": num_kv_heads * head_dim,
            "v_proj": num_kv_heads * head_dim,
        }
        self.qkv_proj = MergedColumnParallelLinear(config.hidden_size, parts, bias, tp)
        self.o_proj = RowParallelLinear(num_heads * head_dim, config.hidden_size, bias, tp)
        self.attention = Attention(
            layer_index, tp.divide(num_heads, "attention heads"), tp.divide(num_kv_heads, "KV heads"), head_dim
        )


class LlamaLayer(nn.Module):
    def __init__(self, config: PretrainedConfig, layer_index: int, head_dim: int, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_index, head_dim, tp)
        self.mlp = LlamaMLP(config, tp)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        residual: torch.Tensor,
        cos_sin: torch.Tensor,
        context: ForwardContext,
        wanted: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns the residual stream of the wanted tokens or (None) of all; the one before it may be overwritten."""
        attention = self.self_attn
        qkv = attention.qkv_proj(self.input_layernorm(residual))
        if wanted is not None and not len(wanted):
            attention.attention.write(qkv, cos_sin, context)
            return residual[:0]
        x = attention.attention(qkv, cos_sin, context)
        if wanted is not None:
            x, residual = x[wanted], residual[wanted]
        residual = attention.o_proj(x, residual)
        return self.mlp(self.post_attention_layernorm(residual), residual)


class PackedLlama:
    """The layers and the output projection of a network, in the form of the compiled CPU kernels.

    The network's own matrices are emptied, one by one, so that no more than one is in memory twice; the embedding
    table, whose rows are looked up, remains.
    """

    def __init__(self, model: LlamaForCausalLM, int8: bool) -> None:
        def take(linear: LinearBase, interleave: bool = False) -> cpu_kernels.PackedMatrix:
            packed = cpu_kernels.PackedMatrix(linear.weight, linear.bias, interleave, int8)
            linear.weight.data = linear.weight.new_empty(0)
            return packed

        layers = [
            cpu_kernels.LayerWeights(
                layer.input_layernorm.weight.float(),
                layer.post_attention_layernorm.weight.float(),
                take(layer.self_attn.qkv_proj),
                take(layer.self_attn.o_proj),
                take(layer.mlp.gate_up_proj, interleave=True),
                take(layer.mlp.down_proj),
            )
            for layer in model.layers
        ]
        attention = model.layers[0].self_attn.attention
        self._stack = cpu_kernels.DecoderStack(
            layers,
            model.norm.weight.float(),
            model.rotary.cos_sin,
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_dim,
            model.norm.eps,
        )
        self._head = cpu_kernels.PackedMatrix(model.lm_head.weight[: model.lm_head.vocab_size], int8=int8)
        if not model.tied:
            model.lm_head.weight.data = model.lm_head.weight.new_empty(0)
        self._arithmetic = cpu_kernels.arithmetic()
        self._embeddings = model.embed_tokens.weight
        if self._embeddings.dtype == torch.bfloat16:
            # Results differ in the last bits, so whoever compares two runs wants to know.
            logger.info("bfloat16 is multiplied %s, the fastest here.", cpu_kernels.ARITHMETICS[self._arithmetic])

    def steps(
        self, rows: cpu_kernels.SequenceRows, k_caches: list[torch.Tensor], v_caches: list[torch.Tensor]
    ) -> cpu_kernels.CompiledSteps:
        """Whole steps over the sequences of a model runner."""
        self._stack.use_caches(k_caches, v_caches)
        return cpu_kernels.CompiledSteps(self._stack, self._head, self._embeddings, rows)

    @staticmethod
    def misfit(model: LlamaForCausalLM) -> str | None:
        """Why a network cannot be packed, or None."""
        sizes = {
            "hidden_size": model.norm.weight.shape[0],
            "intermediate_size": model.layers[0].mlp.down_proj.weight.shape[1],
        }
        for name, size in sizes.items():
            if size % cpu_kernels.TILE:
                return f"{name} {size} is no multiple of {cpu_kernels.TILE}"
        return None

    def forward(self, embeddings: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        caches = context.k_caches, context.v_caches
        return self._stack.forward(embeddings, context.positions, *caches, context.prepared, context.wanted)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return cpu_kernels.linear(hidden.contiguous(), self._head, self._arithmetic)

    def most_likely(self, hidden: torch.Tensor) -> torch.Tensor:
        return cpu_kernels.most_likely(hidden.contiguous(), self._head, self._arithmetic)


class LlamaForCausalLM(nn.Module):
    """Token ids → hidden states → logits.

    Args:
        config: Checkpoint configuration.
        max_positions: Longest sequence.
        tp: This rank's place among the tensor-parallel ranks.
    """

    def __init__(self, config: PretrainedConfig, max_positions: int, tp: TensorParallelGroup) -> None:
        super().__init__()
        if getattr(config, "hidden_act", "silu") != "silu":
            raise StartupError(f"The model asks for activation {config.hidden_act!r}; Llama checkpoints use silu.")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        layers = [LlamaLayer(config, i, head_dim, tp) for i in range(config.num_hidden_layers)]
        self.layers: Sequence[LlamaLayer] = nn.ModuleList(layers)  # type: ignore[assignment]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config, head_dim, max_positions)
        self.tied = bool(getattr(config, "tie_word_embeddings", False))
        self.lm_head = (
            self.embed_tokens if self.tied else VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        )
        self.tp = tp
        self.packed: PackedLlama | None = None

    def pack_for_cpu(self, int8: bool = False) -> None:
        """Hands the layers and the output projection over to the compiled CPU kernels; their weights move into packed
        copies. A network whose sizes the kernels do not take, or that is split over ranks, stays as it is.

        Args:
            int8: Quantise every matrix.

        Raises:
            StartupError: `int8`, and the network would stay as it is.
        """
        misfit = "it is split over ranks" if self.tp.world_size > 1 else PackedLlama.misfit(self)
        if misfit is not None and int8:
            raise StartupError(f"--quantization int8_cpu cannot serve this model: {misfit}.")
        if misfit is not None:
            logger.warning("The compiled CPU kernels compute only the attention of this model: %s.", misfit)
            return
        self.packed = PackedLlama(self, int8)

    def forward(self, token_ids: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """int64 [T] → hidden states of the wanted tokens [R, hidden_size]; writes K and V of every token."""
        residual = self.embed_tokens(token_ids)
        wanted = context.wanted
        if self.packed is not None:
            return self.packed.forward(residual, context)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            residual = layer(residual, self.rotary.cos_sin, context, wanted if i == last else None)
        return self.norm(residual)

    @contextmanager
    def only_outer_layers(self) -> Iterator[None]:
        """Within it, the network is its first and its last layer: for trials, since those between launch the same
        kernels over the same sizes."""
        layers = self.layers
        self.layers = layers[:: max(1, len(layers) - 1)]
        try:
            yield
        finally:
            self.layers = layers

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[R, hidden_size] → [R, vocab_size]; into `out`, contiguous, if it is given."""
        if self.packed is not None:
            logits = self.packed.logits(hidden)
            return logits if out is None else out.copy_(logits)
        return self.lm_head.logits(hidden, out)

    def most_likely(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] → token id of the highest score, the first of equals; int64 [R]."""
        if self.packed is not None:
            return self.packed.most_likely(hidden)
        return self.logits(hidden).float().argmax(dim=-1)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Takes the checkpoint's tensors, by their Hugging Face names.

        Raises:
            StartupError: a tensor is unknown, missing or of another shape than the configuration says.
        """
        missing = self._expected()
        for name, tensor in weights:
            if name.endswith("rotary_emb.inv_freq") or (self.tied and name == "lm_head.weight"):
                continue
            if name not in missing:
                raise StartupError(f"The checkpoint has a tensor {name!r} that {type(self).__name__} does not know.")
            try:
                self._load(name, tensor)
            except ValueError as error:
                raise StartupError(f"The checkpoint's {name} does not fit its configuration: {error}.") from None
            missing.discard(name)
        if missing:
            some = ", ".join(sorted(missing)[:3])
            raise StartupError(f"The checkpoint lacks {len(missing)} tensors, among them {some}.")

    def _expected(self) -> set[str]:
        names = {"model.embed_tokens.weight", "model.norm.weight"}
        if not self.tied:
            names.add("lm_head.weight")
        for i, layer in enumerate(self.layers):
            names.update(f"model.layers.{i}.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm"))
            for parent, module in (("self_attn", layer.self_attn), ("mlp", layer.mlp)):
                for child, linear in module.named_children():
                    if child == "attention":
                        continue
                    kinds = ["weight"] if linear.bias is None else ["weight", "bias"]
                    for part in getattr(linear, "part_sizes", (child,)):
                        names.update(f"model.layers.{i}.{parent}.{part}.{kind}" for kind in kinds)
        return names

    def _load(self, name: str, tensor: torch.Tensor) -> None:
        if name == "model.embed_tokens.weight":
            self.embed_tokens.load_shard(tensor)
        elif name == "lm_head.weight":
            self.lm_head.load_shard(tensor)
        elif name == "model.norm.weight":
            copy_checked(self.norm.weight, tensor, name)
        else:
            _, _, index, *path = name.split(".")
            layer = self.layers[int(index)]
            if len(path) == 2:
                copy_checked(getattr(layer, path[0]).weight, tensor, name)
                return
            parent, projection, kind = path
            module, part = _MERGED.get(projection, (projection, None))
            linear = getattr(getattr(layer, parent), module)
            if part is None:
                linear.load_shard(kind, tensor)
            else:
                linear.load_shard(part, kind, tensor)

"""The Llama architecture (Touvron et al., 2023): pre-norm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PretrainedConfig

from vllm.attention.layer import Attention, ForwardContext
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.exceptions import StartupError
from vllm.model_executor.layers.activation import silu_and_mul
from vllm.model_executor.layers.embedding import VocabParallelEmbedding
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear, copy_checked
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_and_mul(self.gate_up_proj(x)))


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

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        return self.o_proj(self.attention(self.qkv_proj(x), cos_sin, context))


class LlamaLayer(nn.Module):
    def __init__(self, config: PretrainedConfig, layer_index: int, head_dim: int, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_index, head_dim, tp)
        self.mlp = LlamaMLP(config, tp)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


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

    def forward(self, token_ids: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """int64 [T] → hidden states [T, hidden_size]; writes K and V of every token."""
        residual = self.embed_tokens(token_ids)
        x = torch.zeros_like(residual)
        for layer in self.layers:
            x, residual = layer.input_layernorm.add(x, residual)
            x = layer.self_attn(x, self.rotary.cos_sin, context)
            x, residual = layer.post_attention_layernorm.add(x, residual)
            x = layer.mlp(x)
        x, _ = self.norm.add(x, residual)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] → [R, vocab_size] in the dtype of the weights."""
        return self.lm_head.logits(hidden)

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

"""Shape of a Llama, as `config.json` has it."""

# Without `from __future__ import annotations`: @strict checks values against types, not against their names.
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig


# transformers has such a class too, but its module loads torch's compiler and, where it is installed, Triton: 1.3 s of
# CPU time and 120 MB in each process that reads a configuration, and lines about leaks when Triton is unloaded.
@strict
class LlamaConfig(PretrainedConfig):
    """Fields and defaults are those of checkpoints of model type "llama"."""

    model_type = "llama"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

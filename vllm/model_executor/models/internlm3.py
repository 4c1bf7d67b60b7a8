"""InternLM 3 (InternLM Team, 2025): Llama; its configuration says `qkv_bias` and `bias`, which must be equal."""

from __future__ import annotations

from vllm.model_executor.models.llama import decoder

__all__ = ["decoder"]

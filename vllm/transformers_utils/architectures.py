"""The architectures that can be served, by their names in config.json.

Each has a file of its model type's name in `vllm/model_executor/models`, which says what it computes.
"""

from __future__ import annotations

ARCHITECTURES: dict[str, str] = {
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Architecture → model type."""

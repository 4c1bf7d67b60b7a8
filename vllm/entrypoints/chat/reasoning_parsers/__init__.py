"""Splits what a model thinks from what it says (`--reasoning-parser`)."""

from vllm.entrypoints.chat.reasoning_parsers.openai_gptoss import GptOssReasoningParser
from vllm.entrypoints.chat.reasoning_parsers.tags import (
    DeepSeekR1ReasoningParser,
    Qwen3ReasoningParser,
    ReasoningParser,
)

REASONING_PARSERS: dict[str, type[ReasoningParser]] = {
    "deepseek_r1": DeepSeekR1ReasoningParser,
    "openai_gptoss": GptOssReasoningParser,
    "qwen3": Qwen3ReasoningParser,
}

__all__ = ["REASONING_PARSERS", "ReasoningParser"]

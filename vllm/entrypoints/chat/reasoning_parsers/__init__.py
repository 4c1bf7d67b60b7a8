"""Splits what a model thinks from what it says (`--reasoning-parser`)."""

from vllm.entrypoints.chat.reasoning_parsers.families import (
    DeepSeekR1ReasoningParser,
    DeepSeekV3ReasoningParser,
    Ernie45ReasoningParser,
    Gemma4ReasoningParser,
    GlmReasoningParser,
    GraniteReasoningParser,
    HunyuanA13BReasoningParser,
    KimiK2ReasoningParser,
    MistralReasoningParser,
    Qwen3ReasoningParser,
    SeedOssReasoningParser,
)
from vllm.entrypoints.chat.reasoning_parsers.openai_gptoss import GptOssReasoningParser
from vllm.entrypoints.chat.reasoning_parsers.tags import ReasoningParser

REASONING_PARSERS: dict[str, type[ReasoningParser]] = {
    "deepseek_r1": DeepSeekR1ReasoningParser,
    "deepseek_v3": DeepSeekV3ReasoningParser,
    "ernie45": Ernie45ReasoningParser,
    "gemma4": Gemma4ReasoningParser,
    "glm45": GlmReasoningParser,
    "granite": GraniteReasoningParser,
    "hunyuan_a13b": HunyuanA13BReasoningParser,
    "kimi_k2": KimiK2ReasoningParser,
    "minimax_m2": DeepSeekR1ReasoningParser,
    "mistral": MistralReasoningParser,
    "nemotron_v3": Qwen3ReasoningParser,
    "olmo3": DeepSeekR1ReasoningParser,
    "openai_gptoss": GptOssReasoningParser,
    "qwen3": Qwen3ReasoningParser,
    "seed_oss": SeedOssReasoningParser,
    "step3": DeepSeekR1ReasoningParser,
}

__all__ = ["REASONING_PARSERS", "ReasoningParser"]

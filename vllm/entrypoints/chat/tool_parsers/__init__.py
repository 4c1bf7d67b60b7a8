"""Finds calls of functions in what a model says (`--tool-call-parser`)."""

from vllm.entrypoints.chat.tool_parsers.base import ToolParser
from vllm.entrypoints.chat.tool_parsers.gemma4 import Gemma4ToolParser
from vllm.entrypoints.chat.tool_parsers.json_objects import (
    GraniteToolParser,
    HermesToolParser,
    InternLMToolParser,
    JambaToolParser,
    LongCatToolParser,
    Phi4MiniToolParser,
    XLAMToolParser,
)
from vllm.entrypoints.chat.tool_parsers.llama3_json import Llama3JsonToolParser
from vllm.entrypoints.chat.tool_parsers.mistral import MistralToolParser
from vllm.entrypoints.chat.tool_parsers.openai import OpenAIToolParser
from vllm.entrypoints.chat.tool_parsers.pythonic import Olmo3ToolParser, PythonicToolParser
from vllm.entrypoints.chat.tool_parsers.sections import DeepSeekV3ToolParser, KimiK2ToolParser
from vllm.entrypoints.chat.tool_parsers.tagged import (
    DeepSeekV32ToolParser,
    GlmToolParser,
    MiniMaxM2ToolParser,
    Qwen3CoderToolParser,
    SeedOssToolParser,
    Step3ToolParser,
)

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "deepseek_v3": DeepSeekV3ToolParser,
    "deepseek_v31": DeepSeekV3ToolParser,
    "deepseek_v32": DeepSeekV32ToolParser,
    "ernie45": HermesToolParser,
    "gemma4": Gemma4ToolParser,
    "glm45": GlmToolParser,
    "glm47": GlmToolParser,
    "granite": GraniteToolParser,
    "granite4": HermesToolParser,
    "hermes": HermesToolParser,
    "hunyuan_a13b": JambaToolParser,
    "internlm": InternLMToolParser,
    "jamba": JambaToolParser,
    "kimi_k2": KimiK2ToolParser,
    "llama3_json": Llama3JsonToolParser,
    "llama4_json": Llama3JsonToolParser,
    "llama4_pythonic": PythonicToolParser,
    "longcat": LongCatToolParser,
    "minimax_m2": MiniMaxM2ToolParser,
    "mistral": MistralToolParser,
    "olmo3": Olmo3ToolParser,
    "phi4_mini_json": Phi4MiniToolParser,
    "openai": OpenAIToolParser,
    "pythonic": PythonicToolParser,
    "qwen3_coder": Qwen3CoderToolParser,
    "qwen3_xml": Qwen3CoderToolParser,
    "seed_oss": SeedOssToolParser,
    "step3": Step3ToolParser,
    "xlam": XLAMToolParser,
}

__all__ = ["TOOL_PARSERS", "ToolParser"]

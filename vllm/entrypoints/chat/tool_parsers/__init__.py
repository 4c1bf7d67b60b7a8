"""Finds calls of functions in what a model says (`--tool-call-parser`)."""

from vllm.entrypoints.chat.tool_parsers.base import ToolParser
from vllm.entrypoints.chat.tool_parsers.deepseek_v3 import DeepSeekV3ToolParser
from vllm.entrypoints.chat.tool_parsers.hermes import HermesToolParser
from vllm.entrypoints.chat.tool_parsers.llama3_json import Llama3JsonToolParser
from vllm.entrypoints.chat.tool_parsers.mistral import MistralToolParser
from vllm.entrypoints.chat.tool_parsers.openai import OpenAIToolParser
from vllm.entrypoints.chat.tool_parsers.pythonic import PythonicToolParser
from vllm.entrypoints.chat.tool_parsers.qwen3_coder import Qwen3CoderToolParser

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "deepseek_v3": DeepSeekV3ToolParser,
    "hermes": HermesToolParser,
    "llama3_json": Llama3JsonToolParser,
    "llama4_json": Llama3JsonToolParser,
    "mistral": MistralToolParser,
    "openai": OpenAIToolParser,
    "pythonic": PythonicToolParser,
    "qwen3_coder": Qwen3CoderToolParser,
    "qwen3_xml": Qwen3CoderToolParser,
}

__all__ = ["TOOL_PARSERS", "ToolParser"]

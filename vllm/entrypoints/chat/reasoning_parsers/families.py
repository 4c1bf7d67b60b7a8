"""How the families mark what they think."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vllm.entrypoints.chat.reasoning_parsers.tags import ReasoningParser


class SwitchedReasoningParser(ReasoningParser):
    """Thinks as a variable of the template says.

    Attributes:
        default: What it is where a request does not say it.
    """

    default: ClassVar[bool] = True

    @classmethod
    def ended_in(cls, prompt: str, continued: str | None, kwargs: Mapping[str, Any]) -> bool | None:
        thinks = kwargs.get("enable_thinking", kwargs.get("thinking", cls.default))
        if continued is None and not thinks and thinks is not None:
            return True
        return super().ended_in(prompt, continued, kwargs)


class DeepSeekR1ReasoningParser(ReasoningParser):
    """DeepSeek R1 and its distillates, OLMo 3, MiniMax M2 and Step 3, which always think."""


class DeepSeekV3ReasoningParser(SwitchedReasoningParser):
    """DeepSeek V3.1 and V3.2, which think where the template is told `thinking=true`."""

    default = False


class Qwen3ReasoningParser(SwitchedReasoningParser):
    """Qwen 3 and Nemotron 3, which think unless the template is told `enable_thinking=false`."""


class GlmReasoningParser(SwitchedReasoningParser):
    """GLM 4.5 to 4.7: the model may leave its reasoning out unless the template opens it."""

    is_certain = False


class KimiK2ReasoningParser(SwitchedReasoningParser):
    """Kimi K2: calls of tools may end the reasoning."""

    closers = ("<|tool_calls_section_begin|>",)
    needs_special_tokens = True


class SeedOssReasoningParser(ReasoningParser):
    start = "<seed:think>"
    end = "</seed:think>"


class MistralReasoningParser(ReasoningParser):
    """Magistral: the model may leave its reasoning out."""

    start = "[THINK]"
    end = "[/THINK]"
    is_certain = False
    needs_special_tokens = True


class GraniteReasoningParser(ReasoningParser):
    """Granite 3.2, which marks its reasoning by sentences."""

    start = "Here is my thought process:"
    end = "Here is my response:"
    more_starts = ("Here's my thought process:",)
    more_ends = ("Here's my response:",)
    is_certain = False


class Gemma4ReasoningParser(ReasoningParser):
    """Gemma 4: a channel of its own, which may be missing."""

    start = "<|channel>thought\n"
    end = "<channel|>"
    is_certain = False
    needs_special_tokens = True


class HunyuanA13BReasoningParser(SwitchedReasoningParser):
    """Hunyuan A13B: its answer has marks of its own."""

    frame = ("<answer>", "</answer>")


class Ernie45ReasoningParser(SwitchedReasoningParser):
    """ERNIE 4.5: its answer may have marks of its own."""

    frame = ("<response>", "</response>")

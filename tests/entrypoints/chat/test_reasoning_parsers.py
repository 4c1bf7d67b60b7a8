"""Reasoning parsers: where reasoning ends and content begins, however the text is split."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.entrypoints.chat.reasoning_parsers import REASONING_PARSERS, ReasoningParser

# Those with the usual marks.
BOTH = ["deepseek_r1", "minimax_m2", "nemotron_v3", "olmo3", "qwen3", "step3"]

CASES = [
    ("I think.\n</think>\n\nYes.", "I think.\n", "\n\nYes."),
    ("<think>I think.</think>Yes.", "I think.", "Yes."),
    ("\n<think>\nHm</think>", "\nHm", ""),
    ("never ends", "never ends", ""),
    ("a <think> b </think> c </think> d", "a <think> b ", " c </think> d"),
    ("", "", ""),
    ("<thi", "<thi", ""),
    ("x</thin", "x</thin", ""),
]


def split(parser: ReasoningParser, pieces: list[str]) -> tuple[str, str]:
    parts = [*(parser.feed(piece) for piece in pieces), parser.finish()]
    return "".join(p[0] for p in parts), "".join(p[1] for p in parts)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(("text", "reasoning", "content"), CASES)
def test_reasoning_ends_at_its_mark(name: str, text: str, reasoning: str, content: str) -> None:
    make = REASONING_PARSERS[name]
    assert split(make(ended=False), [text]) == (reasoning, content)
    for cut in range(len(text)):
        assert split(make(ended=False), [text[:cut], text[cut:]]) == (reasoning, content)
    assert split(make(ended=False), list(text)) == (reasoning, content)


# Parser, what the prompt says of the reasoning, output, reasoning, content.
OTHERS = [
    ("deepseek_v3", False, "Hm</think>Yes", "Hm", "Yes"),
    ("glm45", None, "Yes", "", "Yes"),
    ("glm45", None, "\n<think>Hm</think>\nYes", "Hm", "\nYes"),
    ("glm45", False, "Hm</think>Yes", "Hm", "Yes"),
    ("glm45", None, "<thi", "", "<thi"),
    ("kimi_k2", False, "<think>Hm</think>Yes", "Hm", "Yes"),
    (
        "kimi_k2",
        False,
        "<think>Hm<|tool_calls_section_begin|><|tool_call_begin|>",
        "Hm",
        "<|tool_calls_section_begin|><|tool_call_begin|>",
    ),
    ("seed_oss", False, "<seed:think>Hm</seed:think>Yes", "Hm", "Yes"),
    ("mistral", None, "[THINK]Hm[/THINK]Yes", "Hm", "Yes"),
    ("mistral", None, "Yes [THINK]", "", "Yes [THINK]"),
    ("granite", None, "Here is my thought process: Hm. Here is my response: Yes", " Hm. ", " Yes"),
    ("granite", None, "Here's my thought process: Hm. Here's my response: Yes", " Hm. ", " Yes"),
    ("granite", None, "Here is the thing", "", "Here is the thing"),
    ("gemma4", None, "<|channel>thought\nHm<channel|>Yes", "Hm", "Yes"),
    ("gemma4", None, "Yes", "", "Yes"),
    ("hunyuan_a13b", False, "<think>\nHm\n</think>\n<answer>\nYes </a\n</answer>", "\nHm\n", "Yes </a"),
    ("hunyuan_a13b", True, "<answer>Yes</answer>\n<tool_calls>", "", "Yes\n<tool_calls>"),
    ("hunyuan_a13b", True, " Yes</answer>", "", " Yes</answer>"),
    ("ernie45", False, "Hm\n</think>\n\n<response>\nYes\n</response>\n", "Hm\n", "Yes"),
    ("ernie45", False, "Hm</think>\n\nYes", "Hm", "\n\nYes"),
]


@pytest.mark.parametrize(("name", "ended", "text", "reasoning", "content"), OTHERS)
def test_families_mark_their_reasoning(name: str, ended: bool | None, text: str, reasoning: str, content: str) -> None:
    make = REASONING_PARSERS[name]
    assert split(make(ended), [text]) == (reasoning, content)
    for cut in range(len(text)):
        assert split(make(ended), [text[:cut], text[cut:]]) == (reasoning, content)
    assert split(make(ended), list(text)) == (reasoning, content)


def test_prompts_say_whether_there_will_be_reasoning() -> None:
    assert REASONING_PARSERS["deepseek_v3"].ended_in("<assistant>", None, {}) is True
    assert REASONING_PARSERS["deepseek_v3"].ended_in("<assistant><think>", None, {"thinking": True}) is False
    for name, opened in (("glm45", "<think>"), ("mistral", "[THINK]"), ("gemma4", "<|channel>thought\n")):
        assert REASONING_PARSERS[name].ended_in("<assistant>", None, {}) is None
        assert REASONING_PARSERS[name].ended_in(f"<assistant>{opened}", None, {}) is False
    assert REASONING_PARSERS["glm45"].ended_in("<assistant>", None, {"enable_thinking": False}) is True


@given(parts=st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think>", "a", " ", "\n"]), max_size=12))
@settings(max_examples=200, deadline=None)
def test_every_split_gives_the_same(parts: list[str]) -> None:
    make = REASONING_PARSERS["qwen3"]
    text = "".join(parts)
    whole = split(make(ended=False), [text])
    assert split(make(ended=False), list(text)) == whole
    assert split(make(ended=False), parts) == whole


@pytest.mark.parametrize("name", BOTH)
def test_all_is_content_once_the_prompt_ended_the_reasoning(name: str) -> None:
    make = REASONING_PARSERS[name]
    assert make.ended_in("<user>Hi<assistant><think>\n\n</think>\n\n", None, {})
    assert not make.ended_in("<user>Hi</think><assistant><think>\n", None, {})
    assert not make.ended_in("<user>Hi<assistant>", None, {})
    assert split(make(ended=True), ["a <think> b"]) == ("", "a <think> b")


@pytest.mark.parametrize("name", BOTH)
def test_a_message_that_is_continued_says_whether_it_was_thinking(name: str) -> None:
    make = REASONING_PARSERS[name]
    assert make.ended_in("", "The answer is", {})
    assert make.ended_in("", "<think>Hm</think>The answer is", {})
    assert not make.ended_in("", "<think>Hm", {})


def test_qwen3_thinks_unless_the_template_was_told_not_to() -> None:
    assert REASONING_PARSERS["qwen3"].ended_in("<assistant>", None, {"enable_thinking": False})
    assert not REASONING_PARSERS["qwen3"].ended_in("<assistant>", None, {"enable_thinking": True})
    assert not REASONING_PARSERS["deepseek_r1"].ended_in("<assistant>", None, {"enable_thinking": False})


HARMONY = [
    ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes. ", "Hm.", "Yes. "),
    ("<|channel|>analysis<|message|>never ends", "never ends", ""),
    ("<|channel|>commentary<|message|>First this.<|end|>", "", "First this."),
    (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis to=python code<|message|>1+1"
        "<|call|><|start|>assistant<|channel|>final<|message|>2<|return|>",
        "a1+1",
        "2",
    ),
    ("<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>", "", ""),
    ("no marks, a < b", "", "no marks, a < b"),
    ("<|message|>no channel", "", "no channel"),
]


@pytest.mark.parametrize(("text", "reasoning", "content"), HARMONY)
def test_channels_of_harmony(text: str, reasoning: str, content: str) -> None:
    make = REASONING_PARSERS["openai_gptoss"]
    assert split(make(ended=False), [text]) == (reasoning, content)
    for cut in range(len(text)):
        assert split(make(ended=False), [text[:cut], text[cut:]]) == (reasoning, content)
    assert split(make(ended=False), list(text)) == (reasoning, content)


def test_a_message_of_harmony_that_is_continued_is_for_the_user() -> None:
    make = REASONING_PARSERS["openai_gptoss"]
    assert make.ended_in("<|start|>assistant", "The answer is", {})
    assert make.ended_in("<|start|>assistant<|channel|>final<|message|>", None, {})
    assert not make.ended_in("<|channel|>final<|message|>x<|end|><|start|>assistant", None, {})
    assert split(make(ended=True), [" 42.<|return|>"]) == ("", " 42.")

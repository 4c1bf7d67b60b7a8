"""Letters of all of Unicode come out as they were written, through every door that takes text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.structured_output.byte_text import allows, allows_value, compiled
from vllm.entrypoints.chat.tool_parsers.forced import required_form
from vllm.sampling_params import StructuredOutputsParams

# Letters whose numbers run into the digits behind them, where a grammar's text is read twice.
KNOWN = [
    "größe",
    "année",
    "поле1",
    "字段1",
    "🙂a",
    "é1 ",
    "ÿ0",
    "Àf",
    "\u0080a",
    "\u00a0b",
    "\u2028c",
    "\ufeffd",
    "\U0010fffd9",
]


def random_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    ranges = [(0x20, 0x7E), (0xA0, 0xFF), (0x100, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFD), (0x10000, 0x10FFFD)]

    def text() -> str:
        chars = [chr(rng.randint(*rng.choice(ranges))) + rng.choice(["", "", "a", "F", "0", "7"]) for _ in range(4)]
        return "".join(chars)

    return [text() for _ in range(count)]


TEXTS = KNOWN + random_texts(7, 30)


def key(text: str) -> tuple[dict[str, Any], str]:
    schema = {"type": "object", "properties": {text: {"const": 1}}, "required": [text]}
    return {"json": schema}, json.dumps({text: 1}, ensure_ascii=False)


def value(text: str) -> tuple[dict[str, Any], str]:
    return {"json": {"enum": [text, "other"]}}, json.dumps(text, ensure_ascii=False)


def value_in_a_tag(text: str) -> tuple[dict[str, Any], str]:
    schema = {"type": "object", "properties": {text: {"const": text}}, "required": [text]}
    tag = {"type": "tag", "begin": f"<{text}>", "content": {"type": "json_schema", "json_schema": schema}, "end": text}
    whole = json.dumps({text: text}, ensure_ascii=False)
    return {"structural_tag": {"format": tag}}, f"<{text}>{whole}{text}"


def pattern(text: str) -> tuple[dict[str, Any], str]:
    schema = {"type": "string", "pattern": f"^{re.escape(text)}$"}
    return {"json": schema}, json.dumps(text, ensure_ascii=False)


def regex(text: str) -> tuple[dict[str, Any], str]:
    return {"regex": f"{re.sub(r'([^0-9A-Za-z])', _escaped, text)}[0-9]"}, f"{text}5"


def _escaped(match: re.Match[str]) -> str:
    return f"\\{match[1]}" if match[1] in r"\.+*?()|[]{}^$-/" else match[1]


def choice(text: str) -> tuple[dict[str, Any], str]:
    return {"choice": [text, "other"]}, text


def lark(text: str) -> tuple[dict[str, Any], str]:
    return {"grammar": f'start: {json.dumps(text, ensure_ascii=False)} "1"\n'}, f"{text}1"


def gbnf(text: str) -> tuple[dict[str, Any], str]:
    return {"grammar": f"root ::= {json.dumps(text, ensure_ascii=False)} [0-9]\n"}, f"{text}7"


@pytest.mark.parametrize("door", [key, value, value_in_a_tag, pattern, regex, choice, lark, gbnf])
@pytest.mark.parametrize("backend", ["auto", "xgrammar"])
def test_a_text_comes_out_as_it_is(door: Callable[[str], tuple[dict[str, Any], str]], backend: Any) -> None:
    wrong = []
    for text in TEXTS:
        fields, output = door(text)
        made = compiled(backend, **fields)
        if not allows(made, output) or allows(made, output.replace(text[0], "\u2603", 1)):
            wrong.append(text)
    assert wrong == []


def test_arguments_of_tools_have_their_letters() -> None:
    for text in TEXTS:
        parameters = {"type": "object", "properties": {text: {"enum": [text]}}, "required": [text]}
        form = required_form([{"function": {"name": "f", "parameters": parameters}}], parallel=False)
        assert isinstance(form, StructuredOutputsParams)
        made = compiled(structural_tag=form.structural_tag, enforces_all=False)
        arguments = json.dumps({text: text}, ensure_ascii=False)
        assert allows(made, f'[{{"name": "f", "parameters": {arguments}}}]'), text


def test_free_strings_may_hold_any_letter() -> None:
    made = compiled(json={"type": "string"})
    limited = compiled(json={"type": "string", "maxLength": 12})
    assert [text for text in TEXTS if not (allows_value(made, text) and allows_value(limited, text))] == []

"""Tool parsers: what they find in outputs of their formats, however the text is split."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.entrypoints.chat.events import CallArguments, CallBegun, CallEnded, PartEvent, Reasoning, Text
from vllm.entrypoints.chat.tool_parsers import TOOL_PARSERS, ToolParser
from vllm.entrypoints.chat.tool_parsers.forced import NamedToolParser, RequiredToolParser

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "units": {"enum": ["C", "F"]},
        "more": {"type": "object"},
        "maybe": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "exact": {"type": ["boolean", "null"]},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]

Calls = list[tuple[str, Any]]
CITY = {"city": 'Rome "</tool_call>" {[\\ é\n', "days": 2}
CITY_JSON = json.dumps(CITY, ensure_ascii=False)
V3 = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"


KIMI = "<|tool_calls_section_begin|><|tool_call_begin|>"


def v3(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


# Parser, output, content, calls; arguments are compared as values where the output has them as JSON.
CASES: list[tuple[str, str, str, Calls]] = [
    ("openai", "Hello, world. ", "Hello, world. ", []),
    (
        "openai",
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        f"<|constrain|>json<|message|>{CITY_JSON}<|call|><|start|>assistant to=functions.now<|channel|>commentary json"
        "<|message|>{}<|call|>",
        "I look.",
        [("weather", CITY), ("now", {})],
    ),
    ("openai", " to=functions.now<|channel|>commentary<|message|>{}", "", [("now", {})]),
    ("openai", "<|channel|>final<|message|>to=functions.now {}<|return|>", "to=functions.now {}", []),
    ("hermes", "Hello, world. ", "Hello, world. ", []),
    (
        "hermes",
        f'I look.\n<tool_call>\n{{"name": "weather", "arguments": {CITY_JSON}}}\n</tool_call>\n'
        '<tool_call>{"arguments": {}, "name": "now"}</tool_call>\n',
        "I look.",
        [("weather", CITY), ("now", {})],
    ),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}', "", [("now", {"a": 1})]),
    ("hermes", '<tool_call>{"id": [1, {"name": 2}], "name": "now", "arguments": {}}', "", [("now", {})]),
    ("hermes", "<tool_call>nonsense</tool_call> x", "<tool_call>nonsense</tool_call> x", []),
    ("hermes", '<tool_call>{"nome": 1}', '<tool_call>{"nome": 1}', []),
    ("hermes", "a < b and <tool_cal", "a < b and <tool_cal", []),
    (
        "hermes",
        '<tool_call>{"name": "now", "arguments": {}}\n<tool_call>{"name": "now", "parameters": {"a": 1}}</tool_call>',
        "",
        [("now", {}), ("now", {"a": 1})],
    ),
    ("llama3_json", f'{{"name": "weather", "parameters": {CITY_JSON}}}', "", [("weather", CITY)]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "now", "arguments": {"a": [1]}}',
        "",
        [("now", {}), ("now", {"a": [1]})],
    ),
    ("llama3_json", ' {"type": "function", "name": "now", "parameters": {}}', "", [("now", {})]),
    ("llama3_json", '{"name": "Ann", "age": 31}', '{"name": "Ann", "age": 31}', []),
    ("llama3_json", '{"answer": 3} is it', '{"answer": 3} is it', []),
    ("llama3_json", "Plain text {", "Plain text {", []),
    ("llama3_json", '{"name": "now", "parameters": {}} so.', "so.", [("now", {})]),
    ("llama3_json", '{"name": "now"', '{"name": "now"', []),
    (
        "mistral",
        f'Look: [TOOL_CALLS] [{{"name": "weather", "arguments": {CITY_JSON}}}, {{"name": "now", "arguments": {{}}}}]',
        "Look:",
        [("weather", CITY), ("now", {})],
    ),
    ("mistral", f"[TOOL_CALLS]weather{CITY_JSON}[TOOL_CALLS]now{{}}", "", [("weather", CITY), ("now", {})]),
    ("mistral", '[TOOL_CALLS]weather[ARGS]{"days": 1}', "", [("weather", {"days": 1})]),
    ("mistral", "[TOOL_CALLS]now[CALL_ID]abc123xyz[ARGS]{}", "", [("now", {})]),
    ("mistral", '[TOOL_CALLS]{"name": "now", "arguments": {}}', "", [("now", {})]),
    ("mistral", "No [TOOL] here", "No [TOOL] here", []),
    (
        "pythonic",
        "[weather(city='It\\'s, [here]', days=-2, more={'a': [True, None]}), now()]",
        "",
        [("weather", {"city": "It's, [here]", "days": -2, "more": {"a": [True, None]}}), ("now", {})],
    ),
    ("pythonic", "<|python_start|>[a.b(x=true)]<|python_end|>", "", [("a.b", {"x": True})]),
    ("pythonic", "[1, 2] are numbers", "[1, 2] are numbers", []),
    ("pythonic", "[see(the) footnote]", "[see(the) footnote]", []),
    ("pythonic", "Plain [now()]", "Plain [now()]", []),
    ("pythonic", "[now(", "[now(", []),
    (
        "qwen3_coder",
        "I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n\"</parameter\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n<parameter=units>C</parameter>\n<parameter=more>{\"a\": 1}</parameter>\n"
        "<parameter=maybe>null</parameter><parameter=exact>True</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "I look.",
        [
            (
                "weather",
                {"city": 'Rome\n"</parameter', "days": 2, "units": "C", "more": {"a": 1}, "maybe": None, "exact": True},
            ),
            ("now", {}),
        ],
    ),
    ("qwen3_coder", "<function=weather><parameter=city>R</parameter></function>", "", [("weather", {"city": "R"})]),
    (
        "qwen3_coder",
        "<tool_call><function=weather><parameter=city>a\n<parameter=days>7</function></tool_call>",
        "",
        [("weather", {"city": "a", "days": 7})],
    ),
    (
        "qwen3_coder",
        "<tool_call><function=weather><parameter=city>null</parameter><parameter=days>x</parameter></function>",
        "",
        [("weather", {"city": None, "days": "x"})],
    ),
    ("qwen3_coder", "<function=weather><parameter=city></parameter></function>", "", [("weather", {"city": ""})]),
    ("qwen3_coder", "1 <function 2", "1 <function 2", []),
    (
        "deepseek_v3",
        "Hi" + V3.format(v3("weather", CITY_JSON) + "\n" + v3("now", "{}")),
        "Hi",
        [("weather", CITY), ("now", {})],
    ),
    (
        "deepseek_v3",
        V3.format("<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>" * 2),
        "",
        [("now", {}), ("now", {})],
    ),
    ("deepseek_v3", "Only <｜text｜>", "Only <｜text｜>", []),
    ("deepseek_v3", V3[:21] + "<｜tool▁call▁begin｜>now", V3[:21] + "<｜tool▁call▁begin｜>now", []),
    # What breaks before its arguments is text, and so is what only speaks of the format.
    ("hermes", '<tool_call>{"name": "now"', '<tool_call>{"name": "now"', []),
    ("hermes", '<tool_call>{"name": "now", "x', '<tool_call>{"name": "now", "x', []),
    ("mistral", "Say [TOOL_CALLS] and then {", "Say [TOOL_CALLS] and then {", []),
    ("mistral", '[TOOL_CALLS][{"name": "now"', '[TOOL_CALLS][{"name": "now"', []),
    ("mistral", "[TOOL_CALLS][oops]", "[TOOL_CALLS][oops]", []),
    ("llama3_json", 'Sure: {"name": "now", "parameters": {}}', "Sure:", [("now", {})]),
    ("llama3_json", 'I call <|python_tag|>{"name": "now", "parameters": {}}', "I call", [("now", {})]),
    ("llama3_json", 'See {"name": "x", "parameters": {}}.', 'See {"name": "x", "parameters": {}}.', []),
    ("llama3_json", 'f() { return 1 } {"a": 2}', 'f() { return 1 } {"a": 2}', []),
    ("qwen3_coder", "Write `<function=weather>` to call.", "Write `<function=weather>` to call.", []),
    ("qwen3_coder", "<tool_call> holds <function=now> and more", "<tool_call> holds <function=now> and more", []),
    ("qwen3_coder", "`<function=x></function>` is empty", "`<function=x></function>` is empty", []),
    ("qwen3_coder", "<tool_call>\n<function=now>", "<tool_call>\n<function=now>", []),
    ("qwen3_coder", "Hm.\n<tool_call>\n<function=now>\n</tool_call>", "Hm.", [("now", {})]),
    (
        "deepseek_v31",
        "Hi" + V3.format(f"<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{CITY_JSON}<｜tool▁call▁end｜>"),
        "Hi",
        [("weather", CITY)],
    ),
    (
        "kimi_k2",
        "Hm.<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        + CITY_JSON
        + "<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "Hm.",
        [("weather", CITY), ("now", {})],
    ),
    ("kimi_k2", f"{KIMI}functions.n", f"{KIMI}functions.n", []),
    (
        "deepseek_v32",
        "Hm.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"weather\">\n"
        '<｜DSML｜parameter name="city" string="true">null</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="other" string="false">[1, "a"]</｜DSML｜parameter>\n'
        '</｜DSML｜invoke>\n<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
        "Hm.",
        [("weather", {"city": "null", "days": 2, "other": [1, "a"]}), ("now", {})],
    ),
    (
        "minimax_m2",
        'Hm.\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Rome\n</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        "Hm.",
        [("weather", {"city": "Rome\n", "days": 2}), ("now", {})],
    ),
    ("minimax_m2", 'The tag <invoke name="x"> is', 'The tag <invoke name="x"> is', []),
    (
        "seed_oss",
        "Hm.<seed:tool_call>\n<function=weather>\n<parameter=city>Rome</parameter>\n<parameter=days>2</parameter>\n"
        "</function>\n</seed:tool_call>",
        "Hm.",
        [("weather", {"city": "Rome", "days": 2})],
    ),
    (
        "step3",
        "Hm.<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name=\"weather\">"
        '<steptml:parameter name="city">Rome</steptml:parameter></steptml:invoke><｜tool_call_end｜>'
        '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="now"></steptml:invoke><｜tool_call_end｜>'
        "<｜tool_calls_end｜>",
        "Hm.",
        [("weather", {"city": "Rome"}), ("now", {})],
    ),
    (
        "glm45",
        "Hm.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        "Hm.",
        [("weather", {"city": "Rome", "days": 2}), ("now", {})],
    ),
    (
        "glm47",
        "Hm.<tool_call>weather<arg_key>city</arg_key><arg_value>a < b</arg_value></tool_call>"
        "<tool_call>now</tool_call>",
        "Hm.",
        [("weather", {"city": "a < b"}), ("now", {})],
    ),
    ("glm45", "A <tool_call> is a tag.", "A <tool_call> is a tag.", []),
    (
        "longcat",
        f'<longcat_tool_call>{{"name": "weather", "arguments": {CITY_JSON}}}</longcat_tool_call>',
        "",
        [("weather", CITY)],
    ),
    ("ernie45", '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n', "", [("now", {})]),
    ("granite4", 'Hm. <tool_call>{"name": "now", "arguments": {}}</tool_call>', "Hm.", [("now", {})]),
    (
        "granite",
        f'<|tool_call|>[{{"name": "weather", "arguments": {CITY_JSON}}}, {{"name": "now", "arguments": {{}}}}]',
        "",
        [("weather", CITY), ("now", {})],
    ),
    ("granite", "A <tool_call> is a tag", "A <tool_call> is a tag", []),
    ("jamba", 'Hm.\n<tool_calls>[\n    {"name": "now", "arguments": {}}\n]</tool_calls>', "Hm.", [("now", {})]),
    (
        "hunyuan_a13b",
        f'<tool_calls>[{{"name": "weather", "arguments": {CITY_JSON}}}, {{"name": "now", "arguments": {{}}}}]'
        "</tool_calls>",
        "",
        [("weather", CITY), ("now", {})],
    ),
    ("phi4_mini_json", 'functools[{"name": "now", "arguments": {}}] Done.', "Done.", [("now", {})]),
    ("phi4_mini_json", "I like functools.partial [a]", "I like functools.partial [a]", []),
    (
        "internlm",
        'Hm.<|action_start|><|plugin|>\n{"name": "weather", "parameters": {"days": 1}}<|action_end|>\n',
        "Hm.",
        [("weather", {"days": 1})],
    ),
    (
        "xlam",
        f'[{{"name": "weather", "arguments": {CITY_JSON}}}, {{"name": "now", "arguments": {{}}}}]',
        "",
        [("weather", CITY), ("now", {})],
    ),
    ("xlam", 'Hm.\n```json\n[{"name": "now", "arguments": {}}]\n```', "Hm.", [("now", {})]),
    ("xlam", '<tool_call>[{"name": "now", "arguments": {}}]</tool_call>', "", [("now", {})]),
    ("xlam", '[{"name": "Ann"}]', '[{"name": "Ann"}]', []),
    ("xlam", "Code:\n```json\n[1]\n```\nDone", "Code:\n```json\n[1]\n```\nDone", []),
    (
        "olmo3",
        'Hm.\n<function_calls>\nweather(city="Rome", days=2)\nnow()\n</function_calls>',
        "Hm.",
        [("weather", {"city": "Rome", "days": 2}), ("now", {})],
    ),
    ("olmo3", "<function_calls>weather(\n  days=1,\n)</function_calls> ok", " ok", [("weather", {"days": 1})]),
    ("olmo3", "<function_calls>no call</function_calls>", "<function_calls>no call</function_calls>", []),
    ("llama4_pythonic", "<|python_start|>[now()]<|python_end|>", "", [("now", {})]),
    (
        "gemma4",
        'Hm.<|tool_call>call:weather{city:<|"|>a, {b}<tool_call|><|"|>,days:-2,'
        "more:{deep:[true,null,1.5,{}]}}<tool_call|>"
        "<|tool_call>call:now{}<tool_call|>",
        "Hm.",
        [("weather", {"city": "a, {b}<tool_call|>", "days": -2, "more": {"deep": [True, None, 1.5, {}]}}), ("now", {})],
    ),
    ("gemma4", "<|tool_call>oops{}<tool_call|>", "<|tool_call>oops{}<tool_call|>", []),
    ("gemma4", "<|tool_call>call:now{a:[1", "<|tool_call>call:now{a:[1", []),
]  # fmt: skip


def found(events: list[PartEvent]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls (name, arguments) of all events; checks that calls begin and end, one after the other."""
    content, calls, ids, is_open = "", [], [], False
    for event in events:
        match event:
            case Text(text):
                assert text and not is_open
                content += text
            case CallBegun(index, call_id, name):
                assert index == len(calls) and call_id and not is_open
                is_open = True
                ids.append(call_id)
                calls.append((name, ""))
            case CallArguments(index, text):
                assert index == len(calls) - 1 and text and is_open
                calls[index] = (calls[index][0], calls[index][1] + text)
            case CallEnded(index):
                assert index == len(calls) - 1 and is_open
                is_open = False
    assert not is_open
    assert len(set(ids)) == len(ids)
    return content, calls


def at_once(parser: ToolParser, text: str) -> tuple[str, list[tuple[str, str]]]:
    return found([*parser.feed(text), *parser.finish()])


def in_pieces(parser: ToolParser, text: str, cuts: list[int]) -> tuple[str, list[tuple[str, str]]]:
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    events = [event for a, b in pairwise(ends) for event in parser.feed(text[a:b])]
    return found([*events, *parser.finish()])


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_calls_and_content_are_found(name: str, text: str, content: str, calls: Calls) -> None:
    said, made = at_once(TOOL_PARSERS[name](TOOLS), text)
    assert said == content
    assert [(n, json.loads(arguments)) for n, arguments in made] == calls


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_every_split_in_two_and_every_letter_alone_give_the_same(
    name: str, text: str, content: str, calls: Calls
) -> None:
    whole = at_once(TOOL_PARSERS[name](TOOLS), text)
    for cut in range(len(text)):
        assert in_pieces(TOOL_PARSERS[name](TOOLS), text, [cut]) == whole, text[:cut]
    assert in_pieces(TOOL_PARSERS[name](TOOLS), text, list(range(len(text)))) == whole


# Pieces of all formats in any order: most outputs made of them are malformed in some way.
MARKS = sorted(
    {
        *("<tool_call>", "</tool_call>", "<function=weather>", "</function>", "<parameter=city>", "<parameter=days>"),
        *("</parameter>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<|python_start|>", "null"),
        *(
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>",
        ),
        *(
            '{"name": ',
            '"now"',
            ', "arguments": ',
            ', "parameters": ',
            '{"a": "b',
            '"}',
            "}",
            "{",
            "[",
            "]",
            "now(",
            ")",
        ),
        *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "weather", "<|tool_calls_section_begin|>"),
        *("<|tool_call_begin|>", "functions.now:0", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        *("<minimax:tool_call>", '<invoke name="now">', '<parameter name="city">', "</invoke>", "<function_calls>"),
        *("</function_calls>", "<|tool_call>", "call:now", '<|"|>', "<tool_call|>", "functools", "<tool_calls>"),
        *("<｜DSML｜function_calls>", '<｜DSML｜invoke name="now">', '<｜DSML｜parameter name="a" string="true">'),
        *("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>", "commentary", " to=functions.now"),
        *("a=1", "'", '"', ",", ";", "\n", " ", "\\", "x", "é", ":", "```", "json", "<", "</"),
    }
)


# One name a machine.
MACHINES = sorted({parser: name for name, parser in reversed(TOOL_PARSERS.items())}.values())


@pytest.mark.parametrize("name", MACHINES)
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from(MARKS), max_size=16), cuts=st.lists(st.integers(0, 160), max_size=12))
def test_malformed_outputs_give_the_same_however_they_are_split(name: str, parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    whole = at_once(TOOL_PARSERS[name](TOOLS), text)
    assert in_pieces(TOOL_PARSERS[name](TOOLS), text, cuts) == whole
    assert in_pieces(TOOL_PARSERS[name](TOOLS), text, list(range(len(text)))) == whole


@pytest.mark.parametrize("name", MACHINES)
@settings(max_examples=30, deadline=None)
@given(text=st.text(alphabet="ab \n.,'é<|", max_size=40))
def test_text_without_calls_comes_back_as_it_is(name: str, text: str) -> None:
    assert at_once(TOOL_PARSERS[name](TOOLS), text) == (text, [])


def test_arguments_are_handed_on_while_they_come() -> None:
    for name, start, end in [
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "', '"}}</tool_call>'),
        ("llama3_json", '{"name": "weather", "parameters": {"city": "', '"}}'),
        ("mistral", '[TOOL_CALLS]weather{"city": "', '"}'),
        ("openai", '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "', '"}<|call|>'),
        ("qwen3_coder", "<tool_call><function=weather><parameter=city>", "</parameter></function></tool_call>"),
        ("deepseek_v3", V3[:21] + '<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{"city": "', '"}\n```'),
    ]:
        parser = TOOL_PARSERS[name](TOOLS)
        fed = [parser.feed(start), *[parser.feed("word ") for _ in range(50)], parser.feed(end), parser.finish()]
        pieces = [event.text for events in fed for event in events if isinstance(event, CallArguments)]
        assert len(pieces) > 45, name
        assert json.loads("".join(pieces)) == {"city": "word " * 50}


def test_mistral_ids_have_nine_letters_or_digits() -> None:
    begun, _ = TOOL_PARSERS["mistral"](TOOLS).feed("[TOOL_CALLS]now{}")
    assert isinstance(begun, CallBegun)
    assert len(begun.id) == 9
    assert begun.id.isalnum()


@pytest.mark.parametrize(
    ("make", "text", "calls"),
    [
        (lambda: NamedToolParser(TOOLS, "weather"), '{"city": "Rome"}', [("weather", '{"city": "Rome"}')]),
        (
            lambda: RequiredToolParser(TOOLS),
            '[{"name": "weather", "parameters": {"days": 1}}, {"name": "now", "parameters": {}}]',
            [("weather", '{"days": 1}'), ("now", "{}")],
        ),
    ],
)
def test_forced_calls(make: Any, text: str, calls: list[tuple[str, str]]) -> None:
    assert at_once(make(), text) == ("", calls)
    assert in_pieces(make(), text, list(range(len(text)))) == ("", calls)


def test_reasoning_of_harmony_comes_with_the_calls_that_it_leads_to() -> None:
    parser = TOOL_PARSERS["openai"](TOOLS)
    parser.begin(reasoning_ended=False)
    text = (
        "<|channel|>analysis<|message|>They ask for the time.<|end|><|start|>assistant<|channel|>commentary "
        "to=functions.now <|constrain|>json<|message|>{}<|call|>"
    )
    first, second, *_ = [*parser.feed(text), *parser.finish()]
    assert first == Reasoning("They ask for the time.") and isinstance(second, CallBegun) and second.name == "now"

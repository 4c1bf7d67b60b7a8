"""The process that compiles: what it accepts, what it refuses and in which words, and that it cannot be held up."""

from __future__ import annotations

import os
import signal
import threading
import tracemalloc

import pytest

from vllm.entrypoints.chat.tool_parsers.forced import check_strict
from vllm.exceptions import ServerBusyError, VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.structured_output import compiler as compiler_module
from vllm.structured_output.compiler import ConstraintCompiler
from vllm.structured_output.constraint import MAX_CONSTRAINT_BYTES
from vllm.structured_output.json_schema import unenforced
from vllm.structured_output.messages import read_frame


def params(**fields: object) -> StructuredOutputsParams:
    return StructuredOutputsParams(**fields)  # type: ignore[arg-type]


def deep(levels: int) -> dict[str, object]:
    return {"type": "object", "properties": {"a": deep(levels - 1) if levels else {"type": "string"}}}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "exactly one of"),
        ({"json": {}, "regex": "a"}, "got json and regex"),
        ({"json": 7}, "JSON schema that is an object"),
        ({"json": "{nope"}, "not valid JSON"),
        ({"json": {"type": "objekt"}}, "Unsupported type"),
        ({"json": {"$ref": "#/$defs/nothing"}}, "Cannot find field"),
        ({"json": {"$ref": "#"}}, "no output at all"),
        ({"json": deep(300)}, "nested too deeply"),
        ({"regex": "(["}, "Regex parsing error"),
        ({"regex": ""}, "not empty"),
        ({"regex": "x" * (MAX_CONSTRAINT_BYTES + 1)}, "256 KiB at most"),
        ({"choice": []}, "list of strings"),
        ({"choice": ["a", ""]}, "none of them empty"),
        ({"choice": "yes"}, "list of strings"),
        ({"grammar": "root ::= foo"}, 'Rule "foo" is not defined'),
        ({"grammar": "start: foo"}, "unknown name 'foo'"),
        ({"structural_tag": {"format": {"type": "foo"}}}, "not recognized"),
        ({"structural_tag": {"structures": [7], "triggers": []}}, "objects as structures"),
        ({"structural_tag": "7"}, "with a format"),
        ({"json": {}, "whitespace_pattern": " "}, "whitespace_pattern"),
    ],
)
def test_malformed_forms_are_refused_in_one_line(
    compiler: ConstraintCompiler, fields: dict[str, object], why: str
) -> None:
    with pytest.raises(VLLMValidationError) as caught:
        compiler.compile(params(**fields)).result(60)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.param == "structured_outputs"


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "number", "multipleOf": 0.5}, "multipleOf"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {"const": 1}}, "contains"),
        ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "not (at $.properties.a)"),
        ({"if": {"const": 1}, "then": {"const": 1}}, "if"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"$defs": {"a": {"minimum": 3}}, "$ref": "#/$defs/a"}, "minimum without type integer or number"),
        ({"type": "string", "pattern": "a+", "maxLength": 3}, "pattern together with maxLength"),
        ({"allOf": [{"type": "string"}, {"enum": ["a"]}]}, "allOf with several"),
        ({"type": "object", "properties": {}, "anyOf": [{"required": ["a"]}]}, "properties beside anyOf"),
    ],
)
def test_keywords_that_would_be_ignored_are_refused(
    compiler: ConstraintCompiler, schema: dict[str, object], keyword: str
) -> None:
    tag = {"type": "tag", "begin": "<", "content": {"type": "json_schema", "json_schema": schema}, "end": ">"}
    for fields in ({"json": schema}, {"structural_tag": {"format": tag}}):
        with pytest.raises(VLLMValidationError) as caught:
            compiler.compile(params(**fields)).result(60)
        assert f"a JSON schema with {keyword}" in str(caught.value)
    compiler.compile(params(json=schema, enforces_all=False)).result(60)


def test_properties_may_be_called_like_keywords(compiler: ConstraintCompiler) -> None:
    properties = {name: {"type": "integer", "multipleOf": 5} for name in ("not", "if", "uniqueItems", "contains")}
    assert compiler.compile(params(json={"type": "object", "properties": properties})).result(60).data


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "((a?){1,50}){1,50}"},
        {"regex": "(((a{1,1000}){1,1000}){1,1000}){1,1000}"},
        {"regex": "(.{1,1000}x){1,1000}"},
        {"regex": "(a?a?a?a?a?a?a?a?a?a?)*b"},
        {"grammar": 'root ::= a\na ::= a a a | a a | "a" | ""'},
        {"json": {"type": "array", "items": {"type": "string", "maxLength": 5000}, "maxItems": 5000}},
    ],
)
def test_costly_forms_are_refused(compiler: ConstraintCompiler, fields: dict[str, object]) -> None:
    with pytest.raises(VLLMValidationError, match="simplify it"):
        compiler.compile(params(**fields)).result(60)


def test_equal_forms_are_compiled_once_and_errors_are_remembered(compiler: ConstraintCompiler) -> None:
    first = compiler.compile(params(regex="once[0-9]"))
    assert compiler.compile(params(regex="once[0-9]")) is first
    assert first.result(60).data
    assert compiler.compile(params(regex="once[0-9]")) is first
    failed = compiler.compile(params(regex="[once"))
    assert failed.exception(60)
    assert compiler.compile(params(regex="[once")) is failed


def test_the_order_of_properties_is_kept(compiler: ConstraintCompiler) -> None:
    one = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "string"}}}
    other = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}}
    assert compiler.compile(params(json=one)).result(60).key != compiler.compile(params(json=other)).result(60).key


def test_a_compiler_that_is_killed_fails_what_it_had_and_starts_again(compiler: ConstraintCompiler) -> None:
    compiler.compile(params(regex="before")).result(60)
    assert compiler._process is not None
    os.kill(compiler._process.pid, signal.SIGSTOP)
    lost = compiler.compile(params(regex="during"))
    os.kill(compiler._process.pid, signal.SIGKILL)
    with pytest.raises(ServerBusyError, match="interrupted"):
        lost.result(60)
    assert compiler.compile(params(regex="after[a-z]")).result(60).data


def test_an_answer_that_cannot_be_read_fails_whoever_waits(
    compiler: ConstraintCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.compile(params(regex="start")).result(60)
    with monkeypatch.context() as broken:
        broken.setattr(compiler_module, "read_frame", lambda stream: read_frame(stream) and b"\xc1")
        # The thread reads its first answer as before; that of the second one is broken.
        compiler.compile(params(regex="one")).result(60)
        with pytest.raises(ServerBusyError, match="interrupted"):
            compiler.compile(params(regex="two")).result(60)
    assert compiler.compile(params(regex="three[a-z]")).result(60).data


def test_too_many_at_once_are_turned_away(compiler: ConstraintCompiler) -> None:
    compiler.compile(params(regex="warm")).result(60)
    assert compiler._process is not None
    os.kill(compiler._process.pid, signal.SIGSTOP)
    try:
        waiting = [compiler.compile(params(regex=f"many{i}")) for i in range(64)]
        with pytest.raises(ServerBusyError, match="try again"):
            compiler.compile(params(regex="one more"))
    finally:
        os.kill(compiler._process.pid, signal.SIGCONT)
    assert all(outcome.result(60).data for outcome in waiting)


def test_several_threads_may_ask(compiler: ConstraintCompiler) -> None:
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(compiler.compile(params(regex=f"t{i % 3}")).result(60).key))  # type: ignore[misc]
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12
    assert len(set(found)) == 3


def test_a_strict_function_with_a_huge_schema_is_refused_before_it_is_searched() -> None:
    parameters = {"properties": {"x" * MAX_CONSTRAINT_BYTES: {"not": {}}}}
    with pytest.raises(VLLMValidationError, match="tools may have 256 KiB at most, got 256 of parameters") as caught:
        check_strict({"function": {"name": "f", "strict": True, "parameters": parameters}})
    assert caught.value.param == "tools"


def test_paths_of_a_schema_stay_short_whatever_its_names_are() -> None:
    children: dict[str, object] = {str(i): {} for i in range(20_000)}
    schema = {"properties": {"x" * 60_000: {"properties": children | {"a": {"not": {}}}}}}
    tracemalloc.start()
    try:
        keyword = unenforced(schema)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert keyword == f"not (at $.properties.{'x' * 50}….properties.a)"
    nested: dict[str, object] = {"not": {}}
    for _ in range(50):
        nested = {"items": nested}
    found = unenforced(nested)
    assert found is not None and len(found) < 220 and found.endswith("…)")

"""The process that compiles: what it accepts, what it refuses and in which words, and that it cannot be held up."""

from __future__ import annotations

import os
import signal
import threading
import tracemalloc

import msgspec
import pytest

from tests.structured_output.byte_text import STOP, VOCABULARY
from vllm.entrypoints.chat.tool_parsers.forced import named_form, required_form
from vllm.exceptions import ServerBusyError, VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.structured_output import compiler as compiler_module
from vllm.structured_output.compile_server import CompileServer
from vllm.structured_output.compiler import ConstraintCompiler
from vllm.structured_output.constraint import MAX_CONSTRAINT_BYTES, constraint_source
from vllm.structured_output.json_schema import unenforced
from vllm.structured_output.messages import CompileJob, CompileResult, CompileServerArgs, read_frame


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
        ({"json": {"type": "objekt"}}, "type must be one or several of"),
        ({"json": {"minLength": -1}}, "minLength must be a whole number"),
        ({"json": {"required": True}}, "required must be a list of strings"),
        ({"json": {"$ref": "#/$defs/nothing"}}, "$ref names nothing"),
        ({"json": {"$ref": "#"}}, "a $ref leads to itself"),
        ({"json": {"type": "string", "enum": [1]}}, "no output at all"),
        ({"json": {"pattern": "a("}}, "cannot be compiled"),
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
        ({"type": "number", "multipleOf": 0.0000123457}, "multipleOf 1.23457e-05"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {"const": 1}, "minContains": 20}, "minContains greater than 8"),
        ({"type": "string", "format": "color"}, "format 'color'"),
        ({"not": {"pattern": "a"}}, "not pattern"),
        ({"$ref": "http://example.com/schema"}, "a $ref to another document"),
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
    assert compiler.compile(params(json=schema, enforces_all=False)).result(60).data


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


@pytest.mark.nightly
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


def test_what_had_no_time_to_compile_is_not_held_against_it() -> None:
    server = CompileServer(VOCABULARY, CompileServerArgs("", False, VOCABULARY.size, [STOP]))
    answers: list[CompileResult] = []
    for sent in (signal.SIGSTOP, None):
        job = CompileJob(1, constraint_source(params(json={"type": "integer"})))
        reader, writer = os.pipe()
        server.out = open(writer, "wb")  # noqa: SIM115
        server._start(job)
        (child,) = server._running.values()
        if sent is not None:
            os.kill(child.pid, sent)
            child.deadline = 0.0
        while server._running:
            server.step()
        server.out.close()
        with open(reader, "rb") as stream:
            answers.append(msgspec.msgpack.decode(read_frame(stream) or b"", type=CompileResult))
    assert (answers[0].is_busy, answers[1].is_busy) == (True, False)
    assert answers[1].error is None and answers[1].engine == "guidance"


@pytest.mark.nightly
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


def test_a_strict_function_is_held_to_its_schema_and_another_is_followed_as_far_as_possible(
    compiler: ConstraintCompiler,
) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    loose, strict = ({"function": {"name": "f", "parameters": parameters, "strict": s}} for s in (False, True))
    for form in (named_form(loose), required_form([loose], True)):
        assert compiler.compile(form).result(60).data
    for form in (named_form(strict), required_form([loose, strict], True)):
        with pytest.raises(VLLMValidationError, match="a JSON schema with uniqueItems"):
            compiler.compile(form).result(60)


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

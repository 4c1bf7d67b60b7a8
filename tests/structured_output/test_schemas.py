"""JSON schemas: every keyword is kept or the schema is refused, however its parts meet."""

from __future__ import annotations

from typing import Any

import pytest

from tests.structured_output.byte_text import allows, allows_value, compiled
from vllm.structured_output.schema.emit import normal_schema
from vllm.structured_output.schema.errors import SchemaError

INTEGER, STRING = {"type": "integer"}, {"type": "string"}
OPEN = {"additionalProperties": True}


def has(name: str, **schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {name: schema}, "required": [name]}


# Schema, values that fit, values that do not.
KEPT: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    # Words beside a reference and beside lists of values.
    ({"$ref": "#/$defs/n", "minimum": 3, "$defs": {"n": INTEGER}}, [3], [2, "a"]),
    ({"enum": [1, "a", "bb", None], "type": "string", "minLength": 2}, ["bb"], ["a", 1, None]),
    ({"const": "a", "pattern": "^a$"}, ["a"], ["b"]),
    ({"enum": [[1, 1], [1, 2]], "uniqueItems": True}, [[1, 2]], [[1, 1]]),
    ({"enum": [3, 4], "not": {"multipleOf": 2}}, [3], [4]),
    # anyOf, allOf and oneOf beside others.
    ({"anyOf": [{"minimum": 5}, {"maximum": 1}], "type": "integer"}, [5, 1], [3, "a"]),
    (
        {
            "type": "object",
            "properties": {"a": INTEGER, "b": INTEGER},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        [{"a": 1}, {"b": 1}, {"a": 1, "b": 2}],
        [{}, {"a": "x"}, {"a": 1, "c": 2}],
    ),
    (
        {"allOf": [{"properties": {"a": INTEGER}, "required": ["a"]}, {"properties": {"b": STRING}}], "type": "object"},
        [{"a": 1}, {"a": 1, "b": "x"}],
        [{}, {"b": "x"}, {"a": 1, "b": 2}, {"a": 1, "c": 1}],
    ),
    ({"allOf": [{"pattern": "a"}, {"pattern": "b"}, {"maxLength": 3}], "type": "string"}, ["ab", "bxa"], ["a", "abab"]),
    ({"oneOf": [{"type": "number", "maximum": 5}, {"minimum": 2}]}, [1, 7.5, "x"], [3, 5]),
    ({"oneOf": [{"minLength": 2}, {"maxLength": 3}], "type": "string"}, ["a", "abcd"], ["ab", "abc"]),
    (
        {"oneOf": [has("k", const="x", **{}), has("k", const="y")]},
        [{"k": "x"}, {"k": "y"}],
        [{"k": "z"}, {}],
    ),
    # What is required need not have a schema of its own.
    (
        {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a", "b"]},
        [{"a": "x", "b": [1]}],
        [{"a": "x"}, {"b": 1}, {"a": "x", "b": 1, "c": 1}],
    ),
    ({"type": "object", "required": ["a"]}, [{"a": {"b": 1}}, {"a": 1, "z": 2}], [{}, {"z": 2}]),
    # One keyword alone.
    ({"type": "array", "minItems": 2}, [[1, "a"], [[], {}, None]], [[], [1], 7]),
    ({"type": "array", "maxItems": 1}, [[], [1]], [[1, 2]]),
    ({"type": "object", "maxProperties": 1}, [{}, {"a": 1}], [{"a": 1, "b": 2}]),
    ({"type": "object", "minProperties": 1}, [{"a": 1}], [{}]),
    (
        {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 2},
        [{"a": 1, "c": 1}, {"b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1}],
        [{"a": 1}, {}, {"c": 1}],
    ),
    (
        {"type": "object", "properties": {"a": {}, "b": {}}, "maxProperties": 1, **OPEN},
        [{"a": 1}, {"z": 1}],
        [{"a": 1, "b": 1}],
    ),
    # Keywords of one type say nothing of others.
    ({"pattern": "^a"}, ["ab", 1, None, [], {}], ["ba"]),
    ({"format": "date"}, ["2024-02-29", 1, {}], ["2023-02-29", "today"]),
    ({"minimum": 3}, [3, "a", None], [2, -1]),
    ({"required": ["a"]}, [1, "a", {"a": 1}], [{}]),
    # `pattern` searches; lengths count beside it.
    ({"type": "string", "pattern": "b+"}, ["b", "abc"], ["ac"]),
    ({"type": "string", "pattern": "^a+$", "minLength": 2, "maxLength": 3}, ["aa", "aaa"], ["a", "aaaa"]),
    ({"type": "string", "format": "email", "maxLength": 8}, ["a@b.de"], ["abcdef@b.de", "a"]),
    # References to anywhere.
    (
        {"properties": {"a": INTEGER, "b": {"$ref": "#/properties/a"}}, "type": "object"},
        [{"a": 1, "b": 2}],
        [{"b": "x"}],
    ),
    ({"$ref": "#here", "$defs": {"x": {"$anchor": "here", "type": "integer"}}}, [1], ["a"]),
    ({"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": STRING}}, ["x"], [1]),
    (
        {"$id": "http://x.org/root", "$ref": "item", "$defs": {"i": {"$id": "item", "$ref": "#/n", "n": INTEGER}}},
        [1],
        ["a"],
    ),
    (
        {"$ref": "#/$defs/t", "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2}}},
        [[], [[], [[]]]],
        [[1], [[], [], []]],
    ),
    # Names by pattern and by rule, beside names that are written out.
    (
        {"type": "object", "properties": {"ab": {"maximum": 5}}, "patternProperties": {"^a": INTEGER}},
        [{"ab": 5}, {"ac": 9}],
        [{"ab": 6}, {"ab": 2.5}, {"ac": "x"}, {"z": 1}],
    ),
    ({"type": "object", "propertyNames": {"pattern": "^[a-c]+$"}}, [{"abc": 1}, {}], [{"x": 1}]),
    (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": INTEGER},
        [{"a": 1, "b": 2}],
        [{"c": 1}, {"a": "x"}],
    ),
    ({"type": "object", "propertyNames": {"maxLength": 2}}, [{"ab": 1}], [{"abc": 1}]),
    # A name is what it reads as, not how it is written.
    (
        {"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": STRING},
        [{"a": 1, "b": "x"}],
        [{"a": "x"}],
    ),
    # Conditions.
    (
        {
            "type": "object",
            "properties": {"k": {"enum": ["x", "y"]}, "n": {}},
            "required": ["k"],
            "if": {"properties": {"k": {"const": "x"}}},
            "then": {"required": ["n"]},
            "else": {"properties": {"n": False}},
        },
        [{"k": "x", "n": 1}, {"k": "y"}],
        [{"k": "x"}, {"k": "y", "n": 1}],
    ),
    (
        {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
        [{}, {"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}],
    ),
    (
        {"type": "object", "properties": {"a": {}, "b": {}}, "dependentSchemas": {"a": {"properties": {"b": INTEGER}}}},
        [{"b": "x"}, {"a": 1, "b": 1}],
        [{"a": 1, "b": "x"}],
    ),
    ({"not": {"type": ["string", "object"]}}, [1, None, []], ["a", {}]),
    ({"type": "string", "not": {"enum": ["a", "ab", "ß"]}}, ["", "b", "abc", "s"], ["a", "ab", "ß"]),
    ({"type": "integer", "not": {"const": 5}}, [4, 6, 50], [5]),
    # What nothing has looked at.
    (
        {
            "type": "object",
            "allOf": [{"properties": {"a": INTEGER}}],
            "properties": {"b": INTEGER},
            "unevaluatedProperties": False,
        },
        [{"b": 1, "a": 1}, {}],
        [{"c": 1}, {"a": "x"}],
    ),
    ({"type": "array", "prefixItems": [INTEGER], "unevaluatedItems": STRING}, [[1], [1, "a"], []], [[1, 2], ["a"]]),
    # Lists.
    ({"type": "array", "items": [INTEGER, STRING], "additionalItems": False}, [[1, "a"], [1]], [["a"], [1, "a", 2]]),
    ({"type": "array", "items": [INTEGER], "additionalItems": STRING}, [[1, "a", "b"]], [[1, 2]]),
    ({"type": "array", "contains": {"const": 1}}, [[1], [2, 1, 3], ["a", 2, 1]], [[], [2, 3]]),
    ({"type": "array", "contains": {"const": 1}, "maxContains": 1, "items": INTEGER}, [[1, 2], [3, 1]], [[1, 1], [2]]),
    (
        {"type": "array", "uniqueItems": True, "items": {"enum": ["a", "b", "c"]}},
        [[], ["b", "a"], ["c", "a", "b"]],
        [["a", "a"]],
    ),
    ({"type": "object", "properties": {"a": False, "b": {}}}, [{"b": 1}, {}], [{"a": 1}]),
    ({"type": "object", "properties": {"a": False}, **OPEN}, [{"b": 1}], [{"a": 1}]),
    # Numbers.
    ({"type": "number", "multipleOf": 0.25}, [0.75, 3, -1.75], [0.3]),
    ({"type": "integer", "multipleOf": 3, "exclusiveMinimum": 3}, [6, 9], [3, 7]),
    ({"type": "integer", "minimum": 0.5, "maximum": 2.5}, [1, 2], [0, 3]),
    (
        {
            "type": "number",
            "minimum": 1,
            "exclusiveMinimum": True,
            "$schema": "http://json-schema.org/draft-04/schema#",
        },
        [1.5],
        [1],
    ),
    ({"type": "integer", "format": "uint8"}, [0, 255], [-1, 256]),
    ({"type": "array", "maxItems": 2.0}, [[1, 2]], [[1, 2, 3]]),
]


@pytest.mark.parametrize(("schema", "fit", "others"), KEPT, ids=[str(i) for i in range(len(KEPT))])
def test_a_schema_is_kept(schema: dict[str, Any], fit: list[Any], others: list[Any]) -> None:
    made = compiled(json=schema)
    assert made.engine == "guidance"
    assert [value for value in fit if not allows_value(made, value)] == []
    assert [value for value in others if allows_value(made, value)] == []


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "color"}, "format 'color'"),
        ({"type": "string", "pattern": "^(?!a)b"}, "look-around"),
        ({"type": "string", "pattern": "a("}, "regex parse error"),
        ({"$ref": "other.json"}, "a $ref to another document, 'other.json'"),
        ({"type": "object", "not": {"patternProperties": {"a": {"type": "string"}}}}, "not patternProperties"),
        ({"type": "object", "patternProperties": {"a": STRING, "b": INTEGER}}, "not disjoint"),
        ({"type": "number", "multipleOf": 0.00012345678}, "multipleOf"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "no output at all"),
        ({"$ref": "#/nowhere"}, "$ref names nothing in the schema"),
        ({"allOf": [{"$ref": "#"}]}, "a $ref leads to itself"),
        ({"properties": []}, "properties must be an object"),
        ({"type": "object", "properties": {"a": 7}}, "a schema must be an object or a boolean, got 7"),
        ({"anyOf": []}, "anyOf must be a list of schemas"),
        ({"allOf": [{"anyOf": [{"const": [i, j]} for j in range(50)]} for i in range(5)]}, "no output at all"),
        ({"allOf": [{"anyOf": [has(f"{i}", const=j) for j in range(9)]} for i in range(9)]}, "too many ways"),
        ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "not multipleOf"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_kept_is_refused_and_named(schema: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError) as caught:
        compiled(json=schema)
    assert why in str(caught.value)


def test_objects_are_closed_unless_they_say_otherwise() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": INTEGER}}}}
    assert not allows_value(compiled(json=schema), {"a": {"c": 1}})
    assert allows_value(compiled(json=schema | {"additionalProperties": True}), {"z": 1})
    assert not allows_value(compiled(json={"type": "object", "properties": {}}), {"z": 1})
    assert allows_value(compiled(json={"type": "object"}), {"z": {"y": [1]}})
    tuple_ = {"type": "array", "prefixItems": [INTEGER]}
    assert not allows_value(compiled(json=tuple_), [1, 2])
    assert allows_value(compiled(json=tuple_ | {"items": True}), [1, 2])


def test_what_a_schema_says_to_an_engine_does_not_count() -> None:
    made = compiled(json={"x-guidance": {"lenient": True, "whitespace_flexible": False}, **has("a", type="integer")})
    assert allows(made, '{ "a" : 1 }') and not allows(made, '{"a": "x"}')


def test_names_cannot_be_written_so_that_they_look_like_others() -> None:
    made = compiled(json={"type": "object", "properties": {"a": {"const": 1}}, "additionalProperties": STRING})
    assert not allows(made, '{"\\u0061": "x"}')


def test_white_space_goes_where_it_was_asked_for() -> None:
    compact = compiled(json=has("a", type="array"), disable_any_whitespace=True)
    assert allows(compact, '{"a": [1, 2]}') and not allows(compact, '{"a":[1,2]}') and not allows(compact, '{ "a": []}')
    free = compiled(json=has("a", type="array"))
    assert allows(free, '{\n  "a": [1 , 2]\n}')


def test_a_schema_begins_behind_the_first_end_of_the_reasoning() -> None:
    made = compiled(json=has("a", type="integer"), after="</think>")
    assert made.engine == "guidance"
    assert allows(made, 'Hm, {"a": …}.</think>{"a": 1}')
    assert not allows(made, '{"a": 1}') and not allows(made, 'x</think>y</think>{"a": 1}')


@pytest.mark.parametrize("backend", ["auto", "xgrammar", "guidance"])
def test_each_backend_keeps_what_it_takes(backend: Any) -> None:
    made = compiled(backend, json=has("a", enum=["x", "y"]))
    assert made.engine == ("xgrammar" if backend == "xgrammar" else "guidance")
    assert allows_value(made, {"a": "x"}) and not allows_value(made, {"a": "z"})


def test_what_llguidance_cannot_write_goes_to_xgrammar_unless_that_is_excluded() -> None:
    schema = has("a\x7fb", enum=["\x01", "c"])
    made = compiled(json=schema)
    assert made.engine == "xgrammar"
    assert allows(made, '{"a\\u007fb": "\\u0001"}') and not allows(made, '{"ab": "c"}')
    with pytest.raises(ValueError, match="control character"):
        compiled("guidance", json=schema)


def test_large_schemas_are_served() -> None:
    many = {"enum": [f"value {i}" for i in range(10_000)]}
    made = compiled(json=many)
    assert allows_value(made, "value 9999") and not allows_value(made, "value 10000")
    fields = {f"field_{i}": STRING for i in range(20)}
    made = compiled(json={"type": "object", "properties": fields, "additionalProperties": True})
    assert allows_value(made, {"field_3": "a", "field_19": "b", "other": 1}) and not allows_value(made, {"field_3": 1})


def test_a_normal_form_says_what_the_schema_says() -> None:
    for schema, fit, others in KEPT:
        again = normal_schema(normal_schema(schema).schema)
        assert not again.lost
        made = compiled(json=again.schema)
        assert all(allows_value(made, value) for value in fit), schema
        assert not any(allows_value(made, value) for value in others), schema


def test_deep_schemas_are_refused_without_harm() -> None:
    schema: Any = {"type": "string"}
    for _ in range(3000):
        schema = {"not": {"not": schema}}
    with pytest.raises(SchemaError, match="nested too deeply"):
        normal_schema(schema)

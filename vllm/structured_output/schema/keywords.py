"""What the keywords of one type say: read from a schema into a kind, or what is left where they must not hold.

JSON Schema Validation 2020-12, section 6, and the older spellings: `items` as a list with `additionalItems` (draft 7),
`exclusiveMinimum` as a boolean (draft 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from math import isfinite
from typing import Any

from vllm.structured_output.schema.errors import SchemaError, shortened
from vllm.structured_output.schema.kinds import (
    Array,
    Contains,
    Evaluated,
    Goal,
    Kind,
    Lost,
    Number,
    Object,
    Rest,
    String,
)
from vllm.structured_output.schema.strings import ENGINE_FORMATS, FORMATS, integer_bounds

GoalOf = Callable[[Any, bool], Goal]
"""The goal of a subschema that must fit (True) or must not (False)."""


def number(schema: dict[str, Any]) -> Number:
    low, low_excluded = _bound(schema, "minimum", "exclusiveMinimum", 1)
    high, high_excluded = _bound(schema, "maximum", "exclusiveMaximum", -1)
    step = None
    if "multipleOf" in schema:
        step = _fraction(schema, "multipleOf")
        if step <= 0:
            raise SchemaError(f"multipleOf must be greater than 0, got {shortened(schema['multipleOf'])}")
    return Number(low=low, low_excluded=low_excluded, high=high, high_excluded=high_excluded, step=step)


def number_format(schema: dict[str, Any]) -> Number:
    """What OpenAPI's formats say of numbers."""
    name = schema.get("format")
    bounds = integer_bounds(name) if isinstance(name, str) else None
    return Number() if bounds is None else Number(low=Fraction(bounds[0]), high=Fraction(bounds[1]))


def _bound(schema: dict[str, Any], key: str, excluding: str, sign: int) -> tuple[Fraction | None, bool]:
    other = schema.get(excluding)
    found: list[tuple[Fraction, bool]] = []
    if key in schema:
        found.append((_fraction(schema, key), other is True))
    if excluding in schema and not isinstance(other, bool):
        found.append((_fraction(schema, excluding), True))
    return max(found, key=lambda bound: (bound[0] * sign, bound[1]), default=(None, False))


def _fraction(schema: dict[str, Any], key: str) -> Fraction:
    value = schema[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SchemaError(f"{key} must be a number, got {shortened(value)}")
    if isinstance(value, float) and not isfinite(value):
        raise SchemaError(f"{key} must be a number of at most 308 digits, got {shortened(value)}")
    return Fraction(str(value))


def count(schema: dict[str, Any], key: str) -> int | None:
    """A keyword whose value is a number of things; None where it is absent."""
    value = schema.get(key)
    if value is None and key not in schema:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53 or value != int(value):
        raise SchemaError(f"{key} must be a whole number of 0 or more, got {shortened(value)}")
    return int(value)


def string(schema: dict[str, Any]) -> String:
    low, high = count(schema, "minLength") or 0, count(schema, "maxLength")
    patterns = set()
    if "pattern" in schema:
        patterns.add(_text(schema, "pattern"))
    formats: frozenset[str] = frozenset()
    lost: tuple[Lost, ...] = ()
    if "format" in schema:
        name = _text(schema, "format")
        if name in ENGINE_FORMATS:
            formats = frozenset((name,))
        elif name not in FORMATS:
            lost = (Lost(f"format {shortened(name)}", lambda value: None),)
        elif (regex := FORMATS.get(name)) is not None:
            patterns.add(f"^(?:{regex})$")
    return String(low=low, high=high, patterns=frozenset(patterns), formats=formats, lost=lost)


def _text(schema: dict[str, Any], key: str) -> str:
    if not isinstance(schema[key], str):
        raise SchemaError(f"{key} must be a string, got {shortened(schema[key])}")
    return str(schema[key])


def array(schema: dict[str, Any], goal_of: GoalOf) -> Array:
    listed = schema.get("prefixItems")
    rest = schema.get("items", True)
    is_explicit = "items" in schema
    if isinstance(rest, list):
        listed, rest, is_explicit = rest, schema.get("additionalItems", True), "additionalItems" in schema
    first = tuple(goal_of(item, True) for item in _list(listed, "prefixItems"))
    contains: tuple[Contains, ...] = ()
    if "contains" in schema:
        low, high = count(schema, "minContains"), count(schema, "maxContains")
        inside = schema["contains"]
        contains = (Contains(goal_of(inside, True), goal_of(inside, False), 1 if low is None else low, high),)
    return Array(
        first=first,
        rest=goal_of(rest, True),
        low=count(schema, "minItems") or 0,
        high=count(schema, "maxItems"),
        contains=contains,
        unique=schema.get("uniqueItems") is True,
        is_tuple=bool(first),
        is_explicit=is_explicit,
        evaluated=Evaluated(num_items=len(first), all_items=is_explicit),
    )


def _list(value: Any, key: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise SchemaError(f"{key} must be a list, got {shortened(value)}")
    return value


def mapping(schema: dict[str, Any], key: str) -> dict[str, Any]:
    value = schema.get(key, {})
    if not isinstance(value, dict):
        raise SchemaError(f"{key} must be an object, got {shortened(value)}")
    return value


def names(schema: dict[str, Any], key: str) -> list[str]:
    """A keyword whose value is a list of property names."""
    return strings(schema.get(key, []), key)


def strings(value: Any, key: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise SchemaError(f"{key} must be a list of strings, got {shortened(value)}")
    return value


def object_(schema: dict[str, Any], goal_of: GoalOf) -> Object:
    properties = {name: goal_of(child, True) for name, child in mapping(schema, "properties").items()}
    patterns = {regex: goal_of(child, True) for regex, child in mapping(schema, "patternProperties").items()}
    is_explicit = "additionalProperties" in schema
    rests: tuple[Rest, ...] = ()
    if is_explicit:
        rest = goal_of(schema["additionalProperties"], True)
        rests = (Rest(frozenset(properties), frozenset(patterns), rest),) if rest else ()
    return Object(
        properties=properties,
        patterns=patterns,
        rests=rests,
        required=tuple(dict.fromkeys(names(schema, "required"))),
        low=count(schema, "minProperties") or 0,
        high=count(schema, "maxProperties"),
        names=goal_of(schema.get("propertyNames", True), True),
        is_declared="properties" in schema or "patternProperties" in schema,
        is_explicit=is_explicit,
        evaluated=Evaluated(frozenset(properties), frozenset(patterns), all_names=is_explicit),
    )


def not_number(schema: dict[str, Any]) -> Iterator[Kind]:
    """Numbers that break at least one of the keywords."""
    kind = number(schema)
    if kind.low is not None:
        yield Number(high=kind.low, high_excluded=not kind.low_excluded)
    if kind.high is not None:
        yield Number(low=kind.high, low_excluded=not kind.high_excluded)
    if kind.step is not None:
        step = kind.step
        yield Number(lost=(Lost("not multipleOf", lambda value: Fraction(str(value)) % step != 0),))


def not_string(schema: dict[str, Any], fits: Callable[[str, str, str], bool | None]) -> Iterator[Kind]:
    """Strings that break at least one of the keywords."""
    kind = string(schema)
    if kind.low:
        yield String(high=kind.low - 1)
    if kind.high is not None:
        yield String(low=kind.high + 1)

    def breaks(key: str, value: str) -> Lost:
        def test(text: Any) -> bool | None:
            found = fits(key, value, text)
            return None if found is None else not found

        return Lost(f"not {key}", test)

    for regex in sorted(kind.patterns):
        yield String(lost=(breaks("pattern", regex),))
    for name in sorted(kind.formats):
        yield String(lost=(breaks("format", name),))
    if kind.lost:
        yield String(lost=(Lost(f"not {kind.lost[0].keyword}", lambda value: None),))


def not_array(schema: dict[str, Any], goal_of: GoalOf) -> Iterator[Kind]:
    """Arrays that break at least one of the keywords."""
    kind = array(schema, goal_of)
    if kind.low:
        yield Array(high=kind.low - 1)
    if kind.high is not None:
        yield Array(low=kind.high + 1)
    listed = schema.get("prefixItems") or schema.get("items")
    if kind.first and isinstance(listed, list):
        for i, item in enumerate(listed):
            if goal_of(item, True):
                yield Array(first=(frozenset(),) * i + (goal_of(item, False),), low=i + 1)
    if kind.rest:
        rest = schema.get("additionalItems") if isinstance(schema.get("items"), list) else schema["items"]
        if rest is False:
            yield Array(low=len(kind.first) + 1)
        elif not kind.first:
            yield Array(contains=(Contains(goal_of(rest, False), kind.rest, 1, None),))
        else:
            yield Array(lost=(Lost("not items", lambda value: None),))
    if kind.unique:
        yield Array(lost=(Lost("not uniqueItems", lambda value: None),))
    for entry in kind.contains:
        if entry.low:
            yield Array(contains=(Contains(entry.goal, entry.negated, 0, entry.low - 1),))
        if entry.high is not None:
            yield Array(contains=(Contains(entry.goal, entry.negated, entry.high + 1, None),))


def not_object(schema: dict[str, Any], goal_of: GoalOf) -> Iterator[Kind]:
    """Objects that break at least one of the keywords."""
    kind = object_(schema, goal_of)
    for name, child in mapping(schema, "properties").items():
        if kind.properties[name]:
            yield Object(properties={name: goal_of(child, False)}, required=(name,))
    for name in kind.required:
        yield Object(properties={name: goal_of(False, True)})
    if kind.low:
        yield Object(high=kind.low - 1)
    if kind.high is not None:
        yield Object(low=kind.high + 1)
    if any(kind.patterns.values()):
        yield Object(lost=(Lost("not patternProperties", lambda value: None),))
    if kind.rests and schema.get("additionalProperties") is False and not kind.properties and not kind.patterns:
        yield Object(low=1)
    elif kind.rests:
        yield Object(lost=(Lost("not additionalProperties", lambda value: None),))
    if kind.names:
        yield Object(lost=(Lost("not propertyNames", lambda value: None),))

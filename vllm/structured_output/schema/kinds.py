"""The alternatives of the normal form: of each type of JSON, what one value may be.

A `Goal` is a set of literals: schemas that a value must fit, or must not fit. The value of a property or an item has a
goal and not alternatives of its own, so that schemas that name themselves stay finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import gcd, lcm
from typing import Any, NamedTuple

TYPES = ("null", "boolean", "number", "string", "array", "object")


class Literal(NamedTuple):
    """A schema that must fit, or, where `fits` is false, must not."""

    place: int
    fits: bool


Goal = frozenset[Literal]
ANYTHING: Goal = frozenset()


class Lost(NamedTuple):
    """What a kind does not express of its schema.

    Attributes:
        keyword: The keyword at fault, for people.
        test: Whether a value fits; None where that is not known.
    """

    keyword: str
    test: Callable[[Any], bool | None]


@dataclass(frozen=True)
class Evaluated:
    """Which members have been looked at, for `unevaluatedProperties` and `unevaluatedItems`."""

    names: frozenset[str] = frozenset()
    patterns: frozenset[str] = frozenset()
    all_names: bool = False
    num_items: int = 0
    all_items: bool = False

    def __or__(self, other: Evaluated) -> Evaluated:
        return Evaluated(
            self.names | other.names,
            self.patterns | other.patterns,
            self.all_names or other.all_names,
            max(self.num_items, other.num_items),
            self.all_items or other.all_items,
        )


NOTHING_EVALUATED = Evaluated()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What one value of a type may be."""

    lost: tuple[Lost, ...] = ()
    evaluated: Evaluated = NOTHING_EVALUATED


@dataclass(frozen=True, kw_only=True)
class Null(Kind):
    pass


@dataclass(frozen=True, kw_only=True)
class Boolean(Kind):
    allowed: frozenset[bool] = frozenset((False, True))


@dataclass(frozen=True, kw_only=True)
class Number(Kind):
    """Bounds, each with whether it is excluded itself; a multiple of `step` if that is not None."""

    low: Fraction | None = None
    low_excluded: bool = False
    high: Fraction | None = None
    high_excluded: bool = False
    step: Fraction | None = None


@dataclass(frozen=True, kw_only=True)
class String(Kind):
    """Lengths in characters. The patterns search, they are not anchored; `excluded` are whole values."""

    low: int = 0
    high: int | None = None
    patterns: frozenset[str] = frozenset()
    formats: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()


class Contains(NamedTuple):
    """So many items have one goal; the others have the negated one."""

    goal: Goal
    negated: Goal
    low: int
    high: int | None


@dataclass(frozen=True, kw_only=True)
class Array(Kind):
    """`first` holds the goals of the first items, `rest` that of all others.

    `is_tuple`: the schema lists first items and says nothing of others.
    """

    first: tuple[Goal, ...] = ()
    rest: Goal = ANYTHING
    low: int = 0
    high: int | None = None
    contains: tuple[Contains, ...] = ()
    unique: bool = False
    is_tuple: bool = False
    is_explicit: bool = False

    def goal(self, i: int) -> Goal:
        return self.first[i] if i < len(self.first) else self.rest


class Rest(NamedTuple):
    """The goal of properties that are none of `names` and match none of `patterns`."""

    names: frozenset[str]
    patterns: frozenset[str]
    goal: Goal


@dataclass(frozen=True, kw_only=True)
class Object(Kind):
    """A property must meet the goals of its name, of the patterns that it matches, and of each rest that it is in.

    Attributes:
        names: What each property's name must fit, as a string.
        is_declared: The schema names properties.
        is_explicit: It says what others may be.
    """

    properties: dict[str, Goal] = field(default_factory=dict)
    patterns: dict[str, Goal] = field(default_factory=dict)
    rests: tuple[Rest, ...] = ()
    required: tuple[str, ...] = ()
    low: int = 0
    high: int | None = None
    names: Goal = ANYTHING
    is_declared: bool = False
    is_explicit: bool = False


@dataclass(frozen=True, kw_only=True)
class Values(Kind):
    """One of these values, all of one type."""

    values: tuple[Any, ...] = ()


Union = dict[str, list[Kind]]
"""The alternatives of each type; a type without any is not allowed."""

_FULL: dict[str, Kind] = {
    "null": Null(),
    "boolean": Boolean(),
    "number": Number(),
    "string": String(),
    "array": Array(),
    "object": Object(),
}


def everything() -> Union:
    return {name: [kind] for name, kind in _FULL.items()}


def full(name: str) -> Kind:
    return _FULL[name]


def is_full(kind: Kind) -> bool:
    """Whether a kind allows every value of its type."""
    return not kind.lost and replace(kind, evaluated=NOTHING_EVALUATED) in _FULL.values()


def type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def both(a: Kind, b: Kind) -> Kind | None:
    """What fits two kinds of one type, neither of them `Values`; None where that is nothing."""
    made: Kind | None
    if isinstance(a, Boolean) and isinstance(b, Boolean):
        made = Boolean(allowed=a.allowed & b.allowed)
        if not made.allowed:
            return None
    elif isinstance(a, Number) and isinstance(b, Number):
        made = _both_numbers(a, b)
    elif isinstance(a, String) and isinstance(b, String):
        made = _both_strings(a, b)
    elif isinstance(a, Array) and isinstance(b, Array):
        made = _both_arrays(a, b)
    elif isinstance(a, Object) and isinstance(b, Object):
        made = _both_objects(a, b)
    else:
        made = Null()
    if made is None:
        return None
    lost = a.lost + tuple(entry for entry in b.lost if entry not in a.lost)
    return replace(made, lost=lost, evaluated=a.evaluated | b.evaluated)


def _both_numbers(a: Number, b: Number) -> Number | None:
    low, low_excluded = _tighter((a.low, a.low_excluded), (b.low, b.low_excluded), 1)
    high, high_excluded = _tighter((a.high, a.high_excluded), (b.high, b.high_excluded), -1)
    if low is not None and high is not None and (low > high or (low == high and (low_excluded or high_excluded))):
        return None
    step = a.step if b.step is None else b.step if a.step is None else _common_multiple(a.step, b.step)
    return Number(low=low, low_excluded=low_excluded, high=high, high_excluded=high_excluded, step=step)


def _tighter(
    a: tuple[Fraction | None, bool], b: tuple[Fraction | None, bool], sign: int
) -> tuple[Fraction | None, bool]:
    if a[0] is None or b[0] is None:
        return b if a[0] is None else a
    if a[0] == b[0]:
        return a[0], a[1] or b[1]
    return a if (a[0] - b[0]) * sign > 0 else b


def _common_multiple(a: Fraction, b: Fraction) -> Fraction:
    return Fraction(lcm(a.numerator, b.numerator), gcd(a.denominator, b.denominator))


def _both_strings(a: String, b: String) -> String | None:
    low, high = max(a.low, b.low), smaller(a.high, b.high)
    if high is not None and low > high:
        return None
    return String(
        low=low,
        high=high,
        patterns=a.patterns | b.patterns,
        formats=a.formats | b.formats,
        excluded=a.excluded | b.excluded,
    )


def _both_arrays(a: Array, b: Array) -> Array | None:
    low, high = max(a.low, b.low), smaller(a.high, b.high)
    if high is not None and low > high:
        return None
    return Array(
        first=tuple(a.goal(i) | b.goal(i) for i in range(max(len(a.first), len(b.first)))),
        rest=a.rest | b.rest,
        low=low,
        high=high,
        contains=a.contains + tuple(entry for entry in b.contains if entry not in a.contains),
        unique=a.unique or b.unique,
        is_tuple=a.is_tuple or b.is_tuple,
        is_explicit=a.is_explicit or b.is_explicit,
    )


def _both_objects(a: Object, b: Object) -> Object | None:
    low, high = max(a.low, b.low), smaller(a.high, b.high)
    if high is not None and low > high:
        return None
    return Object(
        properties=_both_maps(a.properties, b.properties),
        patterns=_both_maps(a.patterns, b.patterns),
        rests=a.rests + tuple(entry for entry in b.rests if entry not in a.rests),
        required=tuple(dict.fromkeys(a.required + b.required)),
        low=low,
        high=high,
        names=a.names | b.names,
        is_declared=a.is_declared or b.is_declared,
        is_explicit=a.is_explicit or b.is_explicit,
    )


def _both_maps(a: dict[str, Goal], b: dict[str, Goal]) -> dict[str, Goal]:
    # The order is that of the schema, which models follow when they write.
    return a | {name: a.get(name, ANYTHING) | goal for name, goal in b.items()}


def smaller(a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)

"""Whether one value is what a goal asks for: how the values of `enum` and `const` are sorted out beforehand."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from vllm.structured_output.schema.kinds import (
    Array,
    Boolean,
    Goal,
    Kind,
    Number,
    Object,
    String,
    Values,
    type_of,
)
from vllm.structured_output.schema.strings import StringTester

if TYPE_CHECKING:
    from vllm.structured_output.schema.expand import Expander


def canonical(value: Any) -> Any:
    """A hashable form; equal values of JSON (1 and 1.0, objects in any order) have equal ones."""
    if isinstance(value, dict):
        return ("object", frozenset((name, canonical(child)) for name, child in value.items()))
    if isinstance(value, list):
        return ("array", tuple(canonical(child) for child in value))
    return (type_of(value), value)


class Membership:
    """Tries values on goals. Each answer is True, False, or None for one that is not known."""

    def __init__(self, expander: Expander, strings: StringTester) -> None:
        self._expander = expander
        self.strings = strings

    def matches(self, regex: str, text: str) -> bool:
        """Whether a pattern is found in a text; a pattern that cannot be read is not."""
        return bool(self.strings.fits("pattern", regex, text))

    def meets(self, goal: Goal, value: Any) -> bool | None:
        return _all(self._fits(literal, value) for literal in goal)

    def _fits(self, literal: Any, value: Any) -> bool | None:
        kinds = self._expander.union_of(literal).get(type_of(value), [])
        unknown = False
        for kind in kinds:
            found = self.is_of(kind, value)
            if found:
                return True
            unknown |= found is None
        return None if unknown else False

    def is_of(self, kind: Kind, value: Any) -> bool | None:
        """Whether a value of the right type is of a kind."""
        return _all([self._is_plainly(kind, value), *(entry.test(value) for entry in kind.lost)])

    def _is_plainly(self, kind: Kind, value: Any) -> bool | None:
        if isinstance(kind, Values):
            return canonical(value) in {canonical(known) for known in kind.values}
        if isinstance(kind, Boolean):
            return value in kind.allowed
        if isinstance(kind, Number):
            return _number_fits(kind, Fraction(str(value)))
        if isinstance(kind, String):
            return self._string_fits(kind, value)
        if isinstance(kind, Array):
            return self._array_fits(kind, value)
        if isinstance(kind, Object):
            return self._object_fits(kind, value)
        return True

    def _string_fits(self, kind: String, value: str) -> bool | None:
        if len(value) < kind.low or (kind.high is not None and len(value) > kind.high) or value in kind.excluded:
            return False
        tests = [("pattern", regex) for regex in kind.patterns] + [("format", name) for name in kind.formats]
        return _all(self.strings.fits(key, wanted, value) for key, wanted in tests)

    def _array_fits(self, kind: Array, value: list[Any]) -> bool | None:
        if len(value) < kind.low or (kind.high is not None and len(value) > kind.high):
            return False
        if kind.unique and len({canonical(item) for item in value}) < len(value):
            return False
        found = [self.meets(kind.goal(i), item) for i, item in enumerate(value)]
        for entry in kind.contains:
            inside = [self.meets(entry.goal, item) for item in value]
            sure, possible = inside.count(True), len(inside) - inside.count(False)
            if possible < entry.low or (entry.high is not None and sure > entry.high):
                return False
            found.append(True if sure >= entry.low and (entry.high is None or possible <= entry.high) else None)
        return _all(found)

    def _object_fits(self, kind: Object, value: dict[str, Any]) -> bool | None:
        if len(value) < kind.low or (kind.high is not None and len(value) > kind.high):
            return False
        if not all(name in value for name in kind.required):
            return False
        goal_of = self._expander.goal_of_property
        return _all(self.meets(goal_of(kind, name), child) for name, child in value.items())


def _number_fits(kind: Number, value: Fraction) -> bool:
    if kind.low is not None and (value < kind.low or (kind.low_excluded and value == kind.low)):
        return False
    if kind.high is not None and (value > kind.high or (kind.high_excluded and value == kind.high)):
        return False
    return kind.step is None or value % kind.step == 0


def _all(answers: Any) -> bool | None:
    unknown = False
    for answer in answers:
        if answer is False:
            return False
        unknown |= answer is None
    return None if unknown else True

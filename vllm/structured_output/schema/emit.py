"""Writes the normal form down as a schema of plain keywords, each of which an engine keeps.

What comes of it has types, bounds, lengths, `pattern` and `format` (several under `allOf`), `prefixItems` with `items`,
`properties` with `patternProperties` and `additionalProperties`, `enum`, `anyOf` and `$ref`; nothing else.

Objects that name properties and do not say what others may be get none, and lists of `prefixItems` end with these: what
is to be written should not be filled with what nobody asked for. JSON Schema itself leaves both open.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import combinations, permutations
from math import ceil, floor
from typing import Any, cast

from vllm.structured_output.schema.errors import SchemaError
from vllm.structured_output.schema.expand import Expander
from vllm.structured_output.schema.kinds import (
    ANYTHING,
    TYPES,
    Array,
    Boolean,
    Contains,
    Goal,
    Kind,
    Null,
    Number,
    Object,
    String,
    Union,
    Values,
    is_full,
    smaller,
)
from vllm.structured_output.schema.strings import all_but

# How many alternatives one kind may be written as: choices of properties, places of an item that must be there.
_MAX_FORMS = 64
# An item that `contains` asks for comes among the first ones, where the list has no end.
_PLACES = 8
# llguidance keeps a state for each remainder of a multiple.
_MAX_STEP = 10_000
# Lists of different items: of as many values at most.
_MAX_DIFFERENT = 4


class Written:
    """A schema in plain keywords.

    Attributes:
        schema: For an engine.
        lost: What it does not express, for people; empty where all is kept.
    """

    def __init__(self, schema: dict[str, Any], lost: list[str]) -> None:
        self.schema = schema
        self.lost = lost


def normal_schema(schema: Any) -> Written:
    """A schema in the plain keywords that engines keep.

    Raises:
        SchemaError: it is malformed, allows no value, or its parts come together in too many ways.
    """
    try:
        return _Writer(Expander(schema)).write()
    except RecursionError:
        raise SchemaError("it is nested too deeply") from None


class _Writer:
    def __init__(self, expander: Expander) -> None:
        self._expander = expander
        self._names: dict[Goal, str] = {}
        self._waiting: list[Goal] = []
        self._lost: dict[str, None] = {}

    def write(self) -> Written:
        root = self._expander.root
        if self._expander.is_impossible(root):
            raise SchemaError("it allows no output at all")
        written = self._of_goal(root)
        definitions = {}
        while self._waiting:
            goal = self._waiting.pop()
            definitions[self._names[goal]] = self._of_union(self._expander.alternatives(goal))
        whole = {} if isinstance(written, bool) else written
        return Written({**whole, "$defs": definitions} if definitions else whole, list(self._lost))

    def _of_goal(self, goal: Goal) -> dict[str, Any] | bool:
        if not goal:
            return True
        if goal in self._names:
            return {"$ref": f"#/$defs/{self._names[goal]}"}
        if self._expander.is_impossible(goal):
            return False
        union = self._expander.alternatives(goal)
        if all(not isinstance(kind, Array | Object) or is_full(kind) for kinds in union.values() for kind in kinds):
            return self._of_union(union)
        self._names[goal] = f"d{len(self._names)}"
        self._waiting.append(goal)
        return {"$ref": f"#/$defs/{self._names[goal]}"}

    def _of_union(self, union: Union) -> dict[str, Any] | bool:
        whole: list[str] = []
        values: list[Any] = []
        forms: list[dict[str, Any]] = []
        for name in TYPES:
            kinds = [kind for kind in union.get(name, []) if not self._expander.is_void(kind)]
            if any(is_full(kind) for kind in kinds):
                whole.append(name)
                continue
            for kind in kinds:
                self._lost |= dict.fromkeys(entry.keyword for entry in kind.lost)
                if isinstance(kind, Values):
                    values += kind.values
                elif isinstance(kind, Boolean):
                    values += sorted(kind.allowed)
                else:
                    forms += [form for form in self._forms(kind) if form not in forms]
        if len(whole) == len(TYPES):
            return True
        if whole:
            forms.insert(0, {"type": whole[0] if len(whole) == 1 else whole})
        if values:
            forms.insert(0, {"enum": values})
        if not forms:
            return False
        return forms[0] if len(forms) == 1 else {"anyOf": forms}

    def _forms(self, kind: Kind) -> Iterator[dict[str, Any]]:
        if isinstance(kind, Number):
            yield self._number(kind)
        elif isinstance(kind, String):
            yield self._string(kind)
        elif isinstance(kind, Array):
            for array in self._arrays(kind):
                yield self._array(array)
        elif isinstance(kind, Object):
            yield from self._objects(kind)
        else:
            assert isinstance(kind, Null)
            yield {"type": "null"}

    def _lose(self, keyword: str) -> None:
        self._lost[keyword] = None

    # Numbers and strings -----------------------------------------------------------------------------------------

    def _number(self, kind: Number) -> dict[str, Any]:
        is_whole = kind.step is not None and kind.step.denominator == 1
        form: dict[str, Any] = {"type": "integer" if is_whole else "number"}
        low, high, low_excluded, high_excluded = kind.low, kind.high, kind.low_excluded, kind.high_excluded
        if is_whole and low is not None:
            low, low_excluded = Fraction(floor(low) + 1 if low_excluded else ceil(low)), False
        if is_whole and high is not None:
            high, high_excluded = Fraction(ceil(high) - 1 if high_excluded else floor(high)), False
        if low is not None:
            form["exclusiveMinimum" if low_excluded else "minimum"] = self._plain(low, "minimum")
        if high is not None:
            form["exclusiveMaximum" if high_excluded else "maximum"] = self._plain(high, "maximum")
        if kind.step is not None and kind.step != 1:
            digits = _coefficient(kind.step)
            if digits is None or digits > _MAX_STEP:
                self._lose(f"multipleOf {float(kind.step):g}")
            else:
                form["multipleOf"] = self._plain(kind.step, "multipleOf")
        return form

    def _plain(self, value: Fraction, keyword: str) -> int | float:
        if value.denominator == 1 and abs(value) < 2**63:
            return int(value)
        if Fraction(str(float(value))) != value:
            self._lose(f"{keyword} of so many digits")
        return float(value)

    def _string(self, kind: String) -> dict[str, Any]:
        form: dict[str, Any] = {"type": "string"}
        if kind.low:
            form["minLength"] = kind.low
        if kind.high is not None:
            form["maxLength"] = kind.high
        tests = [("pattern", regex) for regex in sorted(kind.patterns)]
        tests += [("format", name) for name in sorted(kind.formats)]
        if kind.excluded:
            tests.append(("pattern", f"^{all_but(sorted(kind.excluded))}$"))
        if len(tests) == 1:
            form |= tests
        elif tests:
            form["allOf"] = [{key: value} for key, value in tests]
        return form

    # Arrays ------------------------------------------------------------------------------------------------------

    def _arrays(self, kind: Array) -> list[Array]:
        """The same arrays without `contains` and `uniqueItems`."""
        if kind.is_tuple and not kind.is_explicit and kind.low <= len(kind.first) and not kind.contains:
            kind = replace(kind, high=smaller(kind.high, len(kind.first)))
        found = [replace(kind, contains=())]
        for entry in kind.contains:
            found = [array for one in found for array in self._containing(one, entry)]
            if len(found) > _MAX_FORMS:
                self._lose("contains in too many ways")
                break
        if kind.unique:
            found = [array for one in found for array in self._different(one)]
        return [array for array in found if not self._expander.is_void(array)]

    def _containing(self, kind: Array, entry: Contains) -> list[Array]:
        if not entry.low and entry.high is None:
            return [kind]
        places = min(_PLACES, kind.high if kind.high is not None else _PLACES)
        most = min(places, entry.high) if entry.high is not None else entry.low
        if entry.low > places and (kind.high is None or kind.high > places):
            self._lose(f"minContains greater than {_PLACES}")
            return [kind]
        found = []
        for size in range(entry.low, most + 1):
            for chosen in combinations(range(places), size):
                others = ANYTHING if entry.high is None else entry.negated
                length = max(len(kind.first), chosen[-1] + 1 if chosen else 0)
                first = tuple(kind.goal(i) | (entry.goal if i in chosen else others) for i in range(length))
                low = max(kind.low, chosen[-1] + 1 if chosen else 0)
                found.append(replace(kind, first=first, rest=kind.rest | others, low=low))
                if len(found) > _MAX_FORMS:
                    self._lose("contains in too many ways")
                    return [kind]
        return found

    def _different(self, kind: Array) -> list[Array]:
        """Arrays whose items differ: those of few values one by one; else they must differ anyhow."""
        if kind.high is not None and kind.high <= 1:
            return [kind]
        if kind.high is not None and kind.high <= len(kind.first):
            goals = kind.first[: kind.high]
            if all(self._expander.is_impossible(a | b) for a, b in combinations(goals, 2)):
                return [kind]
        values = None if kind.first else self._few_values(kind.rest)
        if values is None:
            self._lose("uniqueItems")
            return [kind]
        most = len(values) if kind.high is None else min(kind.high, len(values))
        found = []
        for size in range(kind.low, most + 1):
            for chosen in permutations(values, size):
                found.append(Array(first=chosen, low=size, high=size, is_explicit=True))
        return found

    def _few_values(self, goal: Goal) -> list[Goal] | None:
        """Goals of one value each, if a goal allows no more than few."""
        found: list[Goal] = []
        for name, kinds in self._expander.alternatives(goal).items():
            for kind in kinds:
                if isinstance(kind, Values) and not kind.lost:
                    found += [self._expander.goal_of_value(value) for value in kind.values]
                elif isinstance(kind, Boolean):
                    found += [self._expander.goal_of_value(value) for value in sorted(kind.allowed)]
                elif name == "null":
                    found.append(self._expander.goal_of_value(None))
                else:
                    return None
        return found if len(set(found)) == len(found) <= _MAX_DIFFERENT else None

    def _array(self, kind: Array) -> dict[str, Any]:
        form: dict[str, Any] = {"type": "array"}
        first, high = list(kind.first), kind.high
        for i, goal in enumerate(first):
            if self._expander.is_impossible(goal):
                first, high = first[:i], smaller(high, i)
                break
        if high is not None:
            first = first[:high]
        rest = self._of_goal(kind.rest) if high is None or high > len(first) else False
        if rest is False:
            high = smaller(high, len(first))
        if first:
            form["prefixItems"] = [self._of_goal(goal) for goal in first]
        if rest is not True or first:
            form["items"] = rest
        if kind.low:
            form["minItems"] = kind.low
        if high is not None and (rest is not False or high < len(first)):
            form["maxItems"] = high
        return form

    # Objects -----------------------------------------------------------------------------------------------------

    def _objects(self, kind: Object) -> Iterator[dict[str, Any]]:
        names = dict.fromkeys(kind.properties) | dict.fromkeys(kind.required)
        names |= dict.fromkeys(sorted(name for rest in kind.rests for name in rest.names))
        others = self._other_properties(kind)
        if isinstance(others.get("named"), list):
            names |= dict.fromkeys(others.pop("named"))
        goals = {name: self._expander.goal_of_property(kind, name) for name in names}
        if kind.names:
            for name in names:
                if self._expander.members.meets(kind.names, name) is None:
                    self._lose("propertyNames")
        possible = {name: goal for name, goal in goals.items() if not self._expander.is_impossible(goal)}
        is_closed = not others.get("patternProperties") and others.get("additionalProperties") is False
        low, high = kind.low, kind.high
        if low <= len(kind.required):
            low = 0
        if is_closed and high is not None and high >= len(possible):
            high = None
        forms = [self._object(possible, kind.required, goals, is_closed) | others]
        if low or high is not None:
            optional = [name for name in possible if name not in kind.required]
            forms = []
            for present, decided in self._choices(optional, len(kind.required), low, high, is_closed):
                left = {name: goal for name, goal in possible.items() if name not in decided or name in present}
                form = self._object(left, {*kind.required, *present}, goals, is_closed) | others
                if not is_closed:
                    form |= {"minProperties": low} if low else {}
                    form |= {"maxProperties": high} if high is not None else {}
                forms.append(form)
                if len(forms) > _MAX_FORMS:
                    self._lose("minProperties or maxProperties beside so many properties")
                    break
        yield from forms

    def _object(
        self, possible: dict[str, Goal], required: Collection[str], goals: dict[str, Goal], is_closed: bool
    ) -> dict[str, Any]:
        form: dict[str, Any] = {"type": "object"}
        properties = {name: self._of_goal(goal) for name, goal in possible.items()}
        if not is_closed:
            properties |= {name: False for name in goals if name not in possible}
        if properties:
            form["properties"] = properties
        if required:
            form["required"] = [name for name in properties if name in required]
        return form

    @staticmethod
    def _choices(
        optional: list[str], num_required: int, low: int, high: int | None, is_closed: bool
    ) -> Iterator[tuple[frozenset[str], frozenset[str]]]:
        """Ways to reach a number of properties: those that are there, and all those that were decided on.

        Where other properties may come, the engine counts as long as each named one is either there or not.
        """
        stack: list[tuple[int, frozenset[str]]] = [(0, frozenset())]
        while stack:
            i, present = stack.pop()
            so_far, left = num_required + len(present), len(optional) - i
            if high is not None and so_far > high:
                continue
            if is_closed:
                if so_far + left < low:
                    continue
                if so_far >= low and (high is None or so_far + left <= high):
                    yield present, frozenset(optional[:i])
                    continue
            if i == len(optional):
                yield present, frozenset(optional)
            else:
                stack += [(i + 1, present), (i + 1, present | {optional[i]})]

    def _other_properties(self, kind: Object) -> dict[str, Any]:
        """What is said of properties that have no name in the schema.

        `named` holds names that are to be added, where `propertyNames` lists all there are.
        """
        rest = ANYTHING
        for entry in kind.rests:
            rest |= entry.goal
        patterns: dict[str, Any] = {}
        for regex in sorted({*kind.patterns, *(regex for entry in kind.rests for regex in entry.patterns)}):
            goal = kind.patterns.get(regex, ANYTHING)
            for entry in kind.rests:
                if regex not in entry.patterns:
                    goal |= entry.goal
            patterns[regex] = self._of_goal(goal)
        is_closed = (kind.is_declared and not kind.is_explicit) or self._expander.is_impossible(rest)
        others: dict[str, Any] = {}
        if is_closed:
            others["additionalProperties"] = False
        elif rest or kind.is_explicit or kind.properties or kind.required or patterns:
            # Said even where it is what JSON Schema takes for granted: xgrammar does not.
            others["additionalProperties"] = self._of_goal(rest)
        if kind.names and not (is_closed and not patterns):
            if patterns:
                self._lose("propertyNames beside patternProperties")
            else:
                return self._named(kind, others)
        if patterns:
            others["patternProperties"] = patterns
        return others

    def _named(self, kind: Object, others: dict[str, Any]) -> dict[str, Any]:
        """`propertyNames` in other words: as patterns, and as names."""
        kinds = self._expander.alternatives(kind.names).get("string", [])
        if any(is_full(one) for one in kinds):
            return others
        goal = others.get("additionalProperties", True)
        patterns: dict[str, Any] = {}
        named: list[str] = []
        for one in kinds:
            self._lost |= dict.fromkeys(entry.keyword for entry in one.lost)
            if isinstance(one, Values):
                named += one.values
                continue
            regex = _one_regex(cast(String, one))
            if regex is None:
                self._lose("propertyNames with several keywords")
            else:
                patterns[regex] = goal
        if kind.properties and goal is not True and patterns:
            # A pattern would count for the named properties as well.
            self._lose("propertyNames beside properties and additionalProperties")
        made: dict[str, Any] = {"additionalProperties": False, "named": named}
        return made | ({"patternProperties": patterns} if patterns else {})


def _one_regex(kind: String) -> str | None:
    """The regular expression of all that a kind says, if one can say it."""
    has_length = bool(kind.low) or kind.high is not None
    if len(kind.patterns) + bool(kind.excluded) + has_length != 1 or kind.formats:
        return None
    if kind.patterns:
        return next(iter(kind.patterns))
    if kind.excluded:
        return f"^{all_but(sorted(kind.excluded))}$"
    return f"^(?s:.){{{kind.low},{'' if kind.high is None else kind.high}}}$"


def _coefficient(step: Fraction) -> int | None:
    """The digits of a decimal fraction as a whole number; None if it has no end."""
    digits = step
    for _ in range(20):
        if digits.denominator == 1:
            return digits.numerator
        digits *= 10
    return None

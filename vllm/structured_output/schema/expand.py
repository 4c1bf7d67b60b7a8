"""Brings schemas into the normal form: all the ways in which a schema's parts come together at one value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from typing import Any

from vllm.structured_output.schema import keywords
from vllm.structured_output.schema.document import Document, Place
from vllm.structured_output.schema.errors import SchemaError, shortened
from vllm.structured_output.schema.kinds import (
    ANYTHING,
    TYPES,
    Array,
    Boolean,
    Evaluated,
    Goal,
    Kind,
    Literal,
    Lost,
    Number,
    Object,
    Rest,
    String,
    Union,
    Values,
    both,
    everything,
    full,
    is_full,
    type_of,
)
from vllm.structured_output.schema.membership import Membership, canonical
from vllm.structured_output.schema.strings import StringTester

# How often two alternatives may be brought together; what real schemas need is hundreds.
_MAX_WORK = 50_000
_MAX_ALTERNATIVES = 512
# Every choice of several branches counts where annotations are collected, as long as there are few.
_MAX_COLLECTED = 4


class Expander:
    """The normal form of one schema.

    Attributes:
        members: Tries values on goals.
    """

    def __init__(self, schema: Any) -> None:
        if not isinstance(schema, dict | bool):
            raise SchemaError(f"a schema must be an object or a boolean, got {shortened(schema)}")
        self._document = Document(schema)
        self._places: list[Place] = []
        self._numbers: dict[tuple[int, str], int] = {}
        self._unions: dict[Literal, Union] = {}
        self._goals: dict[Goal, Union] = {}
        self._empty: dict[Goal, bool] = {}
        self._of_value: dict[Any, Place] = {}
        self._open: set[Literal] = set()
        self._work = 0
        self.members = Membership(self, StringTester())

    @property
    def root(self) -> Goal:
        """What the whole output must meet."""
        place = self._document.root
        return self._goal(place, True)

    def alternatives(self, goal: Goal) -> Union:
        """What a value may be that meets all literals of a goal."""
        found = self._goals.get(goal)
        if found is None:
            found = everything()
            for literal in sorted(goal):
                found = self._both(found, self.union_of(literal))
            self._goals[goal] = found
        return found

    def union_of(self, literal: Literal) -> Union:
        """What a value may be that meets one literal.

        Raises:
            SchemaError: a reference leads to itself.
        """
        found = self._unions.get(literal)
        if found is not None:
            return found
        if literal in self._open:
            raise SchemaError("a $ref leads to itself")
        self._open.add(literal)
        try:
            place = self._places[literal.place]
            found = self._expand(place) if literal.fits else self._expand_not(place)
        finally:
            self._open.discard(literal)
        self._unions[literal] = found
        return found

    def is_impossible(self, goal: Goal) -> bool:
        """Whether no value can meet a goal; False where that is not known."""
        known = self._empty.get(goal)
        if known is None:
            # A schema within itself is taken to have a value.
            self._empty[goal] = False
            # The value is another one than that whose schemas are being read: none of them leads to itself here.
            outside, self._open = self._open, set()
            try:
                union = self.alternatives(goal)
                known = all(self.is_void(kind) for kinds in union.values() for kind in kinds)
            finally:
                self._open = outside
            self._empty[goal] = known
        return known

    def is_void(self, kind: Kind) -> bool:
        """Whether no value can be of a kind; False where that is not known."""
        if isinstance(kind, Object):
            if kind.high is not None and len(kind.required) > kind.high:
                return True
            return any(self.is_impossible(self.goal_of_property(kind, name)) for name in kind.required)
        if isinstance(kind, Array):
            return any(self.is_impossible(kind.goal(i)) for i in range(min(kind.low, len(kind.first) + 1)))
        return isinstance(kind, Values) and not kind.values

    def goal_of_property(self, kind: Object, name: str) -> Goal:
        """What the value of a property must meet."""
        goal = kind.properties.get(name, ANYTHING)
        for regex, wanted in kind.patterns.items():
            if wanted and self.members.matches(regex, name):
                goal |= wanted
        for rest in kind.rests:
            if name not in rest.names and not any(self.members.matches(regex, name) for regex in rest.patterns):
                goal |= rest.goal
        if kind.names and self.members.meets(kind.names, name) is False:
            goal |= self.nothing
        return goal

    @property
    def nothing(self) -> Goal:
        """The goal that no value meets."""
        return self._goal(Place(False, ""), True)

    def goal_of_value(self, value: Any) -> Goal:
        """The goal that one value meets alone."""
        known = self._of_value.setdefault(canonical(value), Place({"const": value}, ""))
        return self._goal(known, True)

    # Goals -----------------------------------------------------------------------------------------------------

    def _goal(self, place: Place, fits: bool) -> Goal:
        if place.schema is True or place.schema == {}:
            if fits:
                return ANYTHING
            place, fits = Place(False, ""), True
        elif place.schema is False and not fits:
            return ANYTHING
        key = (id(place.schema), place.base)
        number = self._numbers.get(key)
        if number is None:
            if not isinstance(place.schema, dict | bool):
                raise SchemaError(f"a schema must be an object or a boolean, got {shortened(place.schema)}")
            number = self._numbers[key] = len(self._places)
            self._places.append(place)
        return frozenset((Literal(number, fits),))

    def _goal_in(self, place: Place) -> keywords.GoalOf:
        return lambda schema, fits: self._goal(self._document.enter(schema, place.base), fits)

    def _unite_goal(self, place: Place, schema: Any, fits: bool) -> Union:
        return self.alternatives(self._goal(self._document.enter(schema, place.base), fits))

    # A schema that must fit --------------------------------------------------------------------------------------

    def _expand(self, place: Place) -> Union:
        schema = place.schema
        if isinstance(schema, bool):
            return everything() if schema else {}
        union = everything()
        for part in self._parts(place):
            union = self._both(union, part)
        return self._unevaluated(place, union)

    def _parts(self, place: Place) -> Iterable[Union]:
        """What each keyword says that stands for a whole schema, and what those of one type say together."""
        schema = place.schema
        only_reference = self._document.is_old and "$ref" in schema
        if not only_reference:
            # First, as its properties come before those that are brought in.
            yield self._typed(place)
        for target in self._references(place):
            yield target if isinstance(target, dict) else self.alternatives(self._goal(target, True))
        if only_reference:
            return
        if "const" in schema:
            yield _values([schema["const"]])
        if "enum" in schema:
            yield _values(_enum(schema))
        for child in self._branches(place, "allOf"):
            yield self._unite_goal(place, child, True)
        if "anyOf" in schema:
            yield self._any_of(place)
        if "oneOf" in schema:
            yield self._one_of(place)
        if "not" in schema:
            yield _without_evaluated(self._unite_goal(place, schema["not"], False))
        if "if" in schema and ("then" in schema or "else" in schema or self._document.tracks_unevaluated):
            yes = self._both(
                self._unite_goal(place, schema["if"], True), self._unite_goal(place, schema.get("then", True), True)
            )
            no = self._both(
                _without_evaluated(self._unite_goal(place, schema["if"], False)),
                self._unite_goal(place, schema.get("else", True), True),
            )
            yield self._either([yes, no])
        for name, needed in self._dependents(place):
            absent: Union = everything() | {"object": [_without(name, self.nothing)]}
            present = self._both({"object": [Object(required=(name,))]}, needed)
            yield self._either([absent, present])

    def _references(self, place: Place) -> Iterable[Place | Union]:
        schema = place.schema
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            if key not in schema:
                continue
            if key != "$ref" and self._document.is_dynamic(schema[key]):
                yield _lost_everywhere(f"{key} to one of several anchors")
                continue
            target = self._document.find(schema[key], place.base)
            if target is None:
                yield _lost_everywhere(f"a $ref to another document, {shortened(schema[key])}")
            else:
                yield target

    def _typed(self, place: Place) -> Union:
        schema = place.schema
        goal_of = self._goal_in(place)
        allowed, only_integers = _types(schema)
        union: Union = {}
        for name in allowed:
            kind = full(name)
            if name == "number":
                # Their bounds may contradict each other.
                number = both(keywords.number(schema), keywords.number_format(schema))
                whole = Number(step=Fraction(1)) if only_integers else Number()
                if number is None or (found := both(number, whole)) is None:
                    continue
                kind = found
            elif name == "string":
                kind = keywords.string(schema)
            elif name == "array":
                kind = keywords.array(schema, goal_of)
            elif name == "object":
                kind = keywords.object_(schema, goal_of)
            if not _is_contradiction(kind):
                union[name] = [kind]
        return union

    def _branches(self, place: Place, key: str) -> list[Any]:
        value = place.schema.get(key, [])
        if not isinstance(value, list) or (key in place.schema and not value):
            raise SchemaError(f"{key} must be a list of schemas, got {shortened(value)}")
        return value

    def _any_of(self, place: Place) -> Union:
        branches = [self._unite_goal(place, child, True) for child in self._branches(place, "anyOf")]
        unions = list(branches)
        if self._document.tracks_unevaluated and len(branches) <= _MAX_COLLECTED:
            for size in range(2, len(branches) + 1):
                for chosen in combinations(branches, size):
                    union = everything()
                    for branch in chosen:
                        union = self._both(union, branch)
                    unions.append(union)
        return self._either(unions)

    def _one_of(self, place: Place) -> Union:
        children = self._branches(place, "oneOf")
        branches = [self._unite_goal(place, child, True) for child in children]
        exact: Union = {}
        for i, branch in enumerate(branches):
            for name, kinds in branch.items():
                left: Union = {name: kinds}
                for j, other in enumerate(branches):
                    if j != i and name in other and self._overlap(kinds, other[name]):
                        not_other = self._unite_goal(place, children[j], False)
                        left = self._both(left, _without_evaluated({name: not_other.get(name, [])}))
                exact = self._either([exact, left])
        return exact

    def _overlap(self, kinds: list[Kind], others: list[Kind]) -> bool:
        return any(self._pair(a, b) is not None for a in kinds for b in others)

    def _dependents(self, place: Place) -> Iterable[tuple[str, Union]]:
        """For each property that asks for something: what must hold if it is there."""
        schema = place.schema
        for key in ("dependentRequired", "dependentSchemas", "dependencies"):
            for name, needed in keywords.mapping(schema, key).items():
                if isinstance(needed, list):
                    required = tuple(dict.fromkeys(keywords.strings(needed, key)))
                    yield name, {"object": [Object(required=required)]}
                else:
                    yield name, self._unite_goal(place, needed, True)

    def _unevaluated(self, place: Place, union: Union) -> Union:
        """The alternatives with what `unevaluated*` says of the members that nothing else has looked at."""
        schema = place.schema
        found = dict(union)
        if "unevaluatedProperties" in schema and "object" in found:
            goal = self._goal_in(place)(schema["unevaluatedProperties"], True)
            found["object"] = [self._close_object(kind, goal) for kind in found["object"]]
        if "unevaluatedItems" in schema and "array" in found:
            goal = self._goal_in(place)(schema["unevaluatedItems"], True)
            found["array"] = [self._close_array(kind, goal) for kind in found["array"]]
        return found

    def _close_object(self, kind: Kind, goal: Goal) -> Kind:
        seen = kind.evaluated
        if isinstance(kind, Values):
            rest = Object(rests=(Rest(seen.names, seen.patterns, goal),)) if not seen.all_names else Object()
            kept = tuple(v for v in kind.values if self.members.is_of(rest, v))
            kind = replace(kind, values=kept)
        elif isinstance(kind, Object):
            rests = kind.rests
            if goal and not seen.all_names:
                rests += (Rest(seen.names, seen.patterns, goal),)
            kind = replace(kind, rests=rests, is_explicit=True)
        return replace(kind, evaluated=replace(seen, all_names=True))

    def _close_array(self, kind: Kind, goal: Goal) -> Kind:
        seen = kind.evaluated
        if not seen.all_items:
            closing = Array(first=(ANYTHING,) * seen.num_items, rest=goal, is_explicit=True)
            if isinstance(kind, Values):
                kind = replace(kind, values=tuple(v for v in kind.values if self.members.is_of(closing, v)))
            elif isinstance(kind, Array):
                kind = both(kind, closing) or kind
        return replace(kind, evaluated=replace(seen, all_items=True))

    # A schema that must not fit ----------------------------------------------------------------------------------

    def _expand_not(self, place: Place) -> Union:
        schema = place.schema
        if isinstance(schema, bool):
            return {} if schema else everything()
        return self._either(list(self._not_parts(place)))

    def _not_parts(self, place: Place) -> Iterable[Union]:
        """Ways to break a schema: one for each keyword."""
        schema = place.schema
        for target in self._references(place):
            if isinstance(target, dict):
                yield _lost_everywhere("not around a reference to elsewhere")
            else:
                yield self.alternatives(self._goal(target, False))
        if self._document.is_old and "$ref" in schema:
            return
        yield self._not_typed(place)
        for key in ("const", "enum"):
            if key in schema:
                yield self._not_values([schema["const"]] if key == "const" else _enum(schema))
        for child in self._branches(place, "allOf"):
            yield self._unite_goal(place, child, False)
        if "anyOf" in schema:
            yield self._none_of(place, self._branches(place, "anyOf"))
        if "oneOf" in schema:
            children = self._branches(place, "oneOf")
            yield self._none_of(place, children)
            for a, b in combinations(children, 2):
                yield self._both(self._unite_goal(place, a, True), self._unite_goal(place, b, True))
        if "not" in schema:
            yield self._unite_goal(place, schema["not"], True)
        if "if" in schema:
            for key, holds in (("then", True), ("else", False)):
                if key in schema:
                    yield self._both(
                        self._unite_goal(place, schema["if"], holds), self._unite_goal(place, schema[key], False)
                    )
        for key in ("dependentRequired", "dependentSchemas", "dependencies"):
            for name, needed in keywords.mapping(schema, key).items():
                has: Union = {"object": [Object(required=(name,))]}
                if isinstance(needed, list):
                    for other in keywords.strings(needed, key):
                        yield self._both(has, {"object": [_without(other, self.nothing)]})
                else:
                    yield self._both(has, self._unite_goal(place, needed, False))
        for key, name in (("unevaluatedProperties", "object"), ("unevaluatedItems", "array")):
            if key in schema:
                yield {name: [replace(full(name), lost=(_unknown(f"not {key}"),))]}

    def _not_typed(self, place: Place) -> Union:
        schema = place.schema
        allowed, only_integers = _types(schema)
        union: Union = {name: [full(name)] for name in TYPES if name not in allowed}
        goal_of = self._goal_in(place)
        if "number" in allowed:
            broken = list(keywords.not_number(schema))
            if only_integers:
                broken += keywords.not_number({"multipleOf": 1})
            union["number"] = broken
        if "string" in allowed:
            union["string"] = list(keywords.not_string(schema, self.members.strings.fits))
        if "array" in allowed:
            union["array"] = list(keywords.not_array(schema, goal_of))
        if "object" in allowed:
            union["object"] = list(keywords.not_object(schema, goal_of))
        return {name: kinds for name, kinds in union.items() if kinds}

    def _none_of(self, place: Place, children: list[Any]) -> Union:
        union = everything()
        for child in children:
            union = self._both(union, self._unite_goal(place, child, False))
        return _without_evaluated(union)

    def _not_values(self, values: list[Any]) -> Union:
        """All values but these."""
        union = everything()
        of_type: dict[str, list[Any]] = {}
        for value in values:
            of_type.setdefault(type_of(value), []).append(value)
        for name, given in of_type.items():
            if name == "null":
                union["null"] = []
            elif name == "boolean":
                union["boolean"] = (
                    [Boolean(allowed=frozenset((False, True)) - set(given))] if len(set(given)) < 2 else []
                )
            elif name == "string":
                union["string"] = [String(excluded=frozenset(given))]
            elif name == "number":
                for value in given:
                    broken = list(keywords.not_number({"minimum": value, "maximum": value}))
                    union = self._both(union, everything() | {"number": broken})
            else:
                union[name] = [replace(full(name), lost=(self._differs(given),))]
        return {name: kinds for name, kinds in union.items() if kinds}

    @staticmethod
    def _differs(values: list[Any]) -> Lost:
        known = {canonical(value) for value in values}
        return Lost("not of a list or an object", lambda value: canonical(value) not in known)

    # Together ----------------------------------------------------------------------------------------------------

    def _either(self, unions: list[Union]) -> Union:
        """What fits at least one of several."""
        found: Union = {}
        for union in unions:
            for name, kinds in union.items():
                known = found.setdefault(name, [])
                for kind in kinds:
                    if kind not in known:
                        known.append(kind)
        for name, kinds in found.items():
            found[name] = _joined_values(kinds)
            whole = [kind for kind in kinds if is_full(kind)]
            if whole and not self._document.tracks_unevaluated:
                found[name] = whole[:1]
            if len(found[name]) > _MAX_ALTERNATIVES:
                raise _too_many()
        return found

    def _both(self, a: Union, b: Union) -> Union:
        """What fits two alternatives at once."""
        found: Union = {}
        for name in TYPES:
            if name not in a or name not in b:
                continue
            kinds: list[Kind] = []
            for one in a[name]:
                for other in b[name]:
                    kind = self._pair(one, other)
                    if kind is not None and kind not in kinds:
                        kinds.append(kind)
                        if len(kinds) > _MAX_ALTERNATIVES:
                            raise _too_many()
            if kinds:
                found[name] = kinds
        return found

    def _pair(self, a: Kind, b: Kind) -> Kind | None:
        self._work += 1
        if self._work > _MAX_WORK:
            raise _too_many()
        if isinstance(b, Values):
            a, b = b, a
        if not isinstance(a, Values):
            made = both(a, b)
            return None if made is None or self.is_void(made) else made
        lost = {entry: None for entry in a.lost + b.lost}
        if isinstance(b, Values):
            known = {canonical(value) for value in b.values}
            kept = tuple(value for value in a.values if canonical(value) in known)
        else:
            # A value that is known not to fit goes; only what is not known of one stays lost.
            kept = tuple(value for value in a.values if self.members.is_of(b, value) is not False)
            if all(self.members.is_of(b, value) for value in kept):
                lost = dict.fromkeys(a.lost)
        if not kept:
            return None
        return Values(values=kept, lost=tuple(lost), evaluated=a.evaluated | b.evaluated)


def _types(schema: dict[str, Any]) -> tuple[list[str], bool]:
    """The types that a schema allows, and whether its numbers must be integers."""
    given = schema.get("type", list(TYPES))
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(name in (*TYPES, "integer") for name in names):
        raise SchemaError(f"type must be one or several of {', '.join((*TYPES, 'integer'))}, got {shortened(given)}")
    only_integers = "integer" in names and "number" not in names
    return [name for name in TYPES if name in names or (name == "number" and only_integers)], only_integers


def _enum(schema: dict[str, Any]) -> list[Any]:
    values = schema["enum"]
    if not isinstance(values, list):
        raise SchemaError(f"enum must be a list, got {shortened(values)}")
    return values


def _values(values: list[Any]) -> Union:
    of_type: dict[str, dict[Any, Any]] = {}
    for value in values:
        of_type.setdefault(type_of(value), {}).setdefault(canonical(value), value)
    return {name: [Values(values=tuple(known.values()))] for name, known in of_type.items()}


def _joined_values(kinds: list[Kind]) -> list[Kind]:
    """The same kinds, with all plain values in one."""
    plain = [kind for kind in kinds if isinstance(kind, Values) and not kind.lost and kind.evaluated == Evaluated()]
    if len(plain) < 2:
        return kinds
    values = {canonical(value): value for kind in plain for value in kind.values}
    return [kind for kind in kinds if kind not in plain] + [Values(values=tuple(values.values()))]


def _without(name: str, nothing: Goal) -> Object:
    """Objects that lack a property."""
    return Object(properties={name: nothing})


def _without_evaluated(union: Union) -> Union:
    """Alternatives that say nothing of what was looked at: a schema that does not fit collects no annotations."""
    none = Evaluated()
    return {name: [replace(kind, evaluated=none) for kind in kinds] for name, kinds in union.items()}


def _lost_everywhere(keyword: str) -> Union:
    return {name: [replace(kind, lost=(_unknown(keyword),)) for kind in kinds] for name, kinds in everything().items()}


def _unknown(keyword: str) -> Lost:
    return Lost(keyword, _test_unknown)


def _test_unknown(value: Any) -> bool | None:
    return None


def _is_contradiction(kind: Kind) -> bool:
    return isinstance(kind, String | Array | Object) and kind.high is not None and kind.low > kind.high


def _too_many() -> SchemaError:
    return SchemaError("its parts come together in too many ways; simplify it")

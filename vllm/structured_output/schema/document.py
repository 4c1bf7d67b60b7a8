"""Where the references of a JSON schema lead (JSON Schema 2020-12, section 8; draft 7, section 8)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from vllm.structured_output.schema.errors import SchemaError, shortened

_OLD_DRAFTS = ("draft-03", "draft-04", "draft-06", "draft-07")
# Where schemas hold schemas.
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SINGLE = (
    "items",
    "additionalItems",
    "additionalProperties",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
    "contains",
    "not",
    "if",
    "then",
    "else",
)


class Place:
    """A schema within a document.

    Attributes:
        schema: An object or a boolean.
        base: The URI that references within it are relative to.
    """

    __slots__ = ("base", "schema")

    def __init__(self, schema: Any, base: str) -> None:
        self.schema = schema
        self.base = base


class Document:
    """A schema with all the identifiers within it.

    Attributes:
        root: The place of the whole.
        is_old: Its `$schema` names draft 7 or an older one, where nothing counts beside `$ref`.
        tracks_unevaluated: It has `unevaluatedProperties` or `unevaluatedItems` somewhere.
    """

    def __init__(self, schema: Any) -> None:
        dialect = schema.get("$schema") if isinstance(schema, dict) else None
        self.is_old = isinstance(dialect, str) and any(draft in dialect for draft in _OLD_DRAFTS)
        self.tracks_unevaluated = False
        self._by_id: dict[str, Place] = {}
        self._anchors: dict[tuple[str, str], Place] = {}
        self._dynamic: dict[str, int] = {}
        self.root = self.enter(schema, "")
        # A document without a name of its own is found by the empty one.
        self._by_id.setdefault("", self.root)
        self._index(self.root)

    def enter(self, schema: Any, base: str) -> Place:
        """The place of a schema that stands where references are relative to `base`."""
        given = schema.get("$id", schema.get("id")) if isinstance(schema, dict) else None
        if isinstance(given, str) and not (self.is_old and ("$ref" in schema or given.startswith("#"))):
            base = urldefrag(_joined(base, given)).url
        return Place(schema, base)

    def find(self, reference: Any, base: str) -> Place | None:
        """What a reference names; None if it is in another document.

        Raises:
            SchemaError: there is nothing of that name in this document.
        """
        if not isinstance(reference, str):
            raise SchemaError(f"$ref must be a string, got {shortened(reference)}")
        url, fragment = urldefrag(_joined(base, reference))
        place = self._by_id.get(url)
        if place is None:
            return None
        fragment = unquote(fragment)
        if not fragment:
            return place
        found = self._follow(place, fragment) if fragment.startswith("/") else self._anchors.get((url, fragment))
        if found is None:
            raise SchemaError(f"$ref names nothing in the schema: {shortened(reference)}")
        return found

    def is_dynamic(self, reference: Any) -> bool:
        """Whether what `$dynamicRef` names depends on the way that led there."""
        name = urldefrag(reference).fragment if isinstance(reference, str) else ""
        return self._dynamic.get(name, 0) > 1

    def _follow(self, place: Place, pointer: str) -> Place | None:
        schema, base = place.schema, place.base
        for step in pointer.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(schema, dict) and step in schema:
                schema = schema[step]
            elif isinstance(schema, list) and step.isdecimal() and int(step) < len(schema):
                schema = schema[int(step)]
            else:
                return None
            base = self.enter(schema, base).base
        return Place(schema, base) if isinstance(schema, dict | bool) else None

    def _index(self, root: Place) -> None:
        stack = [root]
        while stack:
            place = stack.pop()
            schema = place.schema
            if not isinstance(schema, dict):
                continue
            self._note(place)
            for child in _children(schema):
                stack.append(self.enter(child, place.base))

    def _note(self, place: Place) -> None:
        schema, base = place.schema, place.base
        if "unevaluatedProperties" in schema or "unevaluatedItems" in schema:
            self.tracks_unevaluated = True
        given = schema.get("$id", schema.get("id"))
        if isinstance(given, str):
            if self.is_old and given.startswith("#"):
                self._anchors.setdefault((base, given[1:]), place)
            elif base:
                self._by_id.setdefault(base, place)
        for key in ("$anchor", "$dynamicAnchor"):
            name = schema.get(key)
            if isinstance(name, str):
                self._anchors.setdefault((base, name), place)
        name = "" if schema.get("$recursiveAnchor") is True else schema.get("$dynamicAnchor")
        if isinstance(name, str):
            self._dynamic[name] = self._dynamic.get(name, 0) + 1


def _joined(base: str, reference: str) -> str:
    if reference.startswith("#") or not reference:
        return base + reference
    return urljoin(base, reference)


def _children(schema: dict[str, Any]) -> Iterator[Any]:
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            yield from schema[key].values()
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            yield from schema[key]
    for key in _SINGLE:
        if isinstance(schema.get(key), dict):
            yield schema[key]

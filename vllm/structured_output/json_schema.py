"""What xgrammar leaves out of a JSON schema without a word: a request that relies on it is better refused.

Checked against xgrammar 0.2.8. Annotations (`title`, `default`, `format` of an unknown name, …) are free to be ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_NEVER = ("not", "if", "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef")
_NEVER_OF_ARRAYS = ("contains", "minContains", "maxContains")
# Kept only where the schema names the type beside them.
_OF_TYPE = {
    "minimum": ("integer", "number"),
    "maximum": ("integer", "number"),
    "exclusiveMinimum": ("integer", "number"),
    "exclusiveMaximum": ("integer", "number"),
    "multipleOf": ("integer",),
    "minLength": ("string",),
    "maxLength": ("string",),
    "minItems": ("array",),
    "maxItems": ("array",),
}
_COMBINERS = ("anyOf", "oneOf", "allOf")
_DROPPED_BESIDE_COMBINERS = ("properties", "required", "patternProperties", "items", "prefixItems")

# Where schemas hold schemas.
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "propertyNames", "unevaluatedItems", "unevaluatedProperties")

_LOOKS_AROUND = re.compile(r"\(\?<?[=!]|(?<!\\)(?:\\\\)*\\[bB]")

# All siblings wait with their paths: these stay short whatever the names are.
_MAX_NAME_CHARS = 50
_MAX_PATH_CHARS = 200


def unenforced(schema: Any) -> str | None:
    """Which keyword of a schema would be ignored, and where it is; None where all of them count."""
    stack = [("$", schema)]
    while stack:
        path, node = stack.pop()
        if not isinstance(node, dict):
            continue
        keyword = _unenforced_here(node)
        if keyword is not None:
            return f"{keyword} (at {path})"
        stack += _subschemas(path, node)
    return None


def _subschemas(path: str, node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in _MAPS:
        if isinstance(node.get(key), dict):
            yield from ((_below(path, f".{key}.", name), child) for name, child in node[key].items())
    for key in _LISTS:
        if isinstance(node.get(key), list):
            yield from ((_below(path, f".{key}[{i}]"), child) for i, child in enumerate(node[key]))
    yield from ((_below(path, f".{key}"), node[key]) for key in _SINGLE if key in node)


def _below(path: str, step: str, name: str = "") -> str:
    if len(path) >= _MAX_PATH_CHARS:
        return path
    longer = path + step + (name if len(name) <= _MAX_NAME_CHARS else name[:_MAX_NAME_CHARS] + "…")
    return longer if len(longer) < _MAX_PATH_CHARS else longer[: _MAX_PATH_CHARS - 1] + "…"


def _unenforced_here(node: dict[str, Any]) -> str | None:
    for key in _NEVER:
        if key in node:
            return key
    ref = node.get("$ref")
    if isinstance(ref, str) and not ref.startswith("#"):
        return f"a $ref to another document, {ref[:_MAX_NAME_CHARS]!r}"
    given = node.get("type")
    types = given if isinstance(given, list) else [given]
    if node.get("uniqueItems"):
        return "uniqueItems"
    for key in _NEVER_OF_ARRAYS:
        if key in node:
            return key
    for key, wanted in _OF_TYPE.items():
        if key in node and not any(name in types for name in wanted):
            return f"{key} without type {' or '.join(wanted)}"
    if "multipleOf" in node and "number" in types:
        return "multipleOf with type number"
    pattern = node.get("pattern")
    if isinstance(pattern, str) and _LOOKS_AROUND.search(pattern):
        return "a pattern that looks around"
    if "minLength" in node or "maxLength" in node:
        for key in ("pattern", "format"):
            if key in node:
                return f"{key} together with {'minLength' if 'minLength' in node else 'maxLength'}"
    if isinstance(node.get("allOf"), list) and len(node["allOf"]) > 1:
        return "allOf with several schemas"
    combiner = next((key for key in _COMBINERS if key in node), None)
    if combiner is not None:
        dropped = next((key for key in _DROPPED_BESIDE_COMBINERS if key in node), None)
        return None if dropped is None else f"{dropped} beside {combiner}"
    return None

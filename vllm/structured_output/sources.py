"""Compiles a constraint: which engine takes it, and in which words.

JSON schemas go to llguidance in their normal form. What it cannot take, and everything else (structural tags, regular
expressions, choices, grammars), goes to xgrammar; a schema only if xgrammar keeps every keyword of it.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import orjson
import xgrammar

from vllm.structured_output.grammars import EngineName, Grammar, GuidanceGrammar, XgrammarGrammar
from vllm.structured_output.json_schema import unenforced
from vllm.structured_output.messages import Backend
from vllm.structured_output.schema.emit import Written, normal_schema
from vllm.structured_output.schema.errors import SchemaError
from vllm.structured_output.schema.strings import re_escape
from vllm.structured_output.vocabulary import Vocabulary

# Escapes that llguidance may write in strings: with \u among them, a name could be written so that it does not look
# like the one in the schema.
_ESCAPES = {"json_allowed_escapes": 'nrbtf\\"'}
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Any tokens may spell a text that the grammar leaves no choice in, as in xgrammar; otherwise llguidance asks for those
# of the tokenizer, which a vocabulary does not know.
_FREE_TOKENS = '%llguidance {"no_forcing": true}\n'
# Characters that JSON text has only as \u, or that llguidance leaves out of its strings.
_NEEDS_ESCAPE = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f]")
# Characters of GBNF text that xgrammar prints with a number that the digits behind it would run into.
_NUMBERED = re.compile(r"(\\\\)|\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})")


class Compiled(NamedTuple):
    """A compiled constraint.

    Attributes:
        data: The grammar, serialised as its engine does.
    """

    engine: EngineName
    grammar: Grammar
    data: bytes


def compile_source(source: bytes, vocabulary: Vocabulary, backend: Backend = "auto") -> Compiled:
    """Compiles a `constraint_source`.

    Args:
        backend: Which engine takes JSON schemas.

    Raises:
        ValueError: it is malformed, or a keyword of it cannot be enforced; the message goes on from the field's name.
        RuntimeError: xgrammar finds it malformed.
    """
    wanted = orjson.loads(source)
    form, after, enforces_all = wanted["format"], wanted["after"], wanted["enforces_all"]
    if form.get("type") in ("json_schema", "compact_json") and set(form) <= {"type", "json_schema"}:
        return _compile_schema(form, after, enforces_all, vocabulary, backend)
    return _compile_form(_with_schemas(form, enforces_all, backend), after, vocabulary)


def _compile_schema(
    form: dict[str, Any], after: str | None, enforces_all: bool, vocabulary: Vocabulary, backend: Backend
) -> Compiled:
    schema = form.get("json_schema")
    if backend == "xgrammar":
        return _compile_form(_with_schemas(form, enforces_all, backend), after, vocabulary)
    written = _normal(schema, enforces_all)
    try:
        if _NEEDS_ESCAPE.search("".join(_texts(written.schema))):
            raise ValueError("has a name or a value with a control character, which llguidance cannot write")
        options = _ESCAPES | (_COMPACT if form["type"] == "compact_json" else {})
        grammar = _guidance_text({**written.schema, "x-guidance": options}, after)
        return Compiled("guidance", GuidanceGrammar(grammar, vocabulary), grammar.encode())
    except ValueError as error:
        # A pattern that llguidance cannot read is one that xgrammar reads otherwise than JSON Schema does.
        words = set(_texts(written.schema))
        if backend == "guidance" or words & {"pattern", "patternProperties"} or not _xgrammar_keeps(written.schema):
            raise ValueError(f"has a JSON schema that cannot be compiled: {error}") from None
        return _compile_form(form | {"json_schema": written.schema}, after, vocabulary)


def _normal(schema: Any, enforces_all: bool) -> Written:
    try:
        written = normal_schema(schema)
    except SchemaError as error:
        raise ValueError(f"has a JSON schema that is not valid: {error}") from None
    if written.lost and enforces_all:
        raise ValueError(f"has a JSON schema with {written.lost[0]}, which this server cannot enforce; leave it out")
    return written


def _xgrammar_keeps(schema: Any) -> bool:
    return unenforced(schema) is None


def _guidance_text(schema: dict[str, Any], after: str | None) -> str:
    """A grammar of llguidance: a schema alone, or behind the first time that a text comes."""
    rules = f"body: %json {orjson.dumps(schema).decode()}\n"
    if after is None:
        return f"{_FREE_TOKENS}start: body\n{rules}"
    return f"{_FREE_TOKENS}start: free body\nfree[lazy]: /(?s:.*){re_escape(after)}/\n{rules}"


def _texts(schema: Any) -> list[str]:
    """The names and values that a schema in normal form has."""
    found: list[str] = []
    stack = [schema]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            found += node
            stack += node.values()
        elif isinstance(node, list):
            stack += node
        elif isinstance(node, str):
            found.append(node)
    return found


# xgrammar -------------------------------------------------------------------------------------------------------


def _with_schemas(node: Any, enforces_all: bool, backend: Backend) -> Any:
    """A format whose schemas are such that xgrammar keeps them."""
    if isinstance(node, list):
        return [_with_schemas(item, enforces_all, backend) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") not in ("json_schema", "compact_json"):
        return {key: _with_schemas(value, enforces_all, backend) for key, value in node.items()}
    schema = node.get("json_schema")
    # A function that is strict is held to its schema wherever it stands.
    node = dict(node)
    enforces_all |= bool(node.pop("strict", False))
    if backend != "xgrammar":
        written = _normal(schema, enforces_all)
        if _xgrammar_keeps(written.schema):
            return node | {"json_schema": written.schema}
    keyword = unenforced(schema)
    if keyword is not None and enforces_all:
        raise ValueError(f"has a JSON schema with {keyword}, which this server cannot enforce; leave it out")
    return node


def _compile_form(form: Any, after: str | None, vocabulary: Vocabulary) -> Compiled:
    content = _as_structural(form)
    if after is not None:
        free = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": after}
        content = {"type": "sequence", "elements": [free, content]}
    compiler = xgrammar.GrammarCompiler(vocabulary.for_xgrammar, max_threads=1, cache_enabled=False)
    tag = orjson.dumps({"type": "structural_tag", "format": content}).decode()
    compiled = compiler.compile_structural_tag(tag)
    return Compiled("xgrammar", XgrammarGrammar(compiled), compiled.serialize_json().encode())


def _as_structural(node: Any) -> Any:
    """A format with its schemas and Lark grammars turned into GBNF."""
    if isinstance(node, list):
        return [_as_structural(item) for item in node]
    if not isinstance(node, dict):
        return node
    kind = node.get("type")
    if kind == "lark":
        return {"type": "grammar", "grammar": _printed(xgrammar.Grammar.from_lark(node["grammar"]))}
    if kind == "compact_json":
        return {"type": "grammar", "grammar": _schema_grammar(node["json_schema"], any_whitespace=False)}
    if kind == "json_schema":
        if node.get("style", "json") != "json" or node.get("excludes"):
            return node
        options = {key: node[key] for key in ("any_order", "max_whitespace_cnt") if node.get(key) is not None}
        return {"type": "grammar", "grammar": _schema_grammar(node.get("json_schema"), **options)}
    return {key: _as_structural(value) for key, value in node.items()}


def _schema_grammar(schema: Any, **options: Any) -> str:
    grammar = _printed(xgrammar.Grammar.from_json_schema(orjson.dumps(schema).decode(), **options))
    # Strings of limited length may not hold control characters either; xgrammar 0.2.8 lets them in.
    return grammar.replace(r"[^\"\\\r\n]", r"[^\0-\u001f\"\\\r\n]")


def _printed(grammar: xgrammar.Grammar) -> str:
    r"""The text of a grammar as it is read again: xgrammar 0.2.8 prints é as \xe9, and reads \xe9e as one character."""

    def character(match: re.Match[str]) -> str:
        digits = match[2] or match[3] or match[4]
        if digits is None:
            return match[0]
        code = int(digits, 16)
        return f"\\u{code:04x}" if code < 0xA0 or 0xD800 <= code < 0xE000 else chr(code)

    return _NUMBERED.sub(character, str(grammar))

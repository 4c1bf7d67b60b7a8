"""Regular expressions for strings: the formats of JSON Schema, and all texts but some."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import orjson

_SHORT_MONTHS = r"(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
_LONG_MONTHS = r"(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
_LEAP_YEAR = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = rf"(?:[0-9]{{4}}-(?:{_LONG_MONTHS}|{_SHORT_MONTHS}|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
_FRACTION = r"(?:\.[0-9]+)?"
_OFFSET = r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
# A leap second comes at the end of a day in UTC only.
_TIME = (
    rf"(?:(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]{_FRACTION}{_OFFSET}"
    rf"|23:59:60{_FRACTION}(?:[Zz]|[+-]00:00))"
)
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = rf"(?:{_BYTE}\.){{3}}{_BYTE}"
_HEX = r"[0-9A-Fa-f]{1,4}"


def _ipv6() -> str:
    """RFC 4291, section 2.2: eight groups, of which `::` stands for one or more, the last two as IPv4 if one likes."""
    forms = [rf"(?:{_HEX}:){{7}}{_HEX}", rf"(?:{_HEX}:){{6}}{_IPV4}"]
    for before in range(8):
        head = "" if not before else rf"{_HEX}(?::{_HEX}){{{before - 1}}}"
        after = 7 - before
        tails = [rf"(?:{_HEX}(?::{_HEX}){{0,{after - 1}}})?"] if after else [""]
        if after >= 2:
            tails.append(rf"(?:{_HEX}:){{0,{after - 2}}}{_IPV4}")
        forms += [f"{head}::{tail}" for tail in tails]
    return "(?:" + "|".join(forms) + ")"


# RFC 3986, appendix A.
_PCT = r"%[0-9A-Fa-f]{2}"
_PCHAR = rf"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@]|{_PCT})"
_SEGMENT_NO_COLON = rf"(?:[A-Za-z0-9\-._~!$&'()*+,;=@]|{_PCT})+"
_HOST = (
    rf"(?:\[(?:{_ipv6()}|[vV][0-9A-Fa-f]+\.[A-Za-z0-9\-._~!$&'()*+,;=:]+)\]|(?:[A-Za-z0-9\-._~!$&'()*+,;=]|{_PCT})*)"
)
_AUTHORITY = rf"(?:(?:[A-Za-z0-9\-._~!$&'()*+,;=:]|{_PCT})*@)?{_HOST}(?::[0-9]*)?"
_TAIL = rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_PATH = rf"(?:/{_PCHAR}*)*"
_HIERARCHY = rf"(?://{_AUTHORITY}{_PATH}|/(?:{_PCHAR}+{_PATH})?|{_PCHAR}+{_PATH}|)"
_RELATIVE = rf"(?://{_AUTHORITY}{_PATH}|/(?:{_PCHAR}+{_PATH})?|{_SEGMENT_NO_COLON}{_PATH}|)"
_URI = rf"[A-Za-z][A-Za-z0-9+\-.]*:{_HIERARCHY}{_TAIL}"
_POINTER = r"(?:/(?:[^~/]|~[01])*)*"

FORMATS: dict[str, str | None] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": rf"{_DATE}[Tt]{_TIME}",
    "ipv4": _IPV4,
    "ipv6": _ipv6(),
    "uri": _URI,
    "uri-reference": rf"(?:{_URI}|{_RELATIVE}{_TAIL})",
    "uuid": r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "json-pointer": _POINTER,
    "relative-json-pointer": rf"(?:0|[1-9][0-9]*)(?:#|{_POINTER})",
    "byte": r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
    # OpenAPI's, of numbers that are written as strings.
    **dict.fromkeys(("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"), r"-?(?:0|[1-9][0-9]*)"),
    **dict.fromkeys(("float", "double", "decimal"), r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"),
    # Of these a form shows the text in another way; all strings have them.
    "password": None,
    "binary": None,
}
"""The whole text of each format that is written out here; None for those that any text has."""

ENGINE_FORMATS = ("email", "hostname", "duration")
"""Formats that llguidance checks as their standards say."""

_INTEGER = re.compile(r"(u?)int(\d+)")


def integer_bounds(name: str) -> tuple[int, int] | None:
    """The lowest and highest number of an OpenAPI format; None if it is one of fractions."""
    match = _INTEGER.fullmatch(name)
    if match is None:
        return None
    unsigned, bits = bool(match[1]), int(match[2])
    return (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def all_but(texts: Iterable[str]) -> str:
    """A regular expression, without look-arounds, of all texts but these: those that leave their common tree."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for char in text:
            node = node.setdefault(char, {})
        node[""] = {}
    return _outside(tree)


def _outside(root: dict[str, Any]) -> str:
    # From the leaves up, without recursion: a text may be long.
    order, stack = [], [root]
    while stack:
        node = stack.pop()
        order.append(node)
        stack += [child for char, child in node.items() if char]
    written: dict[int, str] = {}
    for node in reversed(order):
        chars = [char for char in node if char]
        forms = [] if "" in node else [""]
        forms.append(rf"[^{''.join(map(_in_class, chars))}](?s:.*)" if chars else "(?s:.+)")
        forms += [re_escape(char) + written[id(node[char])] for char in chars]
        written[id(node)] = "(?:" + "|".join(forms) + ")"
    return written[id(root)]


def re_escape(text: str) -> str:
    """The regular expression of one text."""
    return "".join(f"\\{char}" if char in r"\.+*?()|[]{}^$-&~#/" else char for char in text)


def _in_class(char: str) -> str:
    return f"\\{char}" if char in r"\]^-[&~" else char


class StringTester:
    """Tries texts on patterns and formats as the engine reads them; by an engine, so that both always agree."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Any] = {}

    @cached_property
    def _tokenizer(self) -> Any:
        import llguidance

        class Bytes:
            eos_token_id = 256
            bos_token_id = None
            tokens = (*(bytes([i]) for i in range(256)), b"\xff<end>")
            special_token_ids = (256,)

            def __call__(self, text: bytes) -> list[int]:
                return list(text)

        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()), slices=[])

    def fits(self, key: str, value: str, text: str) -> bool | None:
        """Whether a text has the `pattern` or `format` (which of the two, `key` says); None if it cannot be read."""
        from llguidance import LLMatcher

        matcher = self._known.get((key, value))
        if matcher is None:
            schema = orjson.dumps({"type": "string", key: value}).decode()
            matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_json_schema(schema), log_level=0)
            self._known[key, value] = matcher
        if matcher.is_error():
            return None
        matcher.reset()
        tokens = list(orjson.dumps(text))
        return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())

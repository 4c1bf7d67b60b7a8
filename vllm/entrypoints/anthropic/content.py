"""Content blocks, which messages, system prompts and results of tools are made of."""

from __future__ import annotations

from typing import Any

import orjson

from vllm.entrypoints.chat.messages import left_out
from vllm.entrypoints.http.json_body import snippet
from vllm.exceptions import VLLMValidationError


def blocks_of(where: str, content: Any) -> list[tuple[str, dict[str, Any]]]:
    """The blocks of a content, each with its place in the request; a string is one text block."""
    if content is None and where == "system":
        return []
    if isinstance(content, str):
        return [(where, {"type": "text", "text": content})]
    if not isinstance(content, list):
        raise VLLMValidationError(
            f"{where} must be a string or a list of content blocks, got {snippet(content)}.", field_of(where)
        )
    for i, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise VLLMValidationError(
                f"{where}[{i}] must be a content block with a type, got {snippet(block)}.", field_of(where)
            )
    return [(f"{where}[{i}]", block) for i, block in enumerate(content)]


def text_part(where: str, block: dict[str, Any], *, in_result: bool = False) -> dict[str, Any]:
    """A block as a text part.

    Args:
        in_result: A tool returned it: what is no text is said to be left out, since nobody asks about it.

    Raises:
        VLLMValidationError: it is malformed, or no text.
    """
    kind = block["type"]
    text = _TEXTS[kind](where, block) if kind in _TEXTS else None
    if text is None and in_result and kind in ("image", "document"):
        text = left_out(kind)
    if text is None:
        raise VLLMValidationError(
            f"{where} has type {snippet(kind)}, which cannot be used there; this model reads only text.",
            field_of(where),
        )
    part = {"type": "text", "text": text}
    return part | mark_of(block) if "cache_control" in block else part


def _text(where: str, block: dict[str, Any]) -> str:
    return string(f"{where}.text", block.get("text"))


def _tool_reference(where: str, block: dict[str, Any]) -> str:
    return f"Tool: {string(f'{where}.tool_name', block.get('tool_name'))}"


def _search_result(where: str, block: dict[str, Any]) -> str:
    head = [string(f"{where}.{name}", block.get(name)) for name in ("title", "source")]
    return "\n".join([*head, *_inner_texts(f"{where}.content", block.get("content"))])


def _document(where: str, block: dict[str, Any]) -> str | None:
    """Title, context and text; None if its content is no text."""
    source = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else None
    if not isinstance(source, dict) or kind not in ("text", "content"):
        return None
    head = [block[name] for name in ("title", "context") if isinstance(block.get(name), str)]
    if kind == "text":
        return "\n".join([*head, string(f"{where}.source.data", source.get("data"))])
    return "\n".join([*head, *_inner_texts(f"{where}.source.content", source.get("content"))])


def _inner_texts(where: str, content: Any) -> list[str]:
    return [text_part(at, inner, in_result=True)["text"] for at, inner in blocks_of(where, content)]


_TEXTS = {
    "text": _text,
    "tool_reference": _tool_reference,
    "search_result": _search_result,
    "document": _document,
}


def server_tool_text(where: str, block: dict[str, Any]) -> str | None:
    """What a block tells of a tool that another server ran for the assistant; None if it is no such block."""
    kind = block["type"]
    if kind in ("server_tool_use", "mcp_tool_use"):
        return f"[{string(f'{where}.name', block.get('name'))}] {json_text(where, block.get('input'))}"
    if kind.endswith("_tool_result"):
        return f"[{kind}] {json_text(where, _readable(block.get('content')))}"
    return "[container_upload]" if kind == "container_upload" else None


def _readable(value: Any) -> Any:
    """A result without what only the server that made it can read."""
    if isinstance(value, list):
        return [_readable(item) for item in value]
    if isinstance(value, dict):
        return {key: _readable(item) for key, item in value.items() if not key.startswith("encrypted_")}
    return value


def json_text(where: str, value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        raise VLLMValidationError(f"{where} is nested too deeply.", field_of(where)) from None


def mark_of(*blocks: dict[str, Any]) -> dict[str, Any]:
    """The mark of the last of these blocks that has one; the chat path knows it by the same name."""
    marks = [block["cache_control"] for block in blocks if block.get("cache_control") is not None]
    return {"cache_control": marks[-1]} if marks else {}


def string(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise VLLMValidationError(f"{where} must be a string, got {snippet(value)}.", field_of(where))
    return value


def field_of(where: str) -> str:
    return where.split("[")[0].split(".")[0]

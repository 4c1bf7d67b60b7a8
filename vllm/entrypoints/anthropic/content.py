"""Content blocks, which messages, system prompts and results of tools are made of."""

from __future__ import annotations

from typing import Any

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


def text_part(where: str, block: dict[str, Any]) -> dict[str, Any]:
    text = block.get("text")
    if block["type"] != "text":
        raise VLLMValidationError(
            f"{where} has type {snippet(block['type'])}, which cannot be used there; this model reads only text.",
            field_of(where),
        )
    if not isinstance(text, str):
        raise VLLMValidationError(f"{where}.text must be a string, got {snippet(text)}.", field_of(where))
    part = {"type": "text", "text": text}
    return part | mark_of(block) if "cache_control" in block else part


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

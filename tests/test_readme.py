"""The Chinese README says what the English one says: the same commands, tables, figures, pictures and links."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENGLISH = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README.zh-CN.md").read_text()


def blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def tables(text: str) -> list[list[str]]:
    """The numbers and code of each table, row by row."""
    found = re.findall(r"(?:^\|.*\n)+", prose(text), re.MULTILINE)
    return [
        [" ".join(sorted(re.findall(r"`[^`]+`|\d[\d,.]*\d|\d", row))) for row in table.splitlines()] for table in found
    ]


def headings(text: str) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", prose(text), re.MULTILINE)]


def test_the_commands_are_the_same():
    assert blocks(CHINESE) == blocks(ENGLISH)
    code = [set(re.findall(r"`([^`\n]+)`", prose(text))) for text in (ENGLISH, CHINESE)]
    assert code[0] ^ code[1] == set()


def test_the_tables_hold_the_same_figures():
    assert tables(CHINESE) == tables(ENGLISH)


def test_the_sections_pictures_and_links_are_the_same():
    assert headings(CHINESE) == headings(ENGLISH)
    targets = [sorted(re.findall(r"\]\(([^)]+)\)", text)) for text in (ENGLISH, CHINESE)]
    own = {"README.md", "README.zh-CN.md"}
    assert [t for t in targets[0] if t not in own] == [t for t in targets[1] if t not in own]


def test_what_they_link_to_is_there():
    for target in re.findall(r"\]\(([^)#]+)", ENGLISH + CHINESE):
        assert target.startswith("http") or (ROOT / target).exists(), target

"""Markdown: tables that can be read as plain text too, and pages with generated blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["aligned", "marked_blocks", "with_block"]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text; the first line is the header."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def text(line: Sequence[str]) -> str:
        first, *rest = zip(line, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in rest)]) + " |"

    dashes = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([text(lines[0]), f"|{'|'.join(dashes)}|", *map(text, lines[1:])]) + "\n"


def marked_blocks(page: str) -> list[str]:
    """Names of the blocks ``<!-- begin: NAME -->`` … ``<!-- end: NAME -->`` of a page, in order."""
    return re.findall(r"<!-- begin: (.+?) -->", page)


def with_block(page: str, name: str, text: str) -> str:
    """Return a page with ``text`` between the markers of a block, in place of what was there.

    Raises:
        ValueError: the page lacks the second marker.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the page lacks the marker {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"

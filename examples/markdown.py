"""Markdown tables that can be read as plain text too."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned"]


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up as plain text; the first line is the header."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def text(line: Sequence[str]) -> str:
        first, *rest = zip(line, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in rest)]) + " |"

    dashes = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([text(lines[0]), f"|{'|'.join(dashes)}|", *map(text, lines[1:])]) + "\n"

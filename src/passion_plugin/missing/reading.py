"""Reading of small CSV files that may come from anywhere: nothing is evaluated, everything is bounded."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from passion_plugin.errors import ConfigError

__all__ = ["read_rows", "shorten", "shortlist"]

_LARGEST_FILE = 64 * 2**20
_LONGEST_LINE = 10_000

Numbered = list[tuple[int, list[str]]]


def read_rows(path: str | os.PathLike[str]) -> tuple[list[tuple[int, str]], Numbered, list[str]]:
    """Read a UTF-8 CSV file, with or without byte order mark, with any line ends.

    Args:
        path: the file, at most 64 MB, lines of at most 10 000 characters.

    Returns:
        ``(comments, rows, problems)``: comment lines before the header without their ``#`` and non-empty
        rows, both with line numbers from 1, and sentences about lines that are no CSV.

    Raises:
        ConfigError: the file is too large or not UTF-8 text.
        FileNotFoundError: there is no such file.
    """
    file = Path(path)
    size = file.stat().st_size
    if size > _LARGEST_FILE:
        raise ConfigError(f"{file}: {size} bytes; a table of samples has at most {_LARGEST_FILE}. Wrong file?")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    comments: list[tuple[int, str]] = []
    rows: Numbered = []
    problems: list[str] = []
    # One line at a time: a stray quote then spoils its own line and not the rest of the file.
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        if not rows and line.startswith("#"):
            comments.append((number, line[1:].strip()))
        elif len(line) > _LONGEST_LINE:
            problems.append(f"line {number}: {len(line)} characters, more than {_LONGEST_LINE}: {shorten(line)}")
        elif line.strip():
            try:
                rows.append((number, next(csv.reader([line], strict=True))))
            except csv.Error as error:
                problems.append(f"line {number}: not CSV ({error}): {shorten(line)}")
    return comments, rows, problems


def shorten(value: object, width: int = 80) -> str:
    """Return ``repr(value)``, cut to ``width`` characters."""
    text = repr(value[:width] if isinstance(value, str) else value)
    return text if len(text) <= width else text[: width - 1] + "…"


def shortlist(names: Sequence[object], most: int = 5) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shorten(name) for name in names[:most]) + more

"""Reading of small CSV files that may come from anywhere: nothing is evaluated, everything is bounded."""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from passion_plugin.errors import ConfigError

__all__ = ["read_rows", "read_text", "shorten", "shortlist"]

_LARGEST_FILE = 64 * 2**20

_LONGEST_LINE = 10_000

_MOST_LINES = 1_000_000

Numbered = list[tuple[int, list[str]]]


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 file, with or without byte order mark, with any line ends.

    Args:
        path: a regular file of at most 64 MB and a million lines, or a link to one.

    Returns:
        Its text, in which lines end with a newline.

    Raises:
        ConfigError: it is no regular file (a pipe or a device may never end), is too large or not UTF-8 text.
        FileNotFoundError: there is no such file.
    """
    file = Path(path)
    mode, size = file.stat().st_mode, file.stat().st_size
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{file}: not a regular file but a {_kind(mode)}; pass a file")
    if size > _LARGEST_FILE:
        raise ConfigError(f"{file}: {size} bytes; a table has at most {_LARGEST_FILE}. Wrong file?")
    try:
        # Some file systems say 0 for files that have no end.
        with file.open("rb") as opened:
            text = opened.read(_LARGEST_FILE).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    if (count := text.count("\n")) > _MOST_LINES:
        raise ConfigError(f"{file}: {count} lines; a table has at most {_MOST_LINES}. Wrong file?")
    return text


def read_rows(path: str | os.PathLike[str]) -> tuple[list[tuple[int, str]], Numbered, list[str]]:
    """Read a CSV file line by line.

    Args:
        path: as for :func:`read_text`; lines of at most 10 000 characters.

    Returns:
        ``(comments, rows, problems)``: comment lines before the header without their ``#``, and rows with something in
        them, both with line numbers from 1, and sentences about lines that are no CSV.

    Raises:
        ConfigError: as :func:`read_text`.
        FileNotFoundError: there is no such file.
    """
    comments: list[tuple[int, str]] = []
    rows: Numbered = []
    problems: list[str] = []
    # One line at a time: a stray quote then spoils its own line and not the rest of the file.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if len(line) > _LONGEST_LINE:
            problems.append(f"line {number}: {len(line)} characters, more than {_LONGEST_LINE}: {shorten(line)}")
        elif not rows and line.startswith(("#", '"#')):
            # A spreadsheet fills lines up with commas, and puts a cell that holds some between quotes.
            text = ",".join(next(csv.reader([line]))) if line.startswith('"') else line
            comments.append((number, text[1:].rstrip(",").strip()))
        elif line.strip():
            try:
                cells = next(csv.reader([line], strict=True))
            except csv.Error as error:
                problems.append(f"line {number}: not CSV ({error}): {shorten(line)}")
            else:
                if any(cell.strip() for cell in cells):
                    rows.append((number, cells))
    return comments, rows, problems


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
    return next((name for question, name in kinds.items() if question(mode)), "device")


def shorten(value: object, width: int = 80) -> str:
    """Return ``repr(value)``, cut to ``width`` characters."""
    text = repr(value[:width] if isinstance(value, str) else value)
    return text if len(text) <= width else text[: width - 1] + "…"


def shortlist(names: Sequence[object], most: int = 5) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shorten(name) for name in names[:most]) + more

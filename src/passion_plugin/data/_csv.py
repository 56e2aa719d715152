"""Reading of CSV files: nothing in them is evaluated, and what is wrong is said with the line number."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from passion_plugin.errors import ConfigError, shortlist


def read_rows(
    path: str | os.PathLike[str],
) -> tuple[list[tuple[int, str]], list[tuple[int, list[str]]], list[str]]:
    """Read a CSV file in UTF-8, with or without byte order mark, with any line ends.

    Returns:
        ``(comments, rows, problems)``: comment lines before the header without their ``#``, and rows with something in
        them, both with line numbers from 1, and sentences about lines that are not CSV.

    Raises:
        ConfigError: it is not UTF-8 text.
        OSError: it cannot be opened.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from None
    comments: list[tuple[int, str]] = []
    rows: list[tuple[int, list[str]]] = []
    problems: list[str] = []
    # One line at a time: a stray quote then spoils its own line and not the rest of the file.
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if not rows and line.startswith(("#", '"#')):
                # A spreadsheet pads lines with commas and quotes a cell that holds some.
                comment = ",".join(next(csv.reader([line]))) if line.startswith('"') else line
                comments.append((number, comment[1:].rstrip(",").strip()))
            elif line.strip(", "):
                rows.append((number, next(csv.reader([line], strict=True))))
        except csv.Error as error:
            problems.append(f"line {number}: not CSV ({error}): {shortlist([line])}")
    return comments, rows, problems

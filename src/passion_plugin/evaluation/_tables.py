"""Tables and CSV files of results."""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from passion_plugin.data import read_rows, shorten
from passion_plugin.errors import raise_problems
from passion_plugin.evaluation._rows import DIFFERENCE, STATUS, Convention, Grouping, Row, Summary

if TYPE_CHECKING:
    from passion_plugin.evaluation._results import SubsetResults

__all__ = ["caption", "in_shown_unit", "markdown", "read_csv", "table_lines", "title", "write_csv"]

_LINES = {"subset": "subset", "modality": "contains", "size": "modalities"}

_ROW_FIELDS = ("sample", "target", "metric", "value", "status")

_CONVENTION_FIELDS = ("unit", "both_empty", "one_empty")

_STATUSES = (*STATUS, "missing", "unpaired")


def markdown(results: SubsetResults, by: Grouping, metric: str, *, digits: int, sd: bool) -> str:
    """Caption and table."""
    header, *lines = table_lines(results, by, metric, digits=digits, sd=sd)
    rows = [_line(header), "|" + "---|" * len(header), *map(_line, lines)]
    return "\n".join([caption(results, metric, sd), "", *rows]) + "\n"


def table_lines(results: SubsetResults, by: Grouping, metric: str, *, digits: int, sd: bool) -> list[list[str]]:
    """Cells of the header, of one line per group and of one over all subsets."""
    targets = results.targets
    columns = [*targets, "mean"] if len(targets) > 1 else list(targets)

    def line(name: str, subsets: tuple[str, ...]) -> list[str]:
        cells = [results.summary(metric, subsets=subsets, targets=target) for target in targets]
        counts = [str(cell.n) for cell in cells]
        if len(targets) > 1:
            cells.append(results.summary(metric, subsets=subsets))
        texts = [_number(results, metric, cell, digits, sd) for cell in cells]
        return [name, *texts, counts[0] if len(set(counts)) == 1 else "/".join(counts)]

    lines = [line(name, subsets) for name, subsets in results.groups(by).items()]
    if len(results.subsets) > 1:
        lines.append(line("all subsets", results.subsets))
    return [[_LINES[by], *columns, "n"], *lines]


def write_csv(results: SubsetResults, path: str | os.PathLike[str]) -> None:
    """One line per row; the conventions are repeated so that the file explains itself."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        presence = [f"has_{name}" for name in results.modalities]
        writer.writerow(["subset", *presence, *_ROW_FIELDS, *_CONVENTION_FIELDS])
        for row in results.rows:
            members = row.subset.split("+")
            has = [int(name in members) for name in results.modalities]
            # csv writes None as an empty field and floats with repr, which reads back exactly.
            writer.writerow([row.subset, *has, *row[1:], *results.conventions[row.metric]])


def read_csv(path: str | os.PathLike[str]) -> tuple[tuple[str, ...], tuple[Row, ...], dict[str, Convention]]:
    """Modalities, rows and conventions of a file of :func:`write_csv`.

    Raises:
        ConfigError: listing all problems with line numbers.
    """
    _, lines, problems = read_rows(path)
    fields = lines[0][1] if lines else []
    modalities = tuple(name.removeprefix("has_") for name in fields if name.startswith("has_"))
    absent = [name for name in ("subset", *_ROW_FIELDS, *_CONVENTION_FIELDS) if name not in fields]
    if absent:
        problems.append(f"columns {absent} are missing; was it written by to_csv()?")
    elif len(set(fields)) < len(fields):
        problems.append(f"columns occur more than once: {shorten(fields)}")
    elif not "".join(fields).isprintable():
        problems.append(f"columns must be printable: {shorten(fields)}")
    raise_problems(problems, what=os.fspath(path))
    rows: list[Row] = []
    conventions: dict[str, Convention] = {}
    for number, cells in lines[1:]:
        try:
            row, convention = _parsed(dict(zip(fields, cells, strict=True)))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        if conventions.setdefault(row.metric, convention) != convention:
            problems.append(f"line {number}: {shorten(row.metric)} has another convention than in a line before")
        rows.append(row)
    raise_problems(problems, what=os.fspath(path))
    return modalities, tuple(rows), conventions


def _parsed(line: Mapping[str, str]) -> tuple[Row, Convention]:
    """Read one line; raise ValueError with what is wrong."""
    value, both = (float(line[key]) if line[key] else None for key in ("value", "both_empty"))
    one = float(line["one_empty"])
    if value is not None and not math.isfinite(value):
        raise ValueError(f"value is {value}, need a finite number or nothing")
    if line["status"] not in _STATUSES:
        raise ValueError(f"status is {shorten(line['status'])}, need one of {_STATUSES}")
    texts = [line[key] for key in ("subset", "sample", "target", "metric")]
    if not "".join([*texts, line["unit"]]).isprintable():
        raise ValueError("subset, sample, target, metric and unit must be printable")
    subset, sample, target, metric = texts
    return Row(subset, sample, target, metric, value, line["status"]), Convention(line["unit"], both, one)


def caption(results: SubsetResults, metric: str, sd: bool) -> str:
    """Metric, unit and the conventions behind it."""
    convention = results.conventions[metric]
    statuses = Counter(row.status for row in results.rows if row.metric == metric)
    both = "skipped" if convention.both_empty is None else f"{convention.both_empty:g}"
    parts = [
        f"{title(results, metric)}, {'mean ± sd (ddof = 1)' if sd else 'mean'} over samples.",
        f"Both masks empty: {both}; exactly one empty: {convention.one_empty:g}",
    ]
    if metric.endswith(DIFFERENCE):
        parts[1] += "."
        if statuses["unpaired"]:
            parts.append(f"Without a partner: {statuses['unpaired']} of {sum(statuses.values())} values.")
        return " ".join(parts)
    total = sum(statuses.values()) - statuses["missing"]
    parts[1] += f" ({statuses['both empty']} and {statuses['one empty']} of {total} values)."
    if any(results.skipped.values()):
        pairs = len(results.subsets) * len(results.samples)
        parts.append(
            f"Left out because the sample lacks a modality: {sum(results.skipped.values())} of {pairs} "
            "pairs of subset and sample."
        )
    return " ".join(parts)


def title(results: SubsetResults, metric: str) -> str:
    """Name of a metric with the unit in which it is shown."""
    name = metric.removesuffix(DIFFERENCE)
    shown = {"dice": "Dice", "hd95": "HD95"}.get(name, name)
    unit = results.conventions[metric].unit
    if not metric.endswith(DIFFERENCE):
        return f"{shown} ({'%' if unit == 'fraction' else unit})"
    return f"Difference in {shown} ({'percentage points' if unit == 'fraction' else unit}, paired)"


def in_shown_unit(results: SubsetResults, metric: str, value: float) -> float:
    """Return a value in the unit of :func:`title`: fractions in percent."""
    return 100.0 * value if results.conventions[metric].unit == "fraction" else value


def _number(results: SubsetResults, metric: str, cell: Summary, digits: int, sd: bool) -> str:
    if not cell.n:
        return "n/a"
    mean, deviation = (in_shown_unit(results, metric, value) for value in (cell.mean, cell.sd))
    sign = "+" if metric.endswith(DIFFERENCE) else ""
    spread = f" ± {deviation:.{digits}f}" if sd and cell.n > 1 else ""
    return f"{mean:{sign}.{digits}f}{spread}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"

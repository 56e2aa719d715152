"""Markdown, CSV and heat maps of results."""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from passion_plugin.errors import ConfigError
from passion_plugin.evaluation._optional import require
from passion_plugin.evaluation.rows import DIFFERENCE, Convention, Grouping, Row, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from passion_plugin.evaluation.results import SubsetResults

__all__ = ["heat_map", "markdown", "read_csv", "write_csv"]

_LINES = {"subset": "subset", "modality": "contains", "size": "modalities"}
_ROW_FIELDS = ("sample", "target", "metric", "value", "status")
_CONVENTION_FIELDS = ("unit", "both_empty", "one_empty")


def markdown(results: SubsetResults, by: Grouping, metric: str, *, digits: int, sd: bool) -> str:
    """Caption, header, one line per group and one over all subsets."""
    targets = results.targets
    columns = [*targets, "mean"] if len(targets) > 1 else list(targets)

    def line(name: str, subsets: tuple[str, ...]) -> str:
        cells = [results.summary(metric, subsets=subsets, targets=target) for target in targets]
        counts = [str(cell.n) for cell in cells]
        if len(targets) > 1:
            cells.append(results.summary(metric, subsets=subsets))
        texts = [_number(results, metric, cell, digits, sd) for cell in cells]
        return _line([name, *texts, counts[0] if len(set(counts)) == 1 else "/".join(counts)])

    groups = results.groups(by)
    lines = [line(name, subsets) for name, subsets in groups.items()]
    if len(results.subsets) > 1:
        lines.append(line("all subsets", results.subsets))
    header = [_line([_LINES[by], *columns, "n"]), "|" + "---|" * (len(columns) + 2)]
    return "\n".join([_caption(results, metric, sd), "", *header, *lines]) + "\n"


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
    """Modalities, rows and conventions of a file of :func:`write_csv`."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        fields = reader.fieldnames or []
        absent = [name for name in ("subset", *_ROW_FIELDS, *_CONVENTION_FIELDS) if name not in fields]
        if absent:
            raise ConfigError(f"{path}: columns {absent} are missing; was it written by to_csv()?")
        rows, conventions = [], {}
        for line in reader:
            try:
                value, both = (float(line[key]) if line[key] else None for key in ("value", "both_empty"))
                convention = Convention(line["unit"], both, float(line["one_empty"]))
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{path}, line {reader.line_num}: {error}") from error
            subset, sample, target, metric = (line[key] for key in ("subset", "sample", "target", "metric"))
            conventions[metric] = convention
            rows.append(Row(subset, sample, target, metric, value, line["status"]))
    modalities = tuple(name.removeprefix("has_") for name in fields if name.startswith("has_"))
    return modalities, tuple(rows), conventions


def heat_map(results: SubsetResults, metric: str, path: str | os.PathLike[str] | None) -> Figure:
    """Means, subsets by targets, the number in every cell."""
    # Figure without pyplot: no global state, and no display is needed.
    figure_class = require("matplotlib.figure", extra="plot", purpose="plot()").Figure
    scale = _scale(results, metric)
    means = [
        [scale * results.mean(metric, subsets=subset, targets=target) for target in results.targets]
        for subset in results.subsets
    ]
    finite = [value for line in means for value in line if math.isfinite(value)] or [0.0]
    limits: dict[str, Any] = {"cmap": "viridis", "vmin": min(finite), "vmax": max(finite)}
    if metric.endswith(DIFFERENCE):
        # Zero difference is the middle of the colours, and blue is better: more Dice, less distance.
        bound = max(abs(value) for value in finite) or 1.0
        limits = {"cmap": "RdBu" if scale != 1.0 else "RdBu_r", "vmin": -bound, "vmax": bound}
    width, height = 3.2 + 0.9 * len(results.targets), 1.0 + 0.32 * len(results.subsets)
    figure: Figure = figure_class(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(means, aspect="auto", **limits)
    colours = image.to_rgba(np.array(means))
    for i, line in enumerate(means):
        for j, value in enumerate(line):
            if not math.isfinite(value):
                continue
            red, green, blue, _ = colours[i, j]
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            text = f"{value:+.1f}" if metric.endswith(DIFFERENCE) else f"{value:.1f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.set_xticks(range(len(results.targets)), results.targets)
    axes.set_yticks(range(len(results.subsets)), results.subsets)
    axes.set_title(_title(results, metric).replace(" in ", "\nin "), fontsize=10)
    figure.colorbar(image, ax=axes)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _caption(results: SubsetResults, metric: str, sd: bool) -> str:
    convention = results.conventions[metric]
    statuses = Counter(row.status for row in results.rows if row.metric == metric)
    both = "skipped" if convention.both_empty is None else f"{convention.both_empty:g}"
    parts = [
        f"{_title(results, metric)}, {'mean ± sd (ddof = 1)' if sd else 'mean'} over samples.",
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


def _title(results: SubsetResults, metric: str) -> str:
    name = metric.removesuffix(DIFFERENCE)
    shown = {"dice": "Dice", "hd95": "HD95"}.get(name, name)
    unit = results.conventions[metric].unit
    if not metric.endswith(DIFFERENCE):
        return f"{shown} ({'%' if unit == 'fraction' else unit})"
    return f"Difference in {shown} ({'percentage points' if unit == 'fraction' else unit}, paired)"


def _scale(results: SubsetResults, metric: str) -> float:
    return 100.0 if results.conventions[metric].unit == "fraction" else 1.0


def _number(results: SubsetResults, metric: str, cell: Summary, digits: int, sd: bool) -> str:
    if not cell.n:
        return "n/a"
    scale = _scale(results, metric)
    sign = "+" if metric.endswith(DIFFERENCE) else ""
    spread = f" ± {scale * cell.sd:.{digits}f}" if sd and cell.n > 1 else ""
    return f"{scale * cell.mean:{sign}.{digits}f}{spread}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"

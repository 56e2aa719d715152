"""Results of an evaluation: selection, averages, comparison, tables and CSV files."""

from __future__ import annotations

import csv
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

from passion_plugin.data import parse_subset, read_rows
from passion_plugin.errors import ConfigError, raise_problems, shortlist, suggest

STATUS = ("ok", "one empty", "both empty")
"""Status of a scored row, by the number of empty masks (prediction, truth)."""

DIFFERENCE = " difference"
"""What :meth:`SubsetResults.compare` appends to the names of metrics."""

Grouping = Literal["subset", "modality", "size"]

Names: TypeAlias = str | Iterable[str] | None

_FIRST_COLUMN = {"subset": "subset", "modality": "contains", "size": "modalities"}

_COLUMNS = ("subset", "sample", "target", "metric", "value", "status", "unit", "both_empty", "one_empty")


class Row(NamedTuple):
    """One value.

    Attributes:
        subset: name such as ``"flair+t1ce"``.
        sample: id of the sample.
        target: class or region.
        metric: ``"dice"`` or ``"hd95"``, with ``" difference"`` behind it in a comparison.
        value: a finite number, or None when there is no score.
        status: ``"ok"``; ``"one empty"`` or ``"both empty"``: the convention decided; ``"missing"``: the
            sample lacks a modality of the subset; ``"unpaired"``: one side of a comparison has no score.
    """

    subset: str
    sample: str
    target: str
    metric: str
    value: float | None
    status: str


class Convention(NamedTuple):
    """How a metric was computed.

    Attributes:
        unit: ``"fraction"``, ``"mm"`` or ``"voxels"``.
        both_empty: the value where prediction and truth are empty; None leaves the sample out.
        one_empty: the value where exactly one of them is empty.
    """

    unit: str
    both_empty: float | None
    one_empty: float


class Summary(NamedTuple):
    """Mean and standard deviation of a group of values.

    Attributes:
        mean: mean over samples; over several subsets or targets the unweighted mean of their means, as
            published tables average their cells. NaN when there is no value.
        sd: standard deviation over samples (ddof = 1) of each sample's average in the group. NaN for n < 2.
        n: samples with at least one value.
    """

    mean: float
    sd: float
    n: int


@dataclass(frozen=True, repr=False)
class SubsetResults:
    """Scores of a model on subsets of its modalities. For any other table: ``pandas.DataFrame(results.rows)``.

    Attributes:
        modalities: names in mask order.
        rows: one per subset, sample, metric and target, in a fixed order.
        conventions: metric -> how it was computed.

    Raises:
        ConfigError: no rows, rows that come twice, a subset of other modalities, or a metric without a convention.

    Example:
        >>> rows = [Row("t1", s, "WT", "dice", v, "ok") for s, v in (("a", 0.5), ("b", 0.7))]
        >>> results = SubsetResults(("t1", "t2"), tuple(rows), {"dice": Convention("fraction", None, 0.0)})
        >>> results
        SubsetResults(subsets: 1, samples: 2, targets: WT, metrics: dice)
        >>> round(results.mean(subsets="t1", targets="WT"), 3)
        0.6
    """

    modalities: tuple[str, ...]
    rows: tuple[Row, ...]
    conventions: Mapping[str, Convention]

    def __post_init__(self) -> None:
        problems = [] if self.rows else ["there are no rows."]
        repeated = [key for key, count in Counter(row[:4] for row in self.rows).items() if count > 1]
        if repeated:
            problems.append(f"rows come more than once, the first is {repeated[0]}.")
        problems += [f"metric {name!r} has no convention." for name in self.metrics if name not in self.conventions]
        raise_problems(problems, what="SubsetResults", error=ConfigError)
        for subset in self.subsets:
            parse_subset(subset, self.modalities)

    def __repr__(self) -> str:
        return (
            f"SubsetResults(subsets: {len(self.subsets)}, samples: {len(self.samples)}, "
            f"targets: {', '.join(self.targets)}, metrics: {', '.join(self.metrics)})"
        )

    def __str__(self) -> str:
        return "\n".join(self.to_markdown(metric=metric) for metric in self.metrics)

    @cached_property
    def subsets(self) -> tuple[str, ...]:
        """Names of the subsets, in order."""
        return self._distinct("subset")

    @cached_property
    def samples(self) -> tuple[str, ...]:
        """Sample ids, in order."""
        return self._distinct("sample")

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Classes or regions, in order."""
        return self._distinct("target")

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in order."""
        return self._distinct("metric")

    def _distinct(self, field: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(getattr(row, field) for row in self.rows))

    @cached_property
    def skipped(self) -> dict[str, int]:
        """Per subset, the samples left out because they lack one of its modalities."""
        missing = {(row.subset, row.sample) for row in self.rows if row.status == "missing"}
        return {name: sum(subset == name for subset, _ in missing) for name in self.subsets}

    def summary(self, metric: str | None = None, *, subsets: Names = None, targets: Names = None) -> Summary:
        """Mean, sd and n of some subsets and targets.

        Args:
            metric: its name; None takes the first.
            subsets: one name or several; None takes all.
            targets: one name or several; None takes all.

        Returns:
            The summary; its docstring says how groups are averaged.

        Raises:
            ConfigError: a name does not exist.
        """
        metric = self.metric_name(metric)
        cells = [
            self._cells.get((metric, subset, target), {})
            for subset in _pick("subset", subsets, self.subsets)
            for target in _pick("target", targets, self.targets)
        ]
        means = [statistics.fmean(cell.values()) for cell in cells if cell]
        by_sample: dict[str, list[float]] = {}
        for cell in cells:
            for sample, value in cell.items():
                by_sample.setdefault(sample, []).append(value)
        averages = [statistics.fmean(values) for values in by_sample.values()]
        return Summary(
            mean=statistics.fmean(means) if means else math.nan,
            sd=statistics.stdev(averages) if len(averages) > 1 else math.nan,
            n=len(averages),
        )

    def mean(self, metric: str | None = None, *, subsets: Names = None, targets: Names = None) -> float:
        """The mean of :meth:`summary`."""
        return self.summary(metric, subsets=subsets, targets=targets).mean

    def groups(self, by: Grouping = "subset") -> dict[str, tuple[str, ...]]:
        """Groups of subsets.

        Args:
            by: ``"subset"``: each alone; ``"modality"``: those that contain it (a subset is in as many
                groups as it has members); ``"size"``: those with that many modalities.

        Returns:
            Group name -> subset names; groups without a subset are left out.
        """
        members = {name: parse_subset(name, self.modalities) for name in self.subsets}
        if by == "subset":
            return {name: (name,) for name in self.subsets}
        if by == "modality":
            found = {m: tuple(s for s in self.subsets if m in members[s]) for m in self.modalities}
        elif by == "size":
            sizes = range(1, len(self.modalities) + 1)
            found = {str(n): tuple(s for s in self.subsets if len(members[s]) == n) for n in sizes}
        else:
            raise ConfigError(f"by is {by!r}; it must be 'subset', 'modality' or 'size'.")
        return {name: group for name, group in found.items() if group}

    def compare(self, baseline: SubsetResults) -> SubsetResults:
        """Differences ``self - baseline``, paired by subset, sample, target and metric.

        Args:
            baseline: results on the same samples.

        Returns:
            Results whose values are differences and whose metrics are called ``"dice difference"`` and so
            on, so that means, tables and plots work as before. A pair that lacks a side is ``"unpaired"``.

        Raises:
            ConfigError: other modalities, another convention, or nothing in common.
        """
        shared = [name for name in self.metrics if name in baseline.metrics]
        problems = [
            f"{name} was computed under other conventions: {self.conventions[name]} and "
            f"{baseline.conventions[name]}; evaluate both alike."
            for name in shared
            if self.conventions[name] != baseline.conventions[name]
        ]
        if self.modalities != baseline.modalities:
            problems.append(f"modalities are {self.modalities} and {baseline.modalities}.")
        others = {row[:4]: row.value for row in baseline.rows}
        if not any(row[:4] in others for row in self.rows):
            problems.append("no row has the same subset, sample, target and metric in both.")
        raise_problems(problems, what="compare", error=ConfigError)
        rows = []
        for row in self.rows:
            if row.metric in shared:
                other = others.get(row[:4])
                value = None if row.value is None or other is None else row.value - other
                status = "unpaired" if value is None else "ok"
                rows.append(row._replace(metric=row.metric + DIFFERENCE, value=value, status=status))
        conventions = {name + DIFFERENCE: self.conventions[name] for name in shared}
        return SubsetResults(self.modalities, tuple(rows), conventions)

    def to_markdown(
        self, by: Grouping = "subset", metric: str | None = None, *, digits: int = 2, sd: bool = True
    ) -> str:
        """A table with a caption that states the conventions.

        Args:
            by: what the lines are, see :meth:`groups`.
            metric: its name; None takes the first.
            digits: decimals.
            sd: print ``mean ± sd`` instead of the mean alone.

        Returns:
            Markdown that ends with a newline; Dice in percent, HD95 in its unit.
        """
        metric = self.metric_name(metric)
        header, *lines = table_lines(self, by, metric, digits=digits, sd=sd)
        rows = [f"| {' | '.join(cells)} |" for cells in (header, *lines)]
        return "\n".join([caption(self, metric, sd), "", rows[0], "|" + "---|" * len(header), *rows[1:], ""])

    def metric_name(self, metric: str | None = None) -> str:
        """Return the name of a metric that is there; None gives the first.

        Raises:
            ConfigError: it does not exist.
        """
        return _pick("metric", metric, self.metrics)[0]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write all rows with their conventions, numbers in full, one ``has_`` column per modality."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["subset", *(f"has_{name}" for name in self.modalities), *_COLUMNS[1:]])
            for row in self.rows:
                members = parse_subset(row.subset, self.modalities)
                has = [int(name in members) for name in self.modalities]
                # csv writes None as an empty field and floats with repr, which reads back exactly.
                writer.writerow([row.subset, *has, *row[1:], *self.conventions[row.metric]])

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> SubsetResults:
        """Read what :meth:`to_csv` wrote; the result equals the original.

        Raises:
            ConfigError: listing what is wrong with the file, with line numbers.
        """
        _, lines, problems = read_rows(path)
        fields = lines[0][1] if lines else []
        absent = [name for name in _COLUMNS if name not in fields]
        if absent:
            problems.append(f"columns {absent} are missing; was it written by to_csv()?")
        elif len(set(fields)) < len(fields):
            problems.append(f"columns occur more than once: {shortlist(fields)}")
        raise_problems(problems, what=os.fspath(path))
        rows: list[Row] = []
        conventions: dict[str, Convention] = {}
        for number, cells in lines[1:]:
            try:
                row, convention = _parsed(dict(zip(fields, cells, strict=True)))
                if conventions.setdefault(row.metric, convention) != convention:
                    raise ValueError(f"{row.metric!r} has another convention than in a line before")
                rows.append(row)
            except ValueError as error:
                problems.append(f"line {number}: {error}")
        raise_problems(problems, what=os.fspath(path))
        modalities = tuple(name.removeprefix("has_") for name in fields if name.startswith("has_"))
        try:
            return cls(modalities, tuple(rows), conventions)
        except ConfigError as error:
            raise ConfigError(f"{os.fspath(path)}: {error}") from None

    @cached_property
    def _cells(self) -> dict[tuple[str, str, str], dict[str, float]]:
        """Values by (metric, subset, target), then by sample."""
        cells: dict[tuple[str, str, str], dict[str, float]] = {}
        for row in self.rows:
            if row.value is not None:
                cells.setdefault((row.metric, row.subset, row.target), {})[row.sample] = row.value
        return cells


def _pick(kind: str, wanted: Names, known: tuple[str, ...]) -> tuple[str, ...]:
    if wanted is None:
        return known
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    problems = [f"no {kind} {name!r}.{suggest(name, known)}" for name in names if name not in known]
    raise_problems(problems, what="SubsetResults", error=ConfigError)
    return names


def _parsed(line: Mapping[str, str]) -> tuple[Row, Convention]:
    """Read one line; raise ValueError with what is wrong."""
    value, both = (float(line[key]) if line[key] else None for key in ("value", "both_empty"))
    if value is not None and not math.isfinite(value):
        raise ValueError(f"value is {value}, need a finite number or nothing")
    if line["status"] not in (*STATUS, "missing", "unpaired"):
        raise ValueError(f"status is {shortlist([line['status']])}, need one of {(*STATUS, 'missing', 'unpaired')}")
    row = Row(line["subset"], line["sample"], line["target"], line["metric"], value, line["status"])
    return row, Convention(line["unit"], both, float(line["one_empty"]))


def table_lines(results: SubsetResults, by: Grouping, metric: str, *, digits: int, sd: bool) -> list[list[str]]:
    """Cells of the header, of one line per group and of one over all subsets."""
    several = len(results.targets) > 1

    def number(cell: Summary) -> str:
        if not cell.n:
            return "n/a"
        mean, deviation = (in_shown_unit(results, metric, value) for value in (cell.mean, cell.sd))
        sign = "+" if metric.endswith(DIFFERENCE) else ""
        return f"{mean:{sign}.{digits}f}" + (f" ± {deviation:.{digits}f}" if sd and cell.n > 1 else "")

    def line(name: str, subsets: tuple[str, ...]) -> list[str]:
        cells = [results.summary(metric, subsets=subsets, targets=target) for target in results.targets]
        counts = [str(cell.n) for cell in cells]
        over_all = [results.summary(metric, subsets=subsets)] if several else []
        return [name, *map(number, cells + over_all), counts[0] if len(set(counts)) == 1 else "/".join(counts)]

    lines = [line(name, subsets) for name, subsets in results.groups(by).items()]
    if len(results.subsets) > 1:
        lines.append(line("all subsets", results.subsets))
    return [[_FIRST_COLUMN[by], *results.targets, *(["mean"] if several else []), "n"], *lines]


def caption(results: SubsetResults, metric: str, sd: bool) -> str:
    """Metric, unit and the conventions behind it."""
    convention = results.conventions[metric]
    statuses = Counter(row.status for row in results.rows if row.metric == metric)
    both = "skipped" if convention.both_empty is None else f"{convention.both_empty:g}"
    text = (
        f"{title(results, metric)}, {'mean ± sd (ddof = 1)' if sd else 'mean'} over samples. "
        f"Both masks empty: {both}; exactly one empty: {convention.one_empty:g}"
    )
    if metric.endswith(DIFFERENCE):
        unpaired = f" Without a partner: {statuses['unpaired']} of {statuses.total()} values."
        return f"{text}.{unpaired if statuses['unpaired'] else ''}"
    total = sum(statuses.values()) - statuses["missing"]
    text += f" ({statuses['both empty']} and {statuses['one empty']} of {total} values)."
    if skipped := sum(results.skipped.values()):
        pairs = len(results.subsets) * len(results.samples)
        text += f" Left out because the sample lacks a modality: {skipped} of {pairs} pairs of subset and sample."
    return text


def title(results: SubsetResults, metric: str) -> str:
    """Name of a metric with the unit in which it is shown."""
    name = metric.removesuffix(DIFFERENCE)
    shown = {"dice": "Dice", "hd95": "HD95"}.get(name, name)
    unit, is_difference = results.conventions[metric].unit, metric != name
    if unit == "fraction":
        unit = "percentage points" if is_difference else "%"
    return f"Difference in {shown} ({unit}, paired)" if is_difference else f"{shown} ({unit})"


def in_shown_unit(results: SubsetResults, metric: str, value: float) -> float:
    """Return a value in the unit of :func:`title`: fractions in percent."""
    return 100.0 * value if results.conventions[metric].unit == "fraction" else value

"""Results of an evaluation: selection, averages, comparison."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from passion_plugin.errors import ConfigError, raise_problems, suggest
from passion_plugin.evaluation import _tables as report
from passion_plugin.evaluation._rows import DIFFERENCE, Convention, Grouping, Row, Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SubsetResults"]


@dataclass(frozen=True, repr=False)
class SubsetResults:
    """Scores of a model on subsets of its modalities.

    Attributes:
        modalities: names in mask order.
        rows: one per subset, sample, metric and target, in a fixed order.
        conventions: metric -> how it was computed.

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
        problems = []
        if not self.rows:
            problems.append("there are no rows.")
        repeated = [key for key, count in Counter(row[:4] for row in self.rows).items() if count > 1]
        if repeated:
            problems.append(f"rows come more than once, the first is {repeated[0]}.")
        members = {name for row in self.rows for name in row.subset.split("+")}
        problems += [
            f"unknown modality {name!r} in a subset.{suggest(name, self.modalities)}"
            for name in sorted(members - set(self.modalities))
        ]
        problems += [
            f"metric {name!r} has no convention."
            for name in sorted({row.metric for row in self.rows} - set(self.conventions))
        ]
        raise_problems(problems, what="SubsetResults", error=ConfigError)

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
        return tuple(dict.fromkeys(row.subset for row in self.rows))

    @cached_property
    def samples(self) -> tuple[str, ...]:
        """Sample ids, in order."""
        return tuple(dict.fromkeys(row.sample for row in self.rows))

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Classes or regions, in order."""
        return tuple(dict.fromkeys(row.target for row in self.rows))

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in order."""
        return tuple(dict.fromkeys(row.metric for row in self.rows))

    @cached_property
    def skipped(self) -> dict[str, int]:
        """Per subset, the samples left out because they lack one of its modalities."""
        lacking = {(row.subset, row.sample) for row in self.rows if row.status == "missing"}
        return {name: sum(subset == name for subset, _ in lacking) for name in self.subsets}

    def summary(
        self,
        metric: str | None = None,
        *,
        subsets: str | Iterable[str] | None = None,
        targets: str | Iterable[str] | None = None,
    ) -> Summary:
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
            for subset in self._pick("subset", subsets, self.subsets)
            for target in self._pick("target", targets, self.targets)
        ]
        means = [statistics.fmean(cell.values()) for cell in cells if cell]
        by_sample: dict[str, list[float]] = {}
        for cell in cells:
            for sample, value in cell.items():
                by_sample.setdefault(sample, []).append(value)
        averages = [statistics.fmean(values) for values in by_sample.values()]
        return Summary(
            mean=statistics.fmean(means) if means else float("nan"),
            sd=statistics.stdev(averages) if len(averages) > 1 else float("nan"),
            n=len(averages),
        )

    def mean(
        self,
        metric: str | None = None,
        *,
        subsets: str | Iterable[str] | None = None,
        targets: str | Iterable[str] | None = None,
    ) -> float:
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
        members = {name: name.split("+") for name in self.subsets}
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

    def table(self, by: Grouping = "subset", metric: str | None = None) -> dict[str, dict[str, Summary]]:
        """Summaries per group and target.

        Args:
            by: see :meth:`groups`.
            metric: its name; None takes the first.

        Returns:
            Group name -> target -> summary.
        """
        return {
            name: {target: self.summary(metric, subsets=group, targets=target) for target in self.targets}
            for name, group in self.groups(by).items()
        }

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
            if row.metric not in shared:
                continue
            other = others.get(row[:4])
            value = None if row.value is None or other is None else row.value - other
            status = "unpaired" if value is None else "ok"
            rows.append(row._replace(metric=row.metric + DIFFERENCE, value=value, status=status))
        conventions = {name + DIFFERENCE: self.conventions[name] for name in shared}
        return SubsetResults(self.modalities, tuple(rows), conventions)

    def to_markdown(
        self,
        by: Grouping = "subset",
        metric: str | None = None,
        *,
        digits: int = 2,
        sd: bool = True,
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
        return report.markdown(self, by, self.metric_name(metric), digits=digits, sd=sd)

    def metric_name(self, metric: str | None = None) -> str:
        """Return the name of a metric that is there; None gives the first.

        Raises:
            ConfigError: it does not exist.
        """
        return self._pick("metric", metric, self.metrics)[0]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write all rows with their conventions, numbers in full, one ``has_`` column per modality."""
        report.write_csv(self, path)

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> SubsetResults:
        """Read what :meth:`to_csv` wrote; the result equals the original.

        Raises:
            ConfigError: the file has other columns or a field that cannot be read.
        """
        return cls(*report.read_csv(path))

    def plot(self, path: str | os.PathLike[str] | None = None, *, metric: str | None = None) -> Figure:
        """Heat map of the means, subsets by targets.

        Args:
            path: where to save it; the ending decides the format.
            metric: its name; None takes the first.

        Returns:
            A matplotlib figure that no global state knows of.

        Raises:
            ImportError: matplotlib is not installed (the ``plot`` extra).
        """
        from passion_plugin.report import plot_subsets

        figure = plot_subsets(self, metric=metric)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    @cached_property
    def _cells(self) -> dict[tuple[str, str, str], dict[str, float]]:
        """Values by (metric, subset, target), then by sample."""
        cells: dict[tuple[str, str, str], dict[str, float]] = {}
        for row in self.rows:
            if row.value is not None:
                cells.setdefault((row.metric, row.subset, row.target), {})[row.sample] = row.value
        return cells

    def _pick(self, kind: str, wanted: str | Iterable[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
        if wanted is None:
            return known
        names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        problems = [f"no {kind} {name!r}.{suggest(name, known)}" for name in names if name not in known]
        raise_problems(problems, what="SubsetResults", error=ConfigError)
        return names

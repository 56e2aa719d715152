"""Heat maps: a number in every cell, and its colour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from passion_plugin.errors import ConfigError, raise_problems
from passion_plugin.evaluation import DIFFERENCE, in_shown_unit, title
from passion_plugin.report._canvas import literal, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from passion_plugin.evaluation import SubsetResults

__all__ = ["draw_grid", "plot_subsets", "tilt_columns"]


def plot_subsets(results: SubsetResults | Mapping[str, SubsetResults], *, metric: str | None = None) -> Figure:
    """Draw the mean of a metric over samples by subset of modalities.

    Args:
        results: of one model: subsets by targets. Or of several, by name (strategies, runs): names by subsets, each
            cell the mean over the targets; a subset that a model was not evaluated on stays blank.
        metric: its name; None takes the first.

    Returns:
        The figure; Dice in percent, HD95 in its unit. Differences, as ``compare`` gives them, are coloured around
        zero, and blue is better.

    Raises:
        ConfigError: no results, or results of several models that cannot be told apart by one scale: the metric is
            missing in some, or was computed under other conventions.
        ImportError: matplotlib is not installed (the ``plot`` extra).
    """
    if isinstance(results, Mapping):
        return _runs_by_subsets(results, metric)
    metric = results.metric_name(metric)
    values = [
        [
            in_shown_unit(results, metric, results.mean(metric, subsets=subset, targets=target))
            for target in results.targets
        ]
        for subset in results.subsets
    ]
    size = (1.8 + _inches(results.subsets) + 0.9 * len(results.targets), 1.0 + 0.32 * len(results.subsets))
    figure = new_figure(figsize=size)
    axes = figure.subplots()
    image = draw_grid(axes, values, rows=results.subsets, columns=results.targets, **_look(results, metric))
    axes.set_title(literal(title(results, metric)).replace(" in ", "\nin "), fontsize=10)
    axes.set_ylabel("modalities shown")
    figure.colorbar(image, ax=axes)
    return figure


def draw_grid(
    axes: Any,
    values: ArrayLike,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    form: str = ".1f",
    limits: tuple[float, float] | None = None,
    cmap: str = "viridis",
    fontsize: float = 8,
) -> Any:
    """Draw a table of numbers into the axes of a figure.

    Args:
        axes: matplotlib axes.
        values: (R, C); what is not finite stays blank.
        rows: R names.
        columns: C names.
        form: how the numbers are written; with a sign (``"+.1f"``) the colours are centred at zero.
        limits: values of the first and the last colour; None takes those that occur.
        cmap: a matplotlib colour map.
        fontsize: of the numbers.

    Returns:
        The image, for a colour bar.
    """
    grid = np.asarray(values, dtype=float)
    known = grid[np.isfinite(grid)] if np.isfinite(grid).any() else np.zeros(1)
    if limits is None:
        adapter = float(np.abs(known).max()) or 1.0
        limits = (-adapter, adapter) if form.startswith("+") else (float(known.min()), float(known.max()))
    image = axes.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap=cmap, vmin=limits[0], vmax=limits[1])
    colours = image.to_rgba(grid)
    for (i, j), value in np.ndenumerate(grid):
        if np.isfinite(value):
            # Black or white, whichever stands out from the colour.
            dark = colours[i, j, :3] @ (0.3, 0.6, 0.1) < 0.5
            colour = "white" if dark else "black"
            axes.text(j, i, f"{value:{form}}", ha="center", va="center", fontsize=fontsize, color=colour)
    axes.set_xticks(range(len(columns)), [literal(name) for name in columns])
    axes.set_yticks(range(len(rows)), [literal(name) for name in rows])
    return image


def tilt_columns(axes: Any) -> None:
    """Turn the names of the columns, where they are longer than a column is wide."""
    for name in axes.get_xticklabels():
        name.set(rotation=45, ha="right", rotation_mode="anchor")


def _runs_by_subsets(runs: Mapping[str, SubsetResults], metric: str | None) -> Figure:
    if not runs:
        raise ConfigError("plot_subsets: there are no results; pass at least one, by name")
    first_name, first = next(iter(runs.items()))
    metric = first.metric_name(metric)
    problems = [
        f"{name!r} has no {metric!r}, only {each.metrics}" for name, each in runs.items() if metric not in each.metrics
    ]
    problems += [
        f"{name!r} was computed under other conventions than {first_name!r}: {each.conventions[metric]} and "
        f"{first.conventions[metric]}; evaluate both alike"
        for name, each in runs.items()
        if metric in each.metrics and each.conventions[metric] != first.conventions[metric]
    ]
    problems += [
        f"{name!r} has targets {each.targets} and {first_name!r} has {first.targets}: their means are not comparable"
        for name, each in runs.items()
        if set(each.targets) != set(first.targets)
    ]
    raise_problems(problems, what="plot_subsets", error=ConfigError)

    subsets = list(dict.fromkeys(subset for each in runs.values() for subset in each.subsets))
    values = [
        [
            in_shown_unit(each, metric, each.mean(metric, subsets=subset)) if subset in each.subsets else np.nan
            for subset in subsets
        ]
        for each in runs.values()
    ]
    # Names at 45 degrees are seven tenths as high as they are long.
    size = (1.8 + _inches(runs) + 0.55 * len(subsets), 1.2 + 0.7 * _inches(subsets) + 0.32 * len(runs))
    figure = new_figure(figsize=size)
    axes = figure.subplots()
    image = draw_grid(axes, values, rows=list(runs), columns=subsets, **_look(first, metric))
    tilt_columns(axes)
    over = f", mean over {', '.join(first.targets)}" if len(first.targets) > 1 else ""
    axes.set_title(literal(title(first, metric) + over), fontsize=10)
    axes.set_xlabel("modalities shown")
    figure.colorbar(image, ax=axes)
    return figure


def _inches(names: Iterable[str]) -> float:
    """About how long the longest name is, as it is printed beside an axis."""
    return 0.085 * max(map(len, names))


def _look(results: SubsetResults, metric: str) -> dict[str, Any]:
    """How a metric is coloured and written."""
    if not metric.endswith(DIFFERENCE):
        return {}
    # Blue is better: more Dice, less distance.
    return {"form": "+.1f", "cmap": "RdBu" if results.conventions[metric].unit == "fraction" else "RdBu_r"}

"""Curves over the epochs, heat maps of results, and a case with its predictions."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import reduce
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from passion_plugin.data import parse_subset
from passion_plugin.errors import ConfigError, InputError, raise_problems, require
from passion_plugin.evaluation import DIFFERENCE, SubsetResults, title
from passion_plugin.training import EpochReport, by_modality, epoch_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours of Okabe and Ito, which colour-blind readers can tell apart as well."""

# Label of the axis, title, and the value that favours no modality. None of them has a unit: distances are between
# cosine similarities, the others are ratios and weights.
_CURVES: dict[str, tuple[str, str, float | None]] = {
    "relative_preference": ("relative preference (no unit)", "below 0: lags behind the average", 0.0),
    "beta": ("beta (no unit)", "weight from that epoch on", 1.0),
    "epoch_distance": ("mean prototype distance (no unit)", "distance to the fused prediction", None),
}


def new_figure(**options: Any) -> Figure:
    """Return an empty figure made without pyplot; ``options`` are those of matplotlib's ``Figure``.

    Raises:
        ImportError: matplotlib is not installed (the ``plot`` extra).
    """
    module = require("matplotlib.figure", extra="plot", purpose="A picture")
    figure: Figure = module.Figure(layout="constrained", **options)
    return figure


def plot_preference(
    history: Iterable[EpochReport | Mapping[str, Any]], *, missing_rates: Mapping[str, float] | None = None
) -> Figure:
    """Draw relative preference and beta over the epochs, a curve for each modality.

    Args:
        history: what ``end_epoch()`` returned, or ``metrics()`` as it was logged: several records of an epoch count
            once, see :func:`passion_plugin.training.epoch_records`. An epoch in which a modality was not measured is
            a gap in its curve.
        missing_rates: missing rate by modality, for the legend.

    Returns:
        The figure: relative preference, unless no epoch measured one, and beta, the weight from that epoch on.

    Raises:
        InputError: no epoch with a weight in it.
    """
    return _curves("plot_preference", history, ("relative_preference", "beta"), missing_rates or {})


def plot_distances(
    history: Iterable[EpochReport | Mapping[str, Any]], *, missing_rates: Mapping[str, float] | None = None
) -> Figure:
    """Draw the mean prototype distance of each modality to the fused prediction over the epochs.

    Args:
        history: as for :func:`plot_preference`.
        missing_rates: missing rate by modality, for the legend.

    Raises:
        InputError: no epoch with a distance in it: none has ended, or the strategy measures none.
    """
    return _curves("plot_distances", history, ("epoch_distance",), missing_rates or {})


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
        ConfigError: no results, or results of several models that do not fit on one scale: a model lacks the metric,
            has other targets, or was evaluated under other conventions.
    """
    if several := isinstance(results, Mapping):
        if not results:
            raise ConfigError("plot_subsets: there are no results; pass at least one, by name")
        first_name, first = next(iter(results.items()))
        metric = first.metric_name(metric)
        scale = first.conventions[metric]
        problems = [
            f"{name!r} and {first_name!r} do not fit on one scale: {metric!r} has {each.conventions.get(metric)} and "
            f"{scale}, the targets are {each.targets} and {first.targets}; evaluate both alike"
            for name, each in results.items()
            if each.conventions.get(metric) != scale or set(each.targets) != set(first.targets)
        ]
        raise_problems(problems, what="plot_subsets", error=ConfigError)
        rows = tuple(results)
        columns = tuple(dict.fromkeys(subset for each in results.values() for subset in each.subsets))
        cells = [
            [each.mean(metric, subsets=subset) if subset in each.subsets else math.nan for subset in columns]
            for each in results.values()
        ]
    else:
        first, metric = results, results.metric_name(metric)
        rows, columns = first.subsets, first.targets
        cells = [[first.mean(metric, subsets=subset, targets=target) for target in columns] for subset in rows]

    fraction = first.conventions[metric].unit == "fraction"
    # Blue is better: more Dice, less distance.
    signed = {"form": "+.1f", "cmap": "RdBu" if fraction else "RdBu_r"}
    look: Any = signed if metric.endswith(DIFFERENCE) else {}
    # The longest name of a line and, at 45 degrees, of a column take their room beside the grid.
    width = 1.8 + 0.085 * max(map(len, rows)) + (0.55 if several else 0.9) * len(columns)
    height = 1.0 + 0.32 * len(rows) + (0.2 + 0.06 * max(map(len, columns)) if several else 0)
    figure = new_figure(figsize=(width, height))
    axes = figure.subplots()
    values = np.array(cells) * (100 if fraction else 1)
    image = draw_grid(axes, values, rows=rows, columns=columns, tilt=several, **look)
    over = f", mean over {', '.join(first.targets)}" if several and len(first.targets) > 1 else ""
    axes.set_title(title(first, metric).replace(" in ", "\nin ") + over, fontsize=10)
    (axes.set_xlabel if several else axes.set_ylabel)("available modalities")
    figure.colorbar(image, ax=axes)
    return figure


def plot_overlay(
    image: Tensor | NDArray[Any],
    label: Tensor | NDArray[Any] | None,
    predictions: Mapping[str, Tensor | NDArray[Any]],
    *,
    modalities: Sequence[str],
    classes: Sequence[str] = (),
) -> Figure:
    """Draw what a model predicts for one case from some of its modalities.

    Args:
        image: (M, *spatial) real, 2-D or 3-D; of a volume the slice of the first spatial axis with most labelled
            voxels is shown, or the middle one where nothing is labelled.
        label: (*spatial) integers, the truth; 0 and negative values (to be ignored) are transparent. None when it is
            unknown: then the predictions choose the slice.
        predictions: labels (*spatial) integers by the name of the subset that the model saw, such as ``"flair+t1"``.
            Each is drawn over the first modality of its subset. Turn regions that overlap into labels first.
        modalities: M names, in the order of the channels.
        classes: names of the labels from 0 on, for the legend; ``class k`` where there is none.

    Returns:
        The figure: a panel for the truth and one for each prediction.

    Raises:
        InputError: shapes that do not belong together, or labels that are no integers.
        ConfigError: a name is not that of a subset of ``modalities``.
    """
    if not predictions:
        raise InputError("plot_overlay: there are no predictions; pass one for each subset")
    picture = torch.as_tensor(image).detach().cpu()
    given = predictions if label is None else {"truth": label, **predictions}
    panels = {name: torch.as_tensor(each).detach().cpu() for name, each in given.items()}
    _check(picture, panels, modalities)
    channels = [] if label is None else [0]
    channels += [list(modalities).index(parse_subset(name, modalities)[0]) for name in predictions]

    if picture.ndim == 4:
        z = best_slice(panels["truth"] if label is not None else torch.stack(list(panels.values())).amax(0))
        picture, panels = picture[:, z], {name: each[z] for name, each in panels.items()}
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    height, width = picture.shape[-2:]
    # As high as the picture is, so that panels of flat slices are not lost in white.
    size = 1.9 * min(max(height / width, 0.4), 2.5)
    figure = new_figure(figsize=(max(1.9 * columns, 4.0), (size + 0.25) * rows + 0.4))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, labels), channel in zip(grid, panels.items(), channels, strict=False):
        draw_case(axes, picture[channel], labels)
        # In lines that are no longer than a panel is wide.
        axes.set_title(textwrap.fill(name.replace("+", "+ "), 28).replace("+ ", "+"), fontsize=8)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    found = sorted({int(k) for each in panels.values() for k in each.unique() if k > 0})
    if found:
        label_legend(figure, {k: classes[k] if k < len(classes) else f"class {k}" for k in found})
    return figure


def draw_grid(
    axes: Any,
    values: ArrayLike,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    form: str = ".1f",
    tilt: bool = False,
    fontsize: float = 8,
    **options: Any,
) -> Any:
    """Draw a table of numbers as a heat map.

    Args:
        axes: matplotlib axes.
        values: (R, C); what is not finite stays blank.
        rows: R names.
        columns: C names.
        form: format of the numbers; with a sign (``"+.1f"``) the colours are centred at zero, and blue is above.
        tilt: turn the names of the columns, for names that are longer than a column is wide.
        fontsize: of the numbers.
        **options: of ``imshow``, such as ``cmap``, ``vmin`` and ``vmax``.

    Returns:
        The image, for a colour bar.
    """
    grid = np.ma.masked_invalid(np.asarray(values, dtype=float))
    cells = dict(np.ma.ndenumerate(grid))  # Without what is masked.
    if form.startswith("+"):
        largest = max(map(abs, cells.values()), default=0) or 1.0
        options = {"cmap": "RdBu", "vmin": -largest, "vmax": largest, **options}
    image = axes.imshow(grid, aspect="auto", **options)
    colours = image.to_rgba(grid)
    for (i, j), value in cells.items():
        # Black or white, whichever stands out from the colour.
        colour = "white" if colours[i, j, :3] @ (0.3, 0.6, 0.1) < 0.5 else "black"
        axes.text(j, i, f"{value:{form}}", ha="center", va="center", fontsize=fontsize, color=colour)
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if tilt else {}
    axes.set_xticks(range(len(columns)), columns, **turned)
    axes.set_yticks(range(len(rows)), rows)
    return image


def best_slice(label: Tensor) -> int:
    """Return the index along the first axis with most labelled voxels; the middle where none is labelled."""
    counts = reduce((label > 0).long(), "d ... -> d", "sum")
    return int(counts.argmax()) if bool(counts.any()) else len(label) // 2


def draw_case(axes: Any, image: Tensor, label: Tensor | None) -> None:
    """Draw a slice (H, W) in grey and its labels (H, W), if there are any, in colours.

    Values of exactly 0, outside the body, are as dark as the darkest pixel. Labels of 0 and below are transparent.
    """
    image = image.float()
    axes.imshow(torch.where(image == 0, image.min(), image).numpy(), cmap="gray")
    if label is not None:
        axes.imshow(_painted(label), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def label_legend(figure: Figure, classes: Mapping[int, str]) -> None:
    """Add a legend with colour and name of each label, by number; 0 has no colour."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=(COLOURS[k % len(COLOURS)], 0.6)) for k in classes if k]
    names = [name for k, name in classes.items() if k]
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(handles), 4), fontsize=8)


def _curves(
    what: str,
    history: Iterable[EpochReport | Mapping[str, Any]],
    quantities: Sequence[str],
    missing_rates: Mapping[str, float],
) -> Figure:
    records = epoch_records(history)
    drawn = [quantity for quantity in quantities if any(by_modality(record, quantity) for record in records)]
    if not drawn:
        wanted = " or ".join(f"'{quantity}/…'" for quantity in quantities)
        raise InputError(
            f"{what}: none of {len(records)} epochs in the history has {wanted}; pass what end_epoch() returned, or "
            "metrics() of a strategy that has it, logged after the first epoch has ended"
        )
    names = list(dict.fromkeys(name for q in drawn for record in records for name in by_modality(record, q)))
    epochs = [record["epoch"] for record in records]
    # Curves of few epochs have points: a single epoch, or one between two gaps, is no line.
    marker = "o" if len(epochs) <= 30 else ""
    figure = new_figure(figsize=(4 * len(drawn), 3.2) if len(drawn) > 1 else (5.5, 3.4))
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, quantity in zip(panels, drawn, strict=True):
        label, heading, even = _CURVES[quantity]
        if even is not None:
            axes.axhline(even, color="0.6", linewidth=0.8)
        for k, name in enumerate(names):
            values = [by_modality(record, quantity).get(name, math.nan) for record in records]
            # Other dashes where the colours come round again.
            style = ("-", "--", ":", "-.")[k // len(COLOURS) % 4] + marker
            axes.plot(epochs, values, style, color=COLOURS[k % len(COLOURS)], label=name, markersize=3)
        axes.set(xlabel="epoch", ylabel=label)
        axes.set_title(heading, fontsize=10)
        axes.xaxis.get_major_locator().set_params(integer=True)
    rates = {name: f" (missing in {missing_rates[name]:.0%})" for name in names if name in missing_rates}
    lines = panels[0].get_lines()[-len(names) :]
    texts = [name + rates.get(name, "") for name in names]
    figure.legend(lines, texts, loc="outside lower center", ncols=min(len(names), 2 * len(drawn)), fontsize=8)
    return figure


def _painted(label: Tensor) -> NDArray[Any]:
    """Return labels (H, W) as an RGBA picture (H, W, 4)."""
    from matplotlib.colors import to_rgba

    table = np.array([to_rgba(colour, 0.6) for colour in COLOURS])
    numbers = label.long().numpy()
    return np.where(numbers[..., None] > 0, table[numbers % len(COLOURS)], 0.0)


def _check(image: Tensor, panels: Mapping[str, Tensor], modalities: Sequence[str]) -> None:
    problems = []
    if image.ndim not in (3, 4) or image.is_complex():
        problems.append(f"image is {image.dtype} {tuple(image.shape)}; pass (M, H, W) or (M, D, H, W) real numbers")
    elif len(image) != len(modalities):
        problems.append(f"image has {len(image)} channels, modalities are {len(modalities)}: {tuple(modalities)}")
    problems += [
        f"{name!r} is {each.dtype} {tuple(each.shape)}; pass integer labels of shape {tuple(image.shape[1:])}, such as "
        "logits.argmax(0)"
        for name, each in panels.items()
        if each.shape != image.shape[1:] or each.is_floating_point() or each.is_complex()
    ]
    raise_problems(problems, what="plot_overlay", error=InputError)

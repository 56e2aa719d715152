"""What every epoch said about the modalities, as curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from passion_plugin.errors import InputError
from passion_plugin.report._canvas import line_style, literal, new_figure
from passion_plugin.training import EpochReport, by_modality, epoch_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_distances", "plot_preference"]


class _Quantity(NamedTuple):
    """A quantity of an epoch: how it is called, what it says, and the value that says nothing."""

    label: str
    title: str
    default_factor: float | None


# None of them has a unit: distances are between cosine similarities, the others are ratios and weights.
_QUANTITIES = {
    "relative_preference": _Quantity("relative preference (no unit)", "below 0: lags behind the average", 0.0),
    "beta": _Quantity("beta (no unit)", "weight from that epoch on", 1.0),
    "epoch_distance": _Quantity("mean prototype distance (no unit)", "distance to the fused prediction", None),
}


def plot_preference(
    history: Iterable[EpochReport | Mapping[str, Any]], *, missing_rates: Mapping[str, float] | None = None
) -> Figure:
    """Draw relative preference and beta over the epochs, a curve for each modality.

    Args:
        history: what ``end_epoch()`` returned, or ``metrics()`` as it was logged: several records of an epoch count
            once, see :func:`passion_plugin.logged.epoch_records`. An epoch in which a modality was not measured is
            a gap in its curve.
        missing_rates: missing rate by modality, told in the legend.

    Returns:
        The figure. Its axes are the relative preference, unless no epoch measured one, and beta. Beta is the weight
        from the end of the epoch on.

    Raises:
        InputError: no epoch with a weight in it.
        ImportError: matplotlib is not installed (the ``plot`` extra).
    """
    return _curves(history, ("relative_preference", "beta"), missing_rates, what="plot_preference")


def plot_distances(
    history: Iterable[EpochReport | Mapping[str, Any]], *, missing_rates: Mapping[str, float] | None = None
) -> Figure:
    """Draw the mean prototype distance of each modality to the fused prediction over the epochs.

    Args:
        history: as in :func:`plot_preference`.
        missing_rates: missing rate by modality, told in the legend.

    Returns:
        The figure, with one axes.

    Raises:
        InputError: no epoch with a distance in it: none has ended, or the strategy measures none.
        ImportError: matplotlib is not installed (the ``plot`` extra).
    """
    return _curves(history, ("epoch_distance",), missing_rates, what="plot_distances")


def _curves(
    history: Iterable[EpochReport | Mapping[str, Any]],
    quantities: Sequence[str],
    missing_rates: Mapping[str, float] | None,
    *,
    what: str,
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
    figure = new_figure(figsize=(4 * len(drawn), 3.2) if len(drawn) > 1 else (5.5, 3.4))
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, quantity in zip(panels, drawn, strict=True):
        about = _QUANTITIES[quantity]
        if about.default_factor is not None:
            axes.axhline(about.default_factor, color="0.6", linewidth=0.8)
        for k, name in enumerate(names):
            values = [by_modality(record, quantity).get(name, math.nan) for record in records]
            # Points, where there are few: a single epoch, or one between two gaps, is no line.
            axes.plot(
                epochs, values, label=name, marker="o" if len(epochs) <= 30 else "", markersize=3, **line_style(k)
            )
        axes.set(xlabel="epoch", ylabel=about.label)
        axes.set_title(about.title, fontsize=10)
        axes.xaxis.get_major_locator().set_params(integer=True)
    rates = missing_rates or {}
    texts = [literal(name) + (f" (missing in {rates[name]:.0%})" if name in rates else "") for name in names]
    lines = panels[0].get_lines()[-len(names) :]
    figure.legend(lines, texts, loc="outside lower center", ncols=min(len(names), 2 * len(drawn)), fontsize=8)
    return figure

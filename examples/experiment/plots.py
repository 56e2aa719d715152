"""Pictures of an experiment; every one carries the credit of its data."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from examples import figures
from examples.backbones import BACKBONES
from examples.data import Cohort
from examples.experiment.cells import Cell
from examples.experiment.comparison import Comparison, rarest
from examples.experiment.stats import by_patient, patient_means
from examples.experiment.store import Store
from examples.experiment.views import predict_whole
from passion_plugin.report import COLOURS, best_slice, draw_case, draw_grid, label_legend, new_figure

__all__ = ["PLOTS", "overlays"]


def gain_by_rate(of: Comparison, path: Path) -> None:
    """Gain on every modality alone against its missing rate, with 95 % intervals over patients."""
    figure = new_figure(figsize=(4.2 * len(of.groups), 3.4))
    rows = figure.subplots(1, len(of.groups), sharey=True, squeeze=False)[0]
    for axes, group in zip(rows, of.groups, strict=True):
        for m, name in enumerate(of.study.modalities):
            rates = sorted({cell.rates[name] for cell in of.cells})
            found = {}
            for rate in rates:
                chosen = of.within(
                    group,
                    lambda cell, subset, target, name=name, rate=rate: subset == name and cell.rates[name] == rate,
                )
                gain = by_patient(of.scores().difference(of.focus, of.baseline, chosen))
                if gain.units:
                    found[rate] = gain
            mean, low, high = (100 * np.array([gain[i] for gain in found.values()]) for i in range(3))
            # Beside each other, where several modalities share a rate.
            at = np.array(list(found)) + 0.008 * (m - (len(of.study.modalities) - 1) / 2)
            # Where all patients gain alike, rounding may put a bound on the other side of the mean.
            bars = np.maximum([mean - low, high - mean], 0)
            axes.errorbar(at, mean, bars, marker="o", capsize=3, color=COLOURS[m], label=name)
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set(xlabel="missing rate in training", title=of.label(group))
    rows[0].set_ylabel(f"Dice, {of.focus} − {of.baseline} (points)")
    rows[0].legend(title="modality alone", fontsize=8)
    figures.foot(figure, of.study.credit)
    figure.savefig(path, dpi=110)


def heat_map(of: Comparison, path: Path) -> None:
    """Dice by subset and strategy, one panel for each network, of strategies that were run as often as any."""
    present = {
        group: [name for name in of.fully_run(group) if of.scores().level(name, of.within(group))]
        for group in of.groups
    }
    # Where every training of a network failed there is nothing to show.
    present = {group: names for group, names in present.items() if names}
    heights = [len(names) + 2 for names in present.values()]
    figure = new_figure(figsize=(3.5 + 0.5 * len(of.subsets), 1 + 0.24 * sum(heights)))
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (group, names) in zip(panels, present.items(), strict=True):
        grid = np.array([[100 * _level(of, group, subset, name) for subset in of.subsets] for name in names])
        # The hyper-parameters of a strategy get a line of their own.
        rows = [name.replace(":", ":\n") for name in names]
        draw_grid(axes, grid, rows=rows, columns=of.subsets, form=".0f", fontsize=7, tilt=True)
        axes.tick_params(axis="y", labelsize=7)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_title(f"{of.label(group)}, Dice (%)", fontsize=9)
    figures.foot(figure, of.study.credit)
    figure.savefig(path, dpi=110)


def preference(of: Comparison, path: Path) -> None:
    """Relative preference and beta of the focus by epoch, mean over trainings, by modality and missing rate."""
    figure = new_figure(figsize=(9, 3 * len(of.groups)))
    for line, group in zip(figure.subplots(len(of.groups), 2, squeeze=False), of.groups, strict=True):
        curves: dict[tuple[int, float], list[list[list[float]]]] = {}
        for cell, record in zip(of.cells, of.records, strict=True):
            if (cell.backbone, cell.batch_size) == group and cell.strategy == of.focus and record["history"]:
                epochs, *columns = map(list, zip(*record["history"], strict=True))
                for m, name in enumerate(of.study.modalities):
                    pair = [epochs, columns[m], columns[m + len(of.study.modalities)]]
                    curves.setdefault((m, cell.rates[name]), []).append(pair)
        rates = sorted({rate for _, rate in curves})
        for (m, rate), found in sorted(curves.items()):
            # Modalities by colour; the rarer, the more broken the line.
            style = {"color": COLOURS[m % len(COLOURS)], "linestyle": ("-", "--", "-.", ":")[rates.index(rate) % 4]}
            for axes, what in ((line[1], 1), (line[0], 2)):
                # Folds of different sizes have epochs of different lengths.
                values = np.array([np.interp(found[0][0], each[0], each[what]) for each in found])
                label = f"{of.study.modalities[m]}, missing in {rate:.0%}"
                axes.plot(found[0][0], values.mean(0), label=label, **style)
        for axes, what, neutral in ((line[0], "relative preference", 0), (line[1], "beta", 1)):
            axes.axhline(neutral, color="0.6", linewidth=0.8)
            axes.set(xlabel="epoch", ylabel=what, title=f"{of.label(group)}, {of.focus}")
        if curves:
            line[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figures.foot(figure, of.study.credit)
    figure.savefig(path, dpi=110)


PLOTS: Mapping[str, Callable[[Comparison, Path], None]] = {
    "gain": gain_by_rate,
    "heatmap": heat_map,
    "preference": preference,
}
"""Pictures that need the scores alone, by name."""


def overlays(of: Comparison, store: Store, cohort_of: Callable[[int], Cohort], path: Path) -> bool:
    """The patients that gain least and most with the focus, from the rarest modality alone and from all of them.

    Patients are chosen by their gain on the rarest modality alone, mean over all trainings of the first network, among
    those tested in a fold whose weights are at hand; shown is one training.

    Args:
        of: the experiment.
        store: its folder, with trained weights.
        cohort_of: the cohort of a fold.
        path: of the picture.

    Returns:
        Whether there were weights to predict with; without them nothing is drawn.
    """
    group = of.groups[0]
    samples = of.scores().difference(of.focus, of.baseline, of.within(group, rarest))
    cells = {cell: cell.block for cell in of.cells if store.model_path(cell).is_file()}
    pairs = {
        cell.fold: (other, cell)
        for cell in cells
        for other in cells
        if cell.strategy == of.focus and other.strategy == of.baseline
        if cell.block == other.block and (cell.backbone, cell.batch_size) == group
    }
    folds = {sample.patient: sample.fold for sample in samples if sample.fold in pairs}
    changes = {patient: change for patient, change in patient_means(samples).items() if patient in folds}
    if not changes:
        return False
    chosen = {"least": min(changes, key=lambda p: changes[p]), "most": max(changes, key=lambda p: changes[p])}
    columns = ["image", "truth", of.baseline, of.focus]
    figure = new_figure(figsize=(2.1 * len(columns), 8.4))
    grid = figure.subplots(4, len(columns), squeeze=False)
    for row, (title, patient) in enumerate(chosen.items()):
        pair = pairs[folds[patient]]
        cohort = cohort_of(folds[patient])
        index = [str(name) for name in cohort.test.ids].index(patient)
        item: dict[str, Any] = dict(cohort.test[index])
        rare = max(pair[0].rates, key=lambda name: pair[0].rates[name])
        alone = torch.tensor([name == rare for name in cohort.modalities])
        # Of an image that is a slice already, all is shown.
        shown_part = best_slice(item["label"]) if item["label"].ndim == 3 else ...
        background = item["image"][cohort.modalities.index(rare)][shown_part]
        for line, what, mask in zip(grid[2 * row : 2 * row + 2], (rare, "all"), (alone, alone | True), strict=True):
            labels = [_segmented(of, store, cohort, cell, item["image"], mask) for cell in pair]
            for axes, shown in zip(line, (None, item["label"], *labels), strict=True):
                draw_case(axes, background, None if shown is None else shown[shown_part])
            line[0].set_ylabel(f"{title} ({100 * changes[patient]:+.0f}): {patient}\nfrom {what}", fontsize=8)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(column, fontsize=10)
    label_legend(figure, dict(enumerate(of.study.classes)))
    figures.foot(figure, of.study.credit)
    figure.savefig(path, dpi=90)
    return True


def _segmented(of: Comparison, store: Store, cohort: Cohort, cell: Cell, image: Tensor, mask: Tensor) -> Tensor:
    """Labels (*spatial) that one trained network predicts from some modalities of one patient."""
    model: nn.Module = BACKBONES[cell.backbone](
        cohort.modalities, cohort.num_classes, ndim=of.study.ndim, widths=of.study.widths
    )
    model.load_state_dict(torch.load(store.model_path(cell), map_location="cpu", weights_only=True))
    visible = torch.where(mask.view(-1, *[1] * (image.ndim - 1)), image, torch.zeros(()))
    with torch.no_grad():
        scores = predict_whole((of.study.patch,) * of.study.ndim)(model.eval(), visible[None], mask[None])
    labels: Tensor = scores.argmax(dim=1)[0]
    return labels


def _level(of: Comparison, group: tuple[str, int], subset: str, strategy: str) -> float:
    samples = of.scores().level(strategy, of.within(group, lambda cell, name, target: name == subset))
    means = patient_means(samples)
    return statistics.fmean(means.values()) if means else float("nan")

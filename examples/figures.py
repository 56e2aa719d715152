"""Pictures of the demo that compare two runs: heat maps of subsets, overlays of predictions."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from passion_plugin.data import all_subsets, subset_mask, subset_name
from passion_plugin.evaluation import SubsetResults
from passion_plugin.report import best_slice, draw_case, draw_grid, label_legend, new_figure, plot_overlay

if TYPE_CHECKING:
    from examples.data import Cohort

__all__ = ["all_predictions", "foot", "heat_maps", "overlays"]


def heat_maps(plain: SubsetResults, passion: SubsetResults, path: Path, credit: str = "") -> None:
    """Dice by subset and region: both runs on one scale, and the difference."""
    difference = passion.compare(plain)
    panels = {"plain": plain, "PASSION": passion, "difference": difference}
    figure = new_figure(figsize=(3 + 2.2 * len(panels), 1.4 + 0.3 * len(plain.subsets)))
    values = {
        name: 100 * torch.tensor([[r.mean(subsets=s, targets=t) for t in r.targets] for s in r.subsets])
        for name, r in panels.items()
    }
    largest = max(float(values["difference"].abs().nan_to_num().max()), 1.0)
    for axes, (name, grid) in zip(figure.subplots(1, len(panels), sharey=True), values.items(), strict=True):
        signed = name == "difference"
        look: dict[str, Any] = {"form": ".0f", "vmin": 0, "vmax": 100}
        if signed:
            look = {"form": "+.1f", "vmin": -largest, "vmax": largest}
        draw_grid(axes, grid, rows=plain.subsets, columns=plain.targets, fontsize=7, **look)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_title(f"{name}, Dice {'(points)' if signed else '(%)'}", fontsize=9)
    foot(figure, credit)
    figure.savefig(path, dpi=150)


def overlays(models: Mapping[str, nn.Module], cohort: Cohort, path: Path) -> None:
    """One test patient: a row per single modality and one for all, columns image, truth, predictions."""
    item: dict[str, Any] = dict(cohort.test[0])
    image, label = item["image"], item["label"]
    z = best_slice(label)
    count = len(cohort.modalities)
    masks = [*torch.eye(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)]
    rows = [*cohort.modalities, "all"]
    columns = ["image", "truth", *models]
    figure = new_figure(figsize=(1.9 * len(columns), 2.0 * len(rows)))
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, name, mask in zip(grid, rows, masks, strict=True):
        shown = image[int(mask.nonzero()[0])] if name != "all" else image[0]
        segmentations = [None, label, *(_segment(model, image, mask) for model in models.values())]
        for axes, title, segmentation in zip(line, columns, segmentations, strict=True):
            draw_case(axes, shown[z], None if segmentation is None else segmentation[z])
            if name == rows[0]:
                axes.set_title(title, fontsize=10)
        line[0].set_ylabel(name, fontsize=10)
    label_legend(figure, dict(enumerate(cohort.classes)))
    foot(figure, cohort.credit)
    figure.savefig(path, dpi=120)


def all_predictions(model: nn.Module, cohort: Cohort, path: Path) -> None:
    """The same test patient, predicted from every subset of its modalities."""
    item: dict[str, Any] = dict(cohort.test[0])
    subsets = all_subsets(cohort.modalities)
    predictions = {
        subset_name(subset): _segment(model, item["image"], subset_mask(subset, cohort.modalities))
        for subset in subsets
    }
    figure = plot_overlay(
        item["image"], item["label"], predictions, modalities=cohort.modalities, classes=cohort.classes
    )
    foot(figure, cohort.credit)
    figure.savefig(path, dpi=100)


def _segment(model: nn.Module, image: Tensor, mask: Tensor) -> Tensor:
    """Labels (*spatial) predicted from the modalities in ``mask`` (M,) alone."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        visible = torch.where(mask.view(-1, *[1] * (image.ndim - 1)), image, torch.zeros(()))
        labels: Tensor = model(visible[None], mask[None]).argmax(dim=1)[0]
    model.train(was_training)
    return labels


def foot(figure: Any, credit: str) -> None:
    if credit:
        figure.supxlabel("\n".join(textwrap.wrap(f"Data: {credit}", 110)), fontsize=6)

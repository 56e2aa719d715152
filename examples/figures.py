"""Pictures of the demo: preference curves, heat maps of subsets, overlays of predictions; and what others reuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from passion_plugin import Preference
from passion_plugin.evaluation import SubsetResults

if TYPE_CHECKING:
    from examples.data import Cohort

__all__ = [
    "COLOURS",
    "foot",
    "heat_maps",
    "label_legend",
    "new_figure",
    "on_black",
    "overlays",
    "paint",
    "preference_curves",
]

# Okabe and Ito's colours, told apart by colour-blind readers as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def new_figure(**options: Any) -> Any:
    # Figure without pyplot: no global state, no display.
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def preference_curves(history: Sequence[Preference], missing: Mapping[str, float], path: Path) -> None:
    """Relative preference and beta by epoch, one line per modality."""
    figure = new_figure(figsize=(8, 3.2))
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(history) + 1)
    for m, (name, rate) in enumerate(missing.items()):
        style = {"color": COLOURS[m % len(COLOURS)], "label": f"{name} (missing in {rate:.0%})"}
        left.plot(epochs, [float(entry.relative_preference[m]) for entry in history], **style)
        right.plot(epochs, [float(entry.beta[m]) for entry in history], **style)
    left.axhline(0, color="0.6", linewidth=0.8)
    left.set(xlabel="epoch", ylabel="relative preference", title="below 0: lags behind the average")
    right.axhline(1, color="0.6", linewidth=0.8)
    right.set(xlabel="epoch", ylabel="beta", title="weight of the pixel distillation")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=150)


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
        low, high, colours = (-largest, largest, "RdBu") if signed else (0, 100, "viridis")
        axes.imshow(grid.numpy(), aspect="auto", cmap=colours, vmin=low, vmax=high)
        for i, j in torch.cartesian_prod(torch.arange(grid.shape[0]), torch.arange(grid.shape[1])).tolist():
            value = float(grid[i, j])
            pale = abs(value) < 0.6 * largest if signed else value > 60
            text = f"{value:+.1f}" if signed else f"{value:.0f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color="black" if pale else "white")
        axes.set_xticks(range(len(plain.targets)), plain.targets)
        axes.set_yticks(range(len(plain.subsets)), plain.subsets, fontsize=8)
        axes.set_title(f"{name}, Dice {'(points)' if signed else '(%)'}", fontsize=9)
    foot(figure, credit)
    figure.savefig(path, dpi=150)


def overlays(models: Mapping[str, nn.Module], cohort: Cohort, path: Path) -> None:
    """One test patient: a row per single modality and one for all, columns image, truth, predictions."""
    item: dict[str, Any] = dict(cohort.test[0])
    image, label = item["image"], item["label"]
    z = int(label.flatten(1).gt(0).sum(dim=1).argmax())
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
            axes.imshow(on_black(shown[z]), cmap="gray")
            if segmentation is not None:
                axes.imshow(paint(segmentation[z], cohort.num_classes), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if name == rows[0]:
                axes.set_title(title, fontsize=10)
        line[0].set_ylabel(name, fontsize=10)
    label_legend(figure, cohort.classes)
    foot(figure, cohort.credit)
    figure.savefig(path, dpi=120)


def _segment(model: nn.Module, image: Tensor, mask: Tensor) -> Tensor:
    """Labels (*spatial) predicted from the modalities in ``mask`` (M,) alone."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        visible = torch.where(mask.view(-1, *[1] * (image.ndim - 1)), image, torch.zeros(()))
        labels: Tensor = model(visible[None], mask[None]).argmax(dim=1)[0]
    model.train(was_training)
    return labels


def on_black(image: Tensor) -> Any:
    """A slice (y, x) in which what is exactly 0, outside the body, is as dark as the darkest voxel."""
    return torch.where(image == 0, image.min(), image).numpy()


def paint(label: Tensor, num_classes: int) -> Any:
    """RGBA picture (y, x, 4) of labels (y, x); the background is transparent."""
    from matplotlib.colors import to_rgba

    table = torch.tensor([(0.0,) * 4, *(to_rgba(_label_colour(k), 0.6) for k in range(1, num_classes))])
    return table[label].numpy()


def _label_colour(label: int) -> str:
    return COLOURS[label % len(COLOURS)]


def label_legend(figure: Any, classes: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=_label_colour(k), label=name) for k, name in enumerate(classes) if k]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8)


def foot(figure: Any, credit: str) -> None:
    if credit:
        import textwrap

        figure.supxlabel("\n".join(textwrap.wrap(f"Data: {credit}", 110)), fontsize=6)

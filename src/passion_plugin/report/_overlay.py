"""One case: an image, and labels painted over it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from passion_plugin.data import parse_subset
from passion_plugin.errors import InputError, PassionError, raise_problems
from passion_plugin.report._canvas import COLOURS, literal, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["best_slice", "draw_case", "label_legend", "on_black", "paint", "plot_overlay"]


def plot_overlay(
    image: Tensor | NDArray[Any],
    label: Tensor | NDArray[Any] | None,
    predictions: Mapping[str, Tensor | NDArray[Any]],
    *,
    modalities: Sequence[str],
    classes: Sequence[str] = (),
) -> Figure:
    """Draw what one case looks like when a model sees some of its modalities only.

    Args:
        image: (M, *spatial) real, 2-D or 3-D; of a volume the slice of the first spatial axis with most labelled
            voxels is shown, or the middle one where nothing is labelled.
        label: (*spatial) integers, the truth; 0 and negative values (to be ignored) are left transparent. None when
            nobody knows it: then the predictions choose the slice.
        predictions: labels (*spatial) integers by the name of the subset that the model saw, such as ``"flair+t1"``.
            Each is drawn over the first modality of its subset. Regions that overlap have to be made labels first.
        modalities: M names, in the order of the channels.
        classes: names of the labels from 0 on, for the legend; ``class k`` where there is none.

    Returns:
        The figure: a panel for the truth and one for each prediction.

    Raises:
        InputError: shapes that do not belong together, labels that are no integers, or an unknown modality.
        ImportError: matplotlib is not installed (the ``plot`` extra).
    """
    picture, segmentations = torch.as_tensor(image).detach().cpu(), {}
    if label is not None:
        segmentations["truth"] = torch.as_tensor(label).detach().cpu()
    segmentations |= {name: torch.as_tensor(each).detach().cpu() for name, each in predictions.items()}
    shown = _backgrounds(picture, segmentations, modalities, has_truth=label is not None)

    if picture.ndim == 4:
        first = next(iter(segmentations.values()))
        z = best_slice(first if label is not None else torch.stack(list(segmentations.values())).amax(0))
        picture, segmentations = picture[:, z], {name: each[z] for name, each in segmentations.items()}
    columns = math.ceil(math.sqrt(len(segmentations)))
    rows = math.ceil(len(segmentations) / columns)
    height, width = picture.shape[-2:]
    # As high as the picture is, so that panels of flat slices are not lost in white.
    size = 1.9 * min(max(height / width, 0.4), 2.5)
    figure = new_figure(figsize=(max(1.9 * columns, 4.0), (size + 0.25) * rows + 0.4))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, segmentation), m in zip(grid, segmentations.items(), shown, strict=False):
        draw_case(axes, picture[m], segmentation)
        # In lines that are no longer than a panel is wide.
        title = textwrap.fill(name.replace("+", "+ "), 28).replace("+ ", "+")
        axes.set_title(literal(title), fontsize=8)
    for axes in grid[len(segmentations) :]:
        axes.set_axis_off()
    found = sorted({int(k) for each in segmentations.values() for k in each.unique() if k > 0})
    if found:
        label_legend(figure, {k: classes[k] if k < len(classes) else f"class {k}" for k in found})
    return figure


def best_slice(label: Tensor) -> int:
    """Return the index along the first axis with most labelled voxels; the middle where none is labelled."""
    counts = label.flatten(1).gt(0).sum(dim=1)
    return int(counts.argmax()) if bool(counts.any()) else len(label) // 2


def draw_case(axes: Any, image: Tensor, label: Tensor | None) -> None:
    """Draw a slice (H, W) in grey and its labels (H, W), if there are any, in colours."""
    axes.imshow(on_black(image), cmap="gray")
    if label is not None:
        axes.imshow(paint(label), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def on_black(image: Tensor) -> NDArray[Any]:
    """Return a slice (H, W) in which what is exactly 0, outside the body, is as dark as the darkest pixel."""
    image = image.float()
    array: NDArray[Any] = torch.where(image == 0, image.min(), image).numpy()
    return array


def paint(label: Tensor) -> NDArray[Any]:
    """Return labels (H, W) as an RGBA picture (H, W, 4) that is transparent where they are 0 or negative."""
    from matplotlib.colors import to_rgba

    table = np.array([to_rgba(colour, 0.6) for colour in COLOURS])
    numbers = label.long().numpy()
    return np.where(numbers[..., None] > 0, table[numbers % len(COLOURS)], 0.0)


def label_legend(figure: Figure, classes: Mapping[int, str]) -> None:
    """Add a legend that gives the colours of labels, by number, their names; 0 has no colour."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=(COLOURS[k % len(COLOURS)], 0.6)) for k in classes if k]
    names = [literal(name) for k, name in classes.items() if k]
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(handles), 4), fontsize=8)


def _backgrounds(
    image: Tensor, segmentations: Mapping[str, Tensor], modalities: Sequence[str], *, has_truth: bool
) -> list[int]:
    """Return the channel behind each segmentation, after checking everything."""
    problems = []
    if image.ndim not in (3, 4) or image.is_complex():
        problems.append(f"image is {image.dtype} {tuple(image.shape)}; pass (M, H, W) or (M, D, H, W) real numbers")
    elif len(image) != len(modalities):
        problems.append(
            f"image has {len(image)} channels and there are {len(modalities)} modalities: {tuple(modalities)}"
        )
    if len(segmentations) == has_truth:
        problems.append("there are no predictions; pass one for each subset")
    channels = []
    for number, (name, each) in enumerate(segmentations.items()):
        if each.shape != image.shape[1:] or each.is_floating_point() or each.is_complex():
            problems.append(
                f"{name!r} is {each.dtype} {tuple(each.shape)}; pass integer labels of shape {tuple(image.shape[1:])}, "
                "such as logits.argmax(0)"
            )
        if has_truth and number == 0:
            channels.append(0)
            continue
        try:
            channels.append(list(modalities).index(parse_subset(name, modalities)[0]))
        except PassionError as error:
            problems.append(str(error))
    raise_problems(problems, what="plot_overlay", error=InputError)
    return channels

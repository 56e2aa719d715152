"""Dice and the 95 % Hausdorff distance on binary masks, with the empty cases spelled out.

Both metrics are undefined where a mask is empty, and published tables differ in what they put there. Here
nothing is left to an epsilon: the value for "both empty" and for "exactly one empty" is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from passion_plugin.errors import InputError, require

__all__ = ["BRATS_PENALTY", "BRATS_REGIONS", "dice_scores", "hd95_scores", "region_masks"]

BRATS_REGIONS: Mapping[str, tuple[int, ...]] = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
"""Whole tumour, tumour core and enhancing tumour as sets of labels.

Labels: 1 = necrotic core, 2 = oedema, 3 = enhancing tumour (4 in the challenge's files: remap it to 3).
"""

BRATS_PENALTY = 373.13
"""HD95 in mm when exactly one mask is empty: the BraTS convention (the diagonal of 240 x 240 x 155)."""


def region_masks(labels: Tensor, regions: Mapping[str, Sequence[int]]) -> Tensor:
    """Binary masks of overlapping regions from exclusive labels.

    Args:
        labels: integer (B, *spatial).
        regions: name -> the labels that belong to the region.

    Returns:
        bool (B, R, *spatial), channels in the order of ``regions``.

    Example:
        >>> labels = torch.tensor([[0, 1, 2, 3]])
        >>> region_masks(labels, BRATS_REGIONS).int().tolist()
        [[[0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1]]]
    """
    members = [torch.as_tensor(list(values), device=labels.device) for values in regions.values()]
    return torch.stack([torch.isin(labels, values) for values in members], dim=1)


def dice_scores(prediction: Tensor, truth: Tensor, *, empty: Literal["skip", "one"] = "skip") -> Tensor:
    r"""Dice of each sample and target, from voxel counts and without smoothing.

    .. math:: \mathrm{Dice} = 2 |P \cap T| / (|P| + |T|)

    Exactly one mask empty gives 0, which is what the equation says. Both empty is 0/0: ``empty`` decides.

    Args:
        prediction: bool (B, T, *spatial).
        truth: bool (B, T, *spatial).
        empty: both masks empty: ``"skip"`` gives NaN, to be left out of means; ``"one"`` gives 1.

    Returns:
        float64 (B, T), in [0, 1].

    Raises:
        InputError: the shapes differ or the tensors are not bool.

    Example:
        >>> prediction = torch.tensor([[[True, True, False, False]]])
        >>> truth = torch.tensor([[[True, False, False, True]]])
        >>> dice_scores(prediction, truth).item()
        0.5
    """
    _check_masks(prediction, truth)
    common, size = _sizes(prediction & truth), _sizes(prediction) + _sizes(truth)
    dice = 2 * common.double() / size.clamp(min=1)
    return dice.masked_fill(size == 0, 1.0 if empty == "one" else torch.nan)


def hd95_scores(
    prediction: Tensor,
    truth: Tensor,
    *,
    spacing: Sequence[float] | None = None,
    empty: Literal["skip", "zero"] = "zero",
    penalty: float = BRATS_PENALTY,
) -> Tensor:
    """95 % Hausdorff distance of each sample and target, computed by MONAI where both masks exist.

    MONAI takes the larger of the two directed 95th percentiles; tools that take one percentile of both
    sets of distances together give slightly smaller numbers.

    Args:
        prediction: bool (B, T, *spatial).
        truth: bool (B, T, *spatial).
        spacing: size of a voxel along each spatial axis in mm; None counts in voxels.
        empty: both masks empty: ``"zero"`` gives 0, ``"skip"`` gives NaN, to be left out of means.
        penalty: exactly one mask empty, in the unit of the result. 373.13 is the BraTS convention; the
            published code of the paper gives 1.0.

    Returns:
        float64 (B, T), in mm or voxels, on the device of ``prediction``.

    Raises:
        ImportError: MONAI or scipy is not installed.
        InputError: the shapes differ, the tensors are not bool, or ``spacing`` does not fit.
    """
    _check_masks(prediction, truth)
    axes = prediction.ndim - 2
    if spacing is not None and (len(spacing) != axes or not all(0 < s < float("inf") for s in spacing)):
        raise InputError(f"spacing is {tuple(spacing)}; give one positive number in mm per axis ({axes} here).")
    for_hd95 = {"extra": "monai", "purpose": "HD95"}
    require("scipy", **for_hd95)
    hausdorff = require("monai.metrics", **for_hd95).compute_hausdorff_distance
    found, expected = _sizes(prediction) > 0, _sizes(truth) > 0
    values = torch.full(found.shape, torch.nan, dtype=torch.float64)
    if empty == "zero":
        values[(~found & ~expected).cpu()] = 0.0
    values[(found ^ expected).cpu()] = penalty
    for b, t in (found & expected).nonzero().tolist():
        pair = (mask[b, t][None, None] for mask in (prediction, truth))
        distance = hausdorff(
            *pair, include_background=True, percentile=95, spacing=None if spacing is None else list(spacing)
        )
        values[b, t] = float(distance)
    return values.to(prediction.device)


def _sizes(masks: Tensor) -> Tensor:
    """Voxels per mask, (B, T) int64: exact, whatever the volume."""
    return masks.flatten(2).sum(-1)


def _check_masks(prediction: Tensor, truth: Tensor) -> None:
    if prediction.shape != truth.shape or prediction.ndim < 3:
        raise InputError(
            f"prediction and truth have shapes {tuple(prediction.shape)} and {tuple(truth.shape)}; "
            "both must be (B, T, *spatial)."
        )
    if prediction.dtype != torch.bool or truth.dtype != torch.bool:
        raise InputError(
            f"prediction and truth are {prediction.dtype} and {truth.dtype}; both must be torch.bool: "
            "threshold or compare them first."
        )

"""From scores and labels to binary masks, and Dice and the 95 % Hausdorff distance of these.

Both metrics are undefined where a mask is empty, and published tables differ in what they put there. Here
nothing is left to an epsilon: the value for "both empty" and for "exactly one empty" is an argument.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from einops import reduce
from torch import Tensor

from passion_plugin.errors import ConfigError, InputError, raise_problems, require, warn_user
from passion_plugin.evaluation._results import Convention

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
    require("scipy", extra="monai", purpose="HD95")
    hausdorff = require("monai.metrics", extra="monai", purpose="HD95").compute_hausdorff_distance
    found, expected = _sizes(prediction) > 0, _sizes(truth) > 0
    values = torch.full(found.shape, torch.nan, dtype=torch.float64)
    if empty == "zero":
        values[(~found & ~expected).cpu()] = 0.0
    values[(found ^ expected).cpu()] = penalty
    step = None if spacing is None else list(spacing)
    for b, t in (found & expected).nonzero().tolist():
        pair = prediction[b : b + 1, t : t + 1], truth[b : b + 1, t : t + 1]
        values[b, t] = float(hausdorff(*pair, include_background=True, percentile=95, spacing=step))
    return values.to(prediction.device)


def _sizes(masks: Tensor) -> Tensor:
    """Voxels per mask, (B, T) int64: exact, whatever the volume."""
    return reduce(masks, "b t ... -> b t", "sum")


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


@dataclass
class Scorer:
    """What is scored, and by which metrics: the arguments of the same names of :func:`evaluate_subsets`."""

    num_classes: int | None = None
    regions: Mapping[str, Sequence[int]] | None = None
    outputs: Literal["softmax", "sigmoid"] = "softmax"
    apply_sigmoid: bool = True
    threshold: float = 0.5
    empty: Literal["skip", "one"] = "skip"
    hd95: bool = False
    hd95_empty: Literal["zero", "skip"] = "zero"
    hd95_penalty: float = BRATS_PENALTY
    _has_warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        choices = {"outputs": ("softmax", "sigmoid"), "empty": ("skip", "one"), "hd95_empty": ("zero", "skip")}
        wrong = [name for name, words in choices.items() if getattr(self, name) not in words]
        problems = [f"{name} is {getattr(self, name)!r}; it must be one of {choices[name]}." for name in wrong]
        if not 0 < self.threshold < 1:
            problems.append(f"threshold is {self.threshold}; a probability between 0 and 1 is needed.")
        if not 0 <= self.hd95_penalty < float("inf"):
            problems.append(f"hd95_penalty is {self.hd95_penalty}; it must be a distance.")
        if self.regions is not None and not self.regions:
            problems.append("regions is empty; leave it out to score the classes one by one.")
        bad = {name: labels for name, labels in (self.regions or {}).items() if not _is_label_set(labels)}
        problems += [f"region {name!r} is {labels!r}; give its labels, as in (1, 3)." for name, labels in bad.items()]
        if self.num_classes is not None and not bad:
            problems += self._misfits(self.num_classes)
        raise_problems(problems, what="evaluate_subsets", error=ConfigError)
        for module in ("scipy", "monai.metrics") if self.hd95 else ():
            require(module, extra="monai", purpose="hd95=True")

    def conventions(self, unit: str) -> dict[str, Convention]:
        """Return by metric how it is computed; ``unit`` is that of the distances."""
        conventions = {"dice": Convention("fraction", None if self.empty == "skip" else 1.0, 0.0)}
        if self.hd95:
            both = 0.0 if self.hd95_empty == "zero" else None
            conventions["hd95"] = Convention(unit, both, self.hd95_penalty)
        return conventions

    def names(self, channels: int) -> tuple[str, ...]:
        """Names of the targets for a model with ``channels`` score channels."""
        if self.regions is not None:
            return tuple(self.regions)
        return tuple(f"class {k}" for k in range(1 if self.outputs == "softmax" else 0, channels))

    def values(
        self, scores: Tensor, label: Tensor, spacing: Sequence[Sequence[float]] | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Score one batch: scores (b, K, *spatial), and a label as in :meth:`true`.

        Returns:
            Metric -> values (b, T), NaN where there is none; and the number of empty masks of each pair, (b, T).
        """
        predicted = self.predicted(scores)
        true = self.true(label, scores.shape[1], scores.shape[2:])
        values = {"dice": dice_scores(predicted, true, empty=self.empty)}
        if self.hd95:
            hd95 = partial(hd95_scores, empty=self.hd95_empty, penalty=self.hd95_penalty)
            steps: Sequence[Sequence[float] | None] = spacing or [None] * len(scores)
            rows = [hd95(predicted[[b]], true[[b]], spacing=step) for b, step in enumerate(steps)]
            values["hd95"] = torch.cat(rows)
        return values, (_sizes(predicted) == 0).int() + (_sizes(true) == 0).int()

    def predicted(self, scores: Tensor) -> Tensor:
        """Return predicted masks, bool (B, T, *spatial), from logits or probabilities (B, K, *spatial)."""
        channels = scores.shape[1]
        if self.num_classes is not None and channels != self.num_classes:
            raise InputError(f"the model gives {channels} score channels, num_classes is {self.num_classes}.")
        raise_problems(self._misfits(channels), what="scores of the model", error=InputError)
        if self.outputs == "softmax":
            return self._from_classes(scores.argmax(dim=1), channels)
        low, high = (value.item() for value in scores.aminmax())
        if not self.apply_sigmoid and (low < 0 or high > 1):
            raise InputError(
                f"apply_sigmoid=False says the scores are probabilities, but they span "
                f"{low:.3g} to {high:.3g}; leave it at True for logits."
            )
        if self.apply_sigmoid and 0 <= low < high <= 1 and not self._has_warned:
            self._has_warned = True
            warn_user(
                f"the scores span {low:.3g} to {high:.3g}, like probabilities, and get a sigmoid on top; "
                "pass apply_sigmoid=False if the model has applied it."
            )
        return (scores.sigmoid() if self.apply_sigmoid else scores) > self.threshold

    def true(self, label: Tensor, channels: int, spatial: torch.Size) -> Tensor:
        """Return true masks, bool (B, T, *spatial), for scores of K ``channels``.

        Args:
            label: whole numbers (B, *spatial) or (B, 1, *spatial); or zeros and ones (B, K, *spatial):
                one-hot classes, or one mask per sigmoid target.
            channels: K.
            spatial: spatial shape of the scores.
        """
        given = tuple(label.shape)
        needs_masks = self.outputs == "sigmoid" and self.regions is None
        if label.shape[2:] == spatial and label.shape[1] == channels and (channels > 1 or needs_masks):
            return self._from_masks(label, channels)
        if label.shape[2:] == spatial and label.shape[1] == 1:
            label = label.squeeze(1)
        if label.shape[1:] != spatial or needs_masks:
            axes = ", ".join(map(str, spatial))
            whole = "" if needs_masks else f"(B, {axes}) or "
            raise InputError(
                f"label has shape {given}, the model's scores (B, {channels}, {axes}): the label must be "
                f"{whole}(B, {channels}, {axes}). Resample the scores in predict= or the label in batch=."
            )
        values = label.long()
        if label.is_floating_point() and not torch.equal(values.to(label.dtype), label):
            raise InputError("label holds fractions or NaN; class labels are whole numbers.")
        low, high = (int(value) for value in values.aminmax())
        limit = channels - 1 if self.outputs == "softmax" else high
        if low < 0 or high > limit:
            raise InputError(
                f"labels run from {low} to {high}, but the scores have classes 0..{limit}: "
                "remap them in batch= (in BraTS files, 4 becomes 3)."
            )
        return self._from_classes(values, channels)

    def _from_masks(self, label: Tensor, channels: int) -> Tensor:
        if not bool(((label == 0) | (label == 1)).all()):
            raise InputError(f"label has {channels} channels, so it must hold only zeros and ones.")
        if self.outputs == "sigmoid":
            return label.bool()
        if not bool((label.sum(dim=1) == 1).all()):
            raise InputError("label is not one-hot: some voxel has no class or several.")
        return self._from_classes(label.to(torch.uint8).argmax(dim=1), channels)

    def _from_classes(self, labels: Tensor, channels: int) -> Tensor:
        classes = {name: (k,) for k, name in enumerate(self.names(channels), start=1)}
        return region_masks(labels, classes if self.regions is None else self.regions)

    def _misfits(self, channels: int) -> list[str]:
        """Return why the regions cannot be made of this number of score channels."""
        regions = self.regions or {}
        if self.outputs == "sigmoid":
            if regions and len(regions) != channels:
                return [f"{channels} sigmoid channels for {len(regions)} regions; each channel is one region."]
            return []
        if channels < 2:
            return ["one softmax channel; exclusive classes need background and at least one more class."]
        return [
            f"region {name!r} uses label {max(labels)}, but there are {channels} classes, 0..{channels - 1}."
            for name, labels in regions.items()
            if max(labels) >= channels
        ]


def _is_label_set(labels: object) -> bool:
    return isinstance(labels, Collection) and bool(labels) and all(isinstance(k, int) and k >= 0 for k in labels)

"""From scores and labels to the binary masks that metrics compare."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from passion_plugin.errors import ConfigError, InputError, PassionWarning, raise_problems
from passion_plugin.evaluation._metrics import region_masks

__all__ = ["Targets"]


@dataclass(frozen=True)
class Targets:
    """What is scored: the foreground classes, or regions made of them.

    Attributes:
        num_classes: score channels K; None takes what the model gives.
        regions: name -> labels of the region; None scores the classes one by one.
        outputs: ``"softmax"``: exclusive classes, argmax; ``"sigmoid"``: channel k is target k.
        apply_sigmoid: False when the model has applied the sigmoid itself.
        threshold: probability above which a sigmoid target is predicted.
    """

    num_classes: int | None = None
    regions: Mapping[str, Sequence[int]] | None = None
    outputs: Literal["softmax", "sigmoid"] = "softmax"
    apply_sigmoid: bool = True
    threshold: float = 0.5

    def __post_init__(self) -> None:
        """Check the arguments together, before any model runs."""
        problems = []
        if self.outputs not in ("softmax", "sigmoid"):
            problems.append(f"outputs is {self.outputs!r}; it must be 'softmax' or 'sigmoid'.")
        if not 0 < self.threshold < 1:
            problems.append(f"threshold is {self.threshold}; a probability between 0 and 1 is needed.")
        if self.regions is not None and not self.regions:
            problems.append("regions is empty; leave it out to score the classes one by one.")
        bad = {name: members for name, members in (self.regions or {}).items() if not _is_label_set(members)}
        problems += [f"region {name!r} is {members!r}; give its labels, as in (1, 3)." for name, members in bad.items()]
        if self.num_classes is not None and not bad:
            problems += self._misfits(self.num_classes)
        raise_problems(problems, what="evaluate_subsets", error=ConfigError)

    def names(self, channels: int) -> tuple[str, ...]:
        """Names of the targets for a model with ``channels`` score channels."""
        if self.regions is not None:
            return tuple(self.regions)
        first = 1 if self.outputs == "softmax" else 0
        return tuple(f"class {k}" for k in range(first, channels))

    def predicted(self, scores: Tensor) -> Tensor:
        """Predicted masks.

        Args:
            scores: (B, K, *spatial) logits, or probabilities.

        Returns:
            bool (B, T, *spatial).

        Raises:
            InputError: the channels or the range of the scores do not fit.
        """
        channels = scores.shape[1]
        if self.num_classes is not None and channels != self.num_classes:
            raise InputError(f"the model gives {channels} score channels, num_classes is {self.num_classes}.")
        raise_problems(self._misfits(channels), what="scores of the model", error=InputError)
        if self.outputs == "softmax":
            return self._from_classes(scores.argmax(dim=1), channels)
        low, high = (float(adapter) for adapter in scores.aminmax())
        if not self.apply_sigmoid and (low < 0 or high > 1):
            raise InputError(
                f"apply_sigmoid=False says the scores are probabilities, but they span "
                f"{low:.3g} to {high:.3g}; leave it at True for logits."
            )
        if self.apply_sigmoid and 0 <= low < high <= 1:
            warnings.warn(
                f"the scores span {low:.3g} to {high:.3g}, like probabilities, and get a sigmoid on top; "
                "pass apply_sigmoid=False if the model has applied it.",
                PassionWarning,
                stacklevel=2,
            )
        return (scores.sigmoid() if self.apply_sigmoid else scores) > self.threshold

    def true(self, label: Tensor, channels: int, spatial: torch.Size) -> Tensor:
        """True masks.

        Args:
            label: whole numbers (B, *spatial) or (B, 1, *spatial); or zeros and ones (B, K, *spatial):
                one-hot classes, or one mask per sigmoid target.
            channels: score channels K of the model.
            spatial: spatial shape of its scores.

        Returns:
            bool (B, T, *spatial).

        Raises:
            InputError: another shape, a fraction, or a label outside 0..K-1.
        """
        given = tuple(label.shape)
        if label.shape[2:] == spatial and label.shape[1] == channels and (channels > 1 or self._needs_masks):
            return self._from_masks(label, channels)
        if label.shape[2:] == spatial and label.shape[1] == 1:
            label = label.squeeze(1)
        if label.shape[1:] != spatial or self._needs_masks:
            axes = ", ".join(map(str, spatial))
            whole = "" if self._needs_masks else f"(B, {axes}) or "
            raise InputError(
                f"label has shape {given}, the model's scores (B, {channels}, {axes}): the label must be "
                f"{whole}(B, {channels}, {axes}). Resample the scores in predict= or the label in batch=."
            )
        values = label.long()
        if label.is_floating_point() and not torch.equal(values.to(label.dtype), label):
            raise InputError("label holds fractions or NaN; class labels are whole numbers.")
        low, high = (int(adapter) for adapter in values.aminmax())
        limit = channels - 1 if self.outputs == "softmax" else high
        if low < 0 or high > limit:
            raise InputError(
                f"labels run from {low} to {high}, but the scores have classes 0..{limit}: "
                "remap them in batch= (in BraTS files, 4 becomes 3)."
            )
        return self._from_classes(values, channels)

    @property
    def _needs_masks(self) -> bool:
        """Whether whole-number labels say nothing about the targets."""
        return self.outputs == "sigmoid" and self.regions is None

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
        if self.outputs == "sigmoid":
            if self.regions is None or len(self.regions) == channels:
                return []
            return [f"{channels} sigmoid channels for {len(self.regions)} regions; each channel is one region."]
        if channels < 2:
            return ["one softmax channel; exclusive classes need background and at least one more class."]
        return [
            f"region {name!r} uses label {max(members)}, but there are {channels} classes, 0..{channels - 1}."
            for name, members in (self.regions or {}).items()
            if max(members) >= channels
        ]


def _is_label_set(members: object) -> bool:
    if not isinstance(members, Collection) or not members:
        return False
    return all(isinstance(label, int) and label >= 0 for label in members)

"""The user's target, checked and brought to the resolution of the logits it is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from passion_plugin._types import Outputs
from passion_plugin._validate import Problems, check_labels, describe, unreadable
from passion_plugin.errors import BackboneError, InputError


def prepare_target(
    target: Tensor, logits: Tensor, outputs: Outputs, image_size: tuple[int, ...] | None = None
) -> Tensor:
    """Check a target and return it as the losses take it, at its own resolution.

    Args:
        target: integer labels (B, *spatial), or one-hot (B, K, *spatial) of any dtype, which is converted; for
            sigmoid outputs region masks (B, K, *spatial).
        logits: (B, K, *spatial), at the same or a coarser resolution.
        outputs: ``"softmax"`` or ``"sigmoid"``.
        image_size: spatial size of the images, the other size that a target may have.

    Returns:
        int64 labels (B, *spatial), or masks (B, K, *spatial).

    Raises:
        InputError: wrong shape, dtype or content.
    """
    if not isinstance(target, Tensor):
        raise InputError(f"the target must be a tensor, got {describe(target)}")
    if reason := unreadable(target):
        raise InputError(f"the target {reason}")
    batch, num_classes, *spatial = logits.shape
    size = tuple(spatial)
    if outputs == "softmax" and target.ndim == logits.ndim and target.shape[1] == num_classes:
        target = _from_one_hot(target)
    if image_size is not None and target.shape[-len(size) :] != size:
        size = image_size
    problems = Problems("the target")
    # An expanded scalar has the shape to compare with, and no storage to speak of.
    reference = torch.empty((), device=target.device).expand(batch, num_classes, *size)
    kind = "classes" if outputs == "softmax" else "regions"
    check_labels(problems, target, reference, num_classes, kind=kind, advice="there is no ignore value")
    problems.raise_all()
    return target.long() if outputs == "softmax" else target


def resize_labels(labels: Tensor, spatial: tuple[int, ...]) -> Tensor:
    """Bring labels (B, *spatial) or masks (B, K, *spatial) to a coarser resolution, nearest neighbour.

    Raises:
        BackboneError: along some axis no whole number leads from the one size to the other.
    """
    size = tuple(labels.shape[-len(spatial) :])
    if size == spatial:
        return labels
    if not all(map(_is_coarser, size, spatial)):
        raise BackboneError(
            f"the labels have size {size}, the logits or features of the backbone {spatial}, which is no down-sampling "
            f"by a whole number along each axis: it seems to pad or crop its images inside, and labels would be "
            f"stretched over other voxels. Pad or crop images and labels before the backbone gets them, or let it "
            f"bring its features back to the size of the images before the classifier"
        )
    masks = labels.ndim == len(spatial) + 2
    values = labels if masks else labels.unsqueeze(1)
    resized = F.interpolate(values.float(), size=spatial, mode="nearest").to(labels.dtype)
    return resized if masks else resized.squeeze(1)


def _is_coarser(size: int, other: int) -> bool:
    """Whether a stride leads from one size to the other: rounded up, down, or to one less for want of padding."""
    strides = range(2, size + 1)
    return other == size or any(size // stride - 1 <= other <= -(-size // stride) for stride in strides)


def _from_one_hot(target: Tensor) -> Tensor:
    ones = target.bool()
    if target.dtype != torch.bool and not bool((target == ones).all()):
        raise InputError("the one-hot target must hold only 0 and 1; take the argmax of soft labels first")
    if not bool((ones.sum(1) == 1).all()):
        raise InputError(
            "the one-hot target must have exactly one class per voxel; overlapping regions need a backbone "
            "with BackboneSpec(outputs='sigmoid')"
        )
    return ones.to(torch.uint8).argmax(1)

"""What all losses share: in which precision they compute, and how labels become masks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["class_masks", "outside_autocast", "wide_dtype"]


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float32 at least, float64 if any tensor is.

    Sums over 80^3 voxels overflow in float16 and lose every digit in bfloat16.

    Example:
        >>> wide_dtype(torch.zeros(1, dtype=torch.bfloat16))
        torch.float32
    """
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def outside_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off for the device of ``tensor``, so that matrix products stay in the dtype given."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def class_masks(labels: Tensor, num_classes: int, ndim: int) -> Tensor:
    """``Y[b, k, v]``: which voxels belong to class or region k.

    Args:
        labels: class numbers (B, *spatial), or masks (B, K, *spatial) as told by ``ndim``.
        num_classes: K.
        ndim: number of axes of the logits or features.

    Returns:
        bool (B, K, V), a quarter of the float32 logits.

    Example:
        >>> class_masks(torch.tensor([[[0, 1]]]), 2, ndim=4).int()
        tensor([[[1, 0],
                 [0, 1]]], dtype=torch.int32)
    """
    if labels.ndim == ndim:
        return labels.flatten(2) != 0
    classes = torch.arange(num_classes, device=labels.device).view(1, -1, 1)
    return labels.flatten(1).unsqueeze(1) == classes

"""Weighted cross-entropy and Dice in one operation: one softmax, one read of the logits each way.

Both losses follow from six sums over the voxels of a sample, (B, 6, K), for each class or region k:

* voxels: how many count; all but the ignored ones, and at least 1
* count: how many belong to k
* overlap: probability of k over the voxels that belong to k
* predicted: probability of k over all voxels
* inside: -log p over the voxels that belong to k
* outside: -log(1 - p) over the others; regions only, else 0

Backward needs nothing else besides the inputs: it computes the probabilities once more.
"""

from __future__ import annotations

# No `from __future__ import annotations`: custom_op of torch 2.5 wants types as annotations, not strings.
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from passion_plugin.losses import _segmentation_eager as eager
from passion_plugin.losses._common import class_masks, outside_autocast, use_triton, wide_dtype

__all__ = ["plain_segmentation", "segmentation", "segmentation_gradient"]


def plain_segmentation(
    logits: Tensor, labels: Tensor, regions: bool, lowest: float, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`segmentation`, which autograd can differentiate as often as one likes.

    Args:
        logits: (B, K, *spatial).
        labels: class numbers (B, *spatial), or masks (B, K, *spatial) of regions.
        regions: whether each channel is a region of its own (sigmoid) or one of K classes (softmax).
        lowest: bound below which cross-entropy clamps the probability of the true class; 0: no clamp.
        ignore_index: class number, or value in a mask, of voxels that count nowhere.

    Returns:
        Weighted cross-entropy (B,) and Dice loss (B,), in float32, or in float64 if the logits are.
    """
    z = logits.to(wide_dtype(logits)).flatten(2)
    entries = labels.flatten(2) if regions else labels.flatten(1).unsqueeze(1)
    counted = (
        torch.ones_like(entries, dtype=torch.bool) if ignore_index is None else eager.differ(entries, ignore_index)
    )
    masks = class_masks(labels, z.shape[1], logits.ndim) & counted
    z = torch.where(counted, z, 0)
    voxels, count = counted.sum(-1).clamp(min=1), masks.sum(-1).to(z.dtype)
    share, rest = (count / voxels).unsqueeze(2), ((voxels - count) / voxels).unsqueeze(2)
    if regions:
        p = z.sigmoid()
        weight = torch.where(masks, rest, share) * counted / z.shape[1]
        nll = -functional.logsigmoid(torch.where(masks, z, -z))
    else:
        p = z.softmax(1)
        weight = rest * masks
        nll = torch.where(masks, -z.log_softmax(1).clamp(min=eager.log(lowest)), 0)
    entropy = ((weight * nll).sum(-1) / voxels).sum(1)
    dice = 2 * (p * masks).sum(-1) / ((p * counted).sum(-1) + count + eager.EPS)
    return entropy, 1 - dice.mean(1)


@torch.library.custom_op("passion_plugin::segmentation", mutates_args=())
def segmentation(
    logits: Tensor, labels: Tensor, regions: bool, lowest: float, ignore_index: int | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross-entropy (B,) and Dice loss (B,) of :func:`plain_segmentation`, and the sums (B, 6, K)."""
    if use_triton(backend, logits):
        from passion_plugin.losses.kernels._segmentation import losses_and_sums

        return losses_and_sums(logits, labels, regions, lowest, ignore_index)
    return eager.losses_and_sums(logits, labels, regions, lowest, ignore_index)


@torch.library.custom_op("passion_plugin::segmentation_gradient", mutates_args=())
def segmentation_gradient(
    to_entropy: Tensor,
    to_dice: Tensor,
    sums: Tensor,
    logits: Tensor,
    labels: Tensor,
    regions: bool,
    lowest: float,
    ignore_index: int | None,
    backend: str,
) -> Tensor:
    """Gradient of the logits, in their dtype, from those of the two losses, (B,) each, and the sums of forward."""
    if use_triton(backend, logits):
        from passion_plugin.losses.kernels._segmentation import gradient

        return gradient(to_entropy, to_dice, sums, logits, labels, regions, lowest, ignore_index)
    return eager.gradient(to_entropy, to_dice, sums, logits, labels, regions, lowest, ignore_index)


@segmentation.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes = logits.shape[:2]
    sums = logits.new_empty((batch, 6, classes), dtype=wide_dtype(logits))
    return sums.new_empty(batch), sums.new_empty(batch), sums


@segmentation_gradient.register_fake
def _(to_entropy: Tensor, to_dice: Tensor, sums: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(logits.flatten(2)).view(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(logits, labels, output[2])


def _backward(ctx: Any, to_entropy: Tensor, to_dice: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    logits, labels, sums = ctx.saved_tensors
    result = None
    if ctx.needs_input_grad[0] and torch.is_grad_enabled():  # create_graph=True: it may be differentiated again.
        with outside_autocast(logits):
            losses = plain_segmentation(logits, labels, *ctx.settings[:-1])
            (result,) = torch.autograd.grad(losses, logits, (to_entropy, to_dice), create_graph=True)
    elif ctx.needs_input_grad[0]:
        result = segmentation_gradient(to_entropy, to_dice, sums, logits, labels, *ctx.settings)
    return (result, None, *[None] * len(ctx.settings))


segmentation.register_autograd(_backward, setup_context=_setup)

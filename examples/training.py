"""The loss and the training loop that demo and experiment share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from passion_plugin.losses import dice_loss, weighted_cross_entropy
from passion_plugin.training import EpochReport
from passion_plugin.wrapper import PassionWrapper

__all__ = ["TASKS", "criterion", "train"]


def weighted_entropy_and_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Weighted cross-entropy and Dice of every sample, averaged: the task loss of the paper's code."""
    return (weighted_cross_entropy(logits, target) + dice_loss(logits, target)).mean()


def entropy_and_batch_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy and the soft Dice of the foreground classes, from sums over the whole batch.

    A patch without tumour then still counts: what is predicted there lowers the Dice of the batch.
    """
    probability = logits.softmax(dim=1)[:, 1:]
    truth = rearrange(F.one_hot(target, logits.shape[1]), "b ... k -> b k ...")[:, 1:].to(probability.dtype)
    axes = (0, *range(2, logits.ndim))
    overlap, size = (probability * truth).sum(axes), (probability + truth).sum(axes)
    return F.cross_entropy(logits, target) + 1 - ((2 * overlap + 1) / (size + 1)).mean()


TASKS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "wce+dice": weighted_entropy_and_dice,
    "ce+dice": entropy_and_batch_dice,
}
"""Segmentation losses (logits (B, K, *spatial), labels (B, *spatial)) -> scalar, by name."""


def criterion(prediction: Any, target: Tensor, mask: Tensor, task: str = "wce+dice") -> Tensor:
    """The user's own loss, a scalar.

    Args:
        prediction: logits (B, K, *spatial), or RFNet-like ``(logits, unimodal, coarse)``. Then the uni-modal
            predictions of present modalities are supervised too, and the coarse ones, each level with half
            the weight of the finer one.
        target: labels (B, *spatial).
        mask: (B, M) bool, True = present.
        task: the name of one of :data:`TASKS`.
    """
    segmentation = TASKS[task]
    logits, unimodal, coarse = prediction if isinstance(prediction, tuple) else (prediction, (), ())
    loss = segmentation(logits, target)
    for present, output in zip(mask.unbind(1), unimodal, strict=False):
        if present.any():
            loss = loss + present.float().mean() * segmentation(output[present], target[present])
    for level, output in enumerate(coarse):
        small = target[(slice(None), *[slice(None, None, 2**level)] * (target.ndim - 1))]
        loss = loss + 0.5 ** (level + 1) * segmentation(output, small)
    return loss


def train(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    *,
    steps: int,
    steps_per_epoch: int,
    wrap: Callable[[nn.Module], PassionWrapper] | None = None,
    lr: float = 3e-3,
    task: str = "wce+dice",
    name: str = "plain",
    quiet: bool = False,
    log: Callable[[dict[str, float], int], None] | None = None,
    after_step: Callable[[], Any] | None = None,
) -> list[EpochReport]:
    """An ordinary training loop; the three places that know of PASSION are numbered.

    Args:
        model: the backbone; trained in place.
        loader: yields ``"image"`` (B, M, *spatial), ``"mask"`` (B, M) bool and ``"label"`` (B, *spatial); with
            ``"presence"`` (B, M) bool too, students see modalities that the mask hides from the teacher.
        steps: number of batches in ``loader``.
        steps_per_epoch: after so many the preference is updated.
        wrap: how to wrap the backbone; None trains plainly.
        lr: peak learning rate of AdamW, decayed polynomially to 0.
        task: see :func:`criterion`.
        name: for the progress bar.
        quiet: no progress bar.
        log: called with ``passion.metrics()`` and the step after every epoch.
        after_step: called after every step of the optimizer, to average weights for example.

    Returns:
        The preference after every epoch, empty without ``wrap``.

    Raises:
        FloatingPointError: the loss is not finite any more.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    wrapper = wrap(model) if wrap else None  # 1: wrap
    network = wrapper or model
    network.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=0.9)
    history = []
    with tqdm(loader, total=steps, desc=f"train {name}", unit="step", mininterval=1.0, disable=quiet) as bar:
        for step, batch in enumerate(bar, start=1):
            hidden = {"passion_presence": batch["presence"]} if wrapper and "presence" in batch else {}
            prediction = network(batch["image"], batch["mask"], **hidden)
            loss = criterion(prediction, batch["label"], batch["mask"], task)
            if wrapper:
                loss = loss + wrapper.passion_loss(batch["label"])  # 2: distil
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            if after_step:
                after_step()
            if wrapper and (step % steps_per_epoch == 0 or step == steps):
                history.append(wrapper.end_epoch())  # 3: update the preference
                if log:
                    log(wrapper.passion.metrics(), step)
            if step % 10 == 0 or step == steps:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(f"the loss is {loss.item()} at step {step} of {steps}")
    if wrapper:
        wrapper.unwrap()
    return history

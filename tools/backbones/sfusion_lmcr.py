"""LMCR in the repository of SFusion (MICCAI 2023): absent images are means of present ones, made in the script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from passion_plugin.detection import detect_spec
from tools.backbones.checkout import images, labels, load
from tools.backbones.sfusion_uhemis import BITS, COMMIT, DATE, MODALITIES, SOURCE, call
from tools.backbones.trial import Call, Trial

__all__ = ["COMMIT", "DATE", "SOURCE", "build"]


def mean_of_present(x: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
    """Put the mean of the present images in the place of the absent ones, sample by sample.

    Args:
        x: M tensors (B, 1, D, H, W).
        mask: bool (B, M), True = present.
    """
    here = mask.T[..., None, None, None, None]
    mean = sum(here[m] * image for m, image in enumerate(x)) / here.sum(0)
    return [torch.where(here[m], image, mean) for m, image in enumerate(x)]


def task_loss(raw: Any, target: Tensor) -> Tensor:
    """Cross-entropy of the segmentation in the dictionary."""
    return F.cross_entropy(raw["seg"], target)


def make(parts: Sequence[Tensor], present: Sequence[bool]) -> Call:
    """Return the call with a list of images, absent ones replaced, and the number of what is there."""
    return call(mean_of_present(parts, torch.tensor([list(present)])), present)


def build(checkout: Path) -> Trial:
    """Return the network as its script builds it."""
    torch.manual_seed(0)
    model = load(checkout, "net.Network_LMCR").LMCR(feature_maps=8)
    parts = images(16).split(1, dim=1)
    args, _ = make(parts, [True] * 4)
    return Trial(
        model=model.train(),
        inputs=args,
        modalities=MODALITIES,
        spec=detect_spec(
            model, *args, modalities=MODALITIES, mask_format=BITS, per_sample_masks=False, fill_missing=mean_of_present
        ),
        written="`spec=detect_spec(…, mask_format=bits, per_sample_masks=False, fill_missing=mean_of_present)`, with "
        "`bits` as in [your own backbone](own-backbone.md#how-it-is-called) and what the script does to absent images",
        traps="the mask has no effect on the segmentation; the script is to put the mean of the present images in "
        "place of absent ones, but compares a string with a list and never does; weights of the fusion are read off "
        "the first sample of the batch: one mask for the batch",
        expect="rerun",
        target=labels(16),
        task_loss=task_loss,
        truth="seg_decoder.score",
        images=parts,
        make=make,
        size="16³",
    )

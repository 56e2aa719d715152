"""LMCR in the repository of SFusion (MICCAI 2023): absent images are means of present ones, made in the script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from passion_plugin import BackboneSpec
from passion_plugin.backbone import MaskCodec
from tools.backbones.checkout import images, labels, load
from tools.backbones.trial import Call, Trial

SOURCE = "https://github.com/scut-cszcl/SFusion"
COMMIT = "dae6d59bab980945b0f78763d2f7f76698e88b56"
DATE = "2026-11-25"

MODALITIES = ("t1ce", "t1", "t2", "flair")

# A number for the batch: bit m is set when modality m is there.
BITS = MaskCodec(
    encode=lambda mask: sum(1 << m for m, here in enumerate(mask[0].tolist()) if here),
    decode=lambda code: torch.tensor([bool(code >> m & 1) for m in range(4)]),
)


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
    """Return the call with a list of images and the code of what is there."""
    mask = torch.tensor([list(present)])
    return (mean_of_present(parts, mask), BITS.encode(mask)), {}


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
        spec=BackboneSpec(
            classifier="seg_decoder.score",
            encoders={m: f"encoders.encoder{k}" for k, m in enumerate(MODALITIES)},
            mask_format=BITS,
            mixed_masks=False,
            absent=mean_of_present,
        ),
        written="`bits = MaskCodec(encode=lambda mask: sum(1 << m for m, here in enumerate(mask[0].tolist()) if here), "
        "decode=lambda code: torch.tensor([bool(code >> m & 1) for m in range(4)]))`; "
        '`spec=BackboneSpec(classifier="seg_decoder.score", encoders={m: f"encoders.encoder{k}" for k, m in '
        "enumerate(modalities)}, mask_format=bits, mixed_masks=False, absent=mean_of_present)`, where "
        "`mean_of_present(x, mask)` does what the training script does to absent images",
        traps="the mask does not reach the segmentation: an absent image is the mean of the present ones, which the "
        "script is meant to put there (it compares a string with a list and never does). A number for the batch. "
        "Weights of the fusion are taken from the first sample and hold for all: batches of one, or one mask for the "
        "batch. The script adds up into the caller's first image",
        expect="rerun",
        target=labels(16),
        task_loss=task_loss,
        truth="seg_decoder.score",
        images=parts,
        make=make,
        size="16³",
    )

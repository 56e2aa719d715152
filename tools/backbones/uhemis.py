"""U-HeMIS (Havaei et al., MICCAI 2016, with a U-Net), as in RA-HVED."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.backbones.checkout import images, labels, load
from tools.backbones.trial import Call, Trial

SOURCE = "https://github.com/ssjx10/RA-HVED"
COMMIT = "23a15437836a76bb83a3f389d45f48cf4f3b0b48"
DATE = "2026-11-25"

MODALITIES = ("t1", "t1ce", "t2", "flair")


def call(parts: Sequence[Tensor], present: Sequence[bool]) -> Call:
    """Return the call with its mask, in which True means missing."""
    drop = ~torch.tensor([present] * len(parts[0]))
    return (torch.cat(list(parts), dim=1),), {"drop": drop}


def task_loss(raw: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    """Cross-entropy of the segmentation."""
    return F.nll_loss(raw[0].clamp(min=1e-6).log(), target)


def build(checkout: Path) -> Trial:
    """Return the network as it is."""
    torch.manual_seed(0)
    parts = images(16).split(1, dim=1)
    inputs, keywords = call(parts, [True] * 4)
    return Trial(
        model=load(checkout, "U_Hemis").U_HeMIS(num_cls=4),
        inputs=inputs,
        keywords=keywords,
        images=parts,
        make=call,
        modalities=MODALITIES,
        spec=None,
        written="",
        traps="a 1 in the mask means missing; without `drop=` an image that is zero everywhere counts as missing",
        expect="exact",
        target=labels(16),
        task_loss=task_loss,
        truth="seg_decoder.final_conv.conv",
        size="16³",
    )

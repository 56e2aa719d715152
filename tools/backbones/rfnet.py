"""RFNet (Ding et al., ICCV 2021)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.backbones.checkout import images, labels, load
from tools.backbones.trial import Trial

SOURCE = "https://github.com/dyh127/RFNet"
COMMIT = "1e475fa5de4ac3f41f8de3d3102bb8b28383c2c4"
DATE = "2026-11-25"


def fused_nll(raw: tuple[Tensor, ...], target: Tensor) -> Tensor:
    """Cross-entropy of the fused probabilities, the first thing that this family of networks returns."""
    return F.nll_loss(raw[0].clamp(min=1e-6).log(), target)


def build(checkout: Path) -> Trial:
    """Return the network as it is, in the mode in which its script trains it."""
    torch.manual_seed(0)
    model = load(checkout, "models").Model(num_cls=4)
    model.is_training = True
    return Trial(
        model=model,
        inputs=(images(16), torch.ones(2, 4, dtype=torch.bool)),
        modalities=("flair", "t1ce", "t1", "t2"),
        spec=None,
        written="",
        traps="an integer mask masks nothing; `is_training` is switched independently of `train()`",
        expect="exact",
        target=labels(16),
        task_loss=fused_nll,
        truth="decoder_fuse.seg_layer",
        size="16³",
    )

"""SFusion (Liu et al., MICCAI 2023), the port in IM-Fuse: mask columns and channels have different orders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.backbones.checkout import images, labels, load
from tools.backbones.sources import edited, replacing
from tools.backbones.trial import Trial
from tools.backbones.uhved import COMMIT, DATE, SOURCE

__all__ = ["COMMIT", "DATE", "SOURCE", "build", "network"]

CHANNELS = ("flair", "t1ce", "t1", "t2")
COLUMNS = ("t1ce", "t1", "t2", "flair")


def network(checkout: Path) -> nn.Module:
    """Return the network for images of 16³ instead of 128³, with 2³ tokens for each modality instead of 8³."""
    torch.manual_seed(0)
    sizes = [(f"volumn_size={side}", f"volumn_size={side // 8}") for side in (128, 64, 32, 16)]
    # From the smallest on: 128 becomes 16, which must not become 2.
    edits = {
        "SFusion": replacing(*reversed(sizes)),
        "layers_sfusion": replacing(("self.patch_dim = 8", "self.patch_dim = 2"), ("num_layers=8", "num_layers=2")),
    }
    with edited(edits):
        module = load(checkout / "SFusion", "SFusion")
    return module.TF_RMBTS(in_channels=4, out_channels=4, levels=4, feature_maps=8, method="Token")


def task_loss(raw: Mapping[str, Tensor], target: Tensor) -> Tensor:
    """Cross-entropy of the segmentation."""
    return F.nll_loss(raw["seg"].clamp(min=1e-6).log(), target)


def build(checkout: Path) -> Trial:
    """Return the network, called by somebody who takes column k for channel k."""
    return Trial(
        model=network(checkout),
        inputs=(images(16), torch.ones(2, 4, dtype=torch.bool)),
        modalities=CHANNELS,
        spec=None,
        written="",
        traps="channels are flair, t1ce, t1, t2, mask columns t1ce, t1, t2, flair: modality k would be distilled into "
        "another branch. See the next row",
        expect="refused",
        reason="the columns of the mask do not have the order of the images",
        target=labels(16),
        size="16³, 2³ tokens, 2 transformer layers",
    )

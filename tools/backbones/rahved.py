"""RA-HVED (Jeong et al., WACV 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.backbones.checkout import images, load
from tools.backbones.sources import edited
from tools.backbones.trial import Call, Trial
from tools.backbones.uhemis import COMMIT, DATE, MODALITIES, SOURCE

__all__ = ["COMMIT", "DATE", "SOURCE", "build"]

_UNUSED = ("h5py", "PIL", "sklearn", "skimage", "scipy", "matplotlib")


def call(parts: Sequence[Tensor], present: Sequence[bool]) -> Call:
    """Return the call with a mask for each sample; of a single modality the posterior mean is asked for."""
    drop = ~torch.tensor([present] * len(parts[0]))
    return (torch.cat(list(parts), dim=1),), {"instance_missing": True, "drop": drop, "valid": not all(present)}


def task_loss(raw: tuple[Any, ...], target: Tensor) -> Tensor:
    """Binary cross-entropy of the three regions."""
    return F.binary_cross_entropy(raw[0], target)


def build(checkout: Path) -> Trial:
    """Return the network with half the width."""
    torch.manual_seed(0)
    with edited(absent=_UNUSED):
        module = load(checkout, "RA_HVED")
    model = module.U_HVEDConvNet3D(
        1, 3, shared_recon=False, recon_skip=True, MVAE_reduction=True, final_sigmoid=True, f_maps=8, layer_order="ilc"
    )
    parts = images(32).split(1, dim=1)
    inputs, keywords = call(parts, [True] * 4)
    return Trial(
        model=model,
        inputs=inputs,
        keywords=keywords,
        images=parts,
        make=call,
        modalities=MODALITIES,
        spec=None,
        written="",
        traps="call it with `instance_missing=True, drop=…` (True = missing), else one subset number rules the whole "
        "batch; three overlapping regions; an encoder is nine modules; training samples from the posterior, students "
        "take its mean",
        expect="exact",
        target=(torch.rand(2, 3, 32, 32, 32, generator=torch.Generator().manual_seed(1)) > 0.5).float(),
        task_loss=task_loss,
        truth="final_conv",
        size="32³, 8 channels instead of 16",
    )

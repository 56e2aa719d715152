"""RMBTS in the repository of SFusion (MICCAI 2023): two encoders for each modality, and batches of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from passion_plugin.detection import detect_spec
from tools.backbones.checkout import images, labels, load
from tools.backbones.sfusion_uhemis import BITS, COMMIT, DATE, MODALITIES, SOURCE, call
from tools.backbones.trial import Trial

__all__ = ["COMMIT", "DATE", "SOURCE", "build"]


def task_loss(raw: dict[str, Any], target: Tensor) -> Tensor:
    """Cross-entropy of the segmentation in the dictionary."""
    return F.cross_entropy(raw["seg"], target)


def build(checkout: Path) -> Trial:
    """Return the network as its script builds it."""
    torch.manual_seed(0)
    model = load(checkout, "net.Network_RMBTS").RMBTS(feature_maps=8, levels=4)
    parts = images(16, batch=1).split(1, dim=1)
    inputs, _ = call(parts, [True] * 4)
    return Trial(
        model=model,
        inputs=inputs,
        images=parts,
        make=call,
        modalities=MODALITIES,
        spec=detect_spec(model, *inputs, modalities=MODALITIES, mask_format=BITS, per_sample_masks=False),
        written="`spec=detect_spec(…, mask_format=bits, per_sample_masks=False)`, with `bits` as in [your own "
        "backbone](own-backbone.md#how-it-is-called)",
        traps="batches of one only; one number says what is there; parameters without shape until the first pass",
        expect="exact",
        target=labels(16, batch=1),
        task_loss=task_loss,
        truth="mask_decoder.conv_seg.unit.0",
        size="16³, batch of 1",
    )

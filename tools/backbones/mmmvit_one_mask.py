"""MMMViT where all samples of a batch have the same modalities: samples may mix, and students see what they should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from passion_plugin.detection import detect_spec
from tools.backbones import mmmvit
from tools.backbones.mmmvit import COMMIT, DATE, SOURCE
from tools.backbones.trial import Trial

__all__ = ["COMMIT", "DATE", "SOURCE", "build"]


def task_loss(raw: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of probabilities."""
    return F.nll_loss(raw.clamp(min=1e-6).log(), target)


def build(checkout: Path) -> Trial:
    """Return the same network, with a spec that promises one mask for each batch."""
    refused = mmmvit.build(checkout)
    return replace(
        refused,
        spec=detect_spec(refused.model, *refused.inputs, modalities=refused.modalities, per_sample_masks=False),
        written="`spec=detect_spec(…, per_sample_masks=False)`",
        traps="batches of one sample, or of one mask; the bottleneck is not masked",
        expect="rerun",
        reason="",
        task_loss=task_loss,
        truth="decoder_fuse.seg_layer",
    )

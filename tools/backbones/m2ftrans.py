"""M2FTrans, version 2 (Shi et al., IEEE JBHI 2024)."""

from __future__ import annotations

from pathlib import Path

from tools.backbones.checkout import load, on_cpu
from tools.backbones.rfnet import trial_of
from tools.backbones.trial import Trial

SOURCE = "https://github.com/Jun-Jie-Shi/M2FTrans"
COMMIT = "03a0b28ae03ad1a7dea5fb874c7b47c1439caa34"
DATE = "2026-11-25"


def build(checkout: Path) -> Trial:
    """Return the network for images of 32³ instead of 128³, with narrow transformers."""
    on_cpu()
    return trial_of(
        load(checkout / "M2FTrans_v2", "models.m2ftrans", H=32, W=32, D=32, mlp_dim=128),
        side=32,
        size="32³, 2³ tokens",
        traps="needs CUDA (attention masks are made on the CPU and sent there); images must be 128³; dropout in "
        "`train()`",
        truth="decoder_fusion.seg_layer",
    )

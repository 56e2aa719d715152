"""The M2FTrans in the authors' code of PASSION, with imperfect data (idt)."""

from __future__ import annotations

from pathlib import Path

from tools.backbones.checkout import load
from tools.backbones.passion_rfnet import COMMIT, DATE, SOURCE, official
from tools.backbones.trial import Trial

__all__ = ["COMMIT", "DATE", "SOURCE", "build"]


def build(checkout: Path) -> Trial:
    """Return the network with 2³ tokens for each modality instead of 5³, and narrow transformers."""
    return official(
        load(checkout / "code", "models.m2ftrans", patch_size=2, mlp_dim=128),
        side=32,
        size="32³, 2³ tokens",
        mask_type="idt",
        truth="decoder_fusion.seg_layer",
        traps="as RFNet; needs CUDA (attention masks)",
    )

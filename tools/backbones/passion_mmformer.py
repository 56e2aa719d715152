"""The mmFormer in the authors' code of PASSION, with imperfect data (idt)."""

from __future__ import annotations

from pathlib import Path

from tools.backbones.checkout import load
from tools.backbones.passion_rfnet import COMMIT, DATE, SOURCE, official
from tools.backbones.trial import Trial

__all__ = ["COMMIT", "DATE", "SOURCE", "build"]


def build(checkout: Path) -> Trial:
    """Return the network with 2³ tokens for each modality instead of 5³, and narrow transformers."""
    module = load(checkout / "code", "models.mmformer", patch_size=2, transformer_basic_dims=64, mlp_dim=128)
    return official(
        module,
        side=32,
        size="32³, 2³ tokens of width 64",
        mask_type="idt",
        traps="as RFNet; its own PASSION masks the bottleneck of T2 with the mask of T1 (mmformer.py, line 522), so "
        "that its term for T2 is not that of a run on T2",
    )

"""mmFormer (Zhang et al., MICCAI 2022)."""

from __future__ import annotations

from pathlib import Path

from tools.backbones.checkout import load
from tools.backbones.rfnet import trial_of
from tools.backbones.trial import Trial

SOURCE = "https://github.com/YaoZhang93/mmFormer"
COMMIT = "b18663adbfd0323656083e0470420c8c715c1782"
DATE = "2026-11-25"


def build(checkout: Path) -> Trial:
    """Return the network with 2³ tokens for each modality instead of 8³, and narrow transformers."""
    module = load(checkout / "mmformer", "mmformer", patch_size=2, transformer_basic_dims=64, mlp_dim=128)
    return trial_of(
        module,
        side=32,
        size="32³, 2³ tokens of width 64",
        traps="images must be 128³ (tokens are counted in the code); dropout in `train()`: without "
        "`share_random_state=True` teacher and students see different noise",
    )

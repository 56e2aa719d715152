"""MMMViT: the bottleneck is not masked, and mixes the samples of a batch."""

from __future__ import annotations

from pathlib import Path

from tools.backbones.checkout import load
from tools.backbones.rfnet import trial_of
from tools.backbones.sources import edited, replacing
from tools.backbones.trial import Trial

SOURCE = "https://github.com/qiuchengjian/MMMViT"
COMMIT = "1d0a1edf767c3908484798061450e363a4ed16c1"
DATE = "2026-11-25"


def build(checkout: Path) -> Trial:
    """Return the network for images of 32³ instead of 128³, for prediction: in training it raises an error."""
    with edited({"mmmvit": replacing(("(8, 8, 8)", "(2, 2, 2)"))}):
        module = load(checkout / "MMMViT", "mmmvit", patch_size=2, transformer_basic_dims=64, mlp_dim=64)
    trial = trial_of(
        module,
        side=32,
        size="32³, 2³ tokens of width 64",
        expect="refused",
        reason="the samples of a batch are not independent",
        traps="a softmax over the batch axis mixes samples, and the bottleneck is not masked; `is_training=True` "
        "raises an error in its separate decoder",
    )
    trial.model.is_training = False
    return trial

"""GSS: RFNet that also returns the logits of its uni-modal decoder."""

from __future__ import annotations

from pathlib import Path

from tools.backbones.checkout import load
from tools.backbones.rfnet import trial_of
from tools.backbones.trial import Trial

SOURCE = "https://github.com/qysgithubopen/GSS"
COMMIT = "4af911815a5cc8d619de955a277555c7600d9b46"
DATE = "2026-11-25"


def build(checkout: Path) -> Trial:
    """Return the network that train_GSS.py trains."""
    return trial_of(load(checkout, "models_GSS"), side=16)

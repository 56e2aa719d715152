"""The RFNet in the authors' code of PASSION, with perfect data (pdt): features are masked, the input is not."""

from __future__ import annotations

from pathlib import Path

from tools.backbones.checkout import load
from tools.backbones.passion_rfnet import COMMIT, DATE, SOURCE, official
from tools.backbones.trial import Trial

__all__ = ["COMMIT", "DATE", "SOURCE", "build"]


def build(checkout: Path) -> Trial:
    """Return the network that masks its features only."""
    traps = "as with idt; separate predictions of missing modalities are part of its loss"
    return official(load(checkout / "code", "models.rfnet"), side=16, mask_type="pdt", traps=traps)

"""RobustSeg (Chen et al., MICCAI 2019), the port in IM-Fuse."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from passion_plugin.detection import detect_spec
from tools.backbones.checkout import images, labels, load, on_cpu
from tools.backbones.sources import edited, replacing
from tools.backbones.trial import Trial
from tools.backbones.uhved import COMMIT, DATE, SOURCE

__all__ = ["COMMIT", "DATE", "SOURCE", "build"]

SIZE = 16


# Maps are as large as the code says: 80 voxels a side, and at the coarser levels 40, 20 and 10.
_SMALLER = replacing(
    *((f"{side}, {side}, {side}]", ", ".join([str(side * SIZE // 80)] * 3) + "]") for side in (80, 40, 20, 10)),
    *((f"[{side},{side},{side}]", str([side * SIZE // 80] * 3)) for side in (80, 40, 20)),
)


def task_loss(raw: Mapping[str, Tensor], target: Tensor) -> Tensor:
    """Cross-entropy of the segmentation."""
    return F.nll_loss(raw["seg_pred"].clamp(min=1e-6).log(), target)


def build(checkout: Path) -> Trial:
    """Return the network for images of 16³ instead of 80³."""
    on_cpu()
    torch.manual_seed(0)
    with edited({"RobustSeg": _SMALLER}):
        model = load(checkout / "RobustSeg", "RobustSeg").RobustSeg()
    x, mask = images(SIZE), torch.ones(2, 4, dtype=torch.bool)
    modalities = ("flair", "t1c", "t1", "t2")
    return Trial(
        model=model,
        inputs=(x, mask),
        modalities=modalities,
        spec=detect_spec(model, x, mask, modalities=modalities, classifier="mask_de.seg_logit"),
        written='`spec=detect_spec(…, classifier="mask_de.seg_logit")`: it returns a dictionary of 22 entries',
        traps="needs CUDA; images must be 80³; dropout is on in `eval()` too: teacher and students see different noise",
        expect="exact",
        target=labels(SIZE),
        task_loss=task_loss,
        truth="mask_de.seg_logit",
        size=f"{SIZE}³ instead of 80³",
    )

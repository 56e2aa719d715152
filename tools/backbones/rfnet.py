"""RFNet (Ding et al., ICCV 2021), and what its many descendants have in common with it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.backbones.checkout import images, labels, load
from tools.backbones.trial import Trial

SOURCE = "https://github.com/dyh127/RFNet"
COMMIT = "1e475fa5de4ac3f41f8de3d3102bb8b28383c2c4"
DATE = "2026-11-25"


def fused_nll(raw: Any, target: Tensor) -> Tensor:
    """Cross-entropy of the fused probabilities, the first thing that this family of networks returns in training."""
    return F.nll_loss(raw[0].clamp(min=1e-6).log(), target)


def trial_of(module: ModuleType, *, side: int, **changes: Any) -> Trial:
    """Return the trial of a network of this family, in the mode in which its script trains it.

    Args:
        module: has the class ``Model``.
        side: of the images, which are cubes.
        **changes: fields of the trial that differ from those of RFNet.
    """
    torch.manual_seed(0)
    model = module.Model(num_cls=4)
    model.is_training = True
    fields: dict[str, Any] = {
        "model": model,
        "inputs": (images(side), torch.ones(2, 4, dtype=torch.bool)),
        "modalities": ("flair", "t1ce", "t1", "t2"),
        "spec": None,
        "written": "",
        "traps": "an integer mask masks nothing; `is_training` is not what `train()` switches",
        "expect": "exact",
        "target": labels(side),
        "task_loss": fused_nll,
        "truth": "decoder_fuse.seg_layer",
        "size": f"{side}³",
    }
    return Trial(**{**fields, **changes})


def build(checkout: Path) -> Trial:
    """Return the network as it is."""
    return trial_of(load(checkout, "models"), side=16)

"""The networks in the authors' code of PASSION (Shi et al., ACM MM 2024): RFNet, with imperfect data (idt)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.backbones.checkout import images, labels, load, on_cpu
from tools.backbones.rfnet import trial_of
from tools.backbones.trial import Call, Trial

SOURCE = "https://github.com/Jun-Jie-Shi/PASSION"
COMMIT = "fd308b5fe0dae8f7f061a7d0e8062fa7f670106e"
DATE = "2026-11-25"


def task_loss(raw: Any, target: Tensor) -> Tensor:
    """What train.py adds up where its own PASSION is off: fused, coarse and uni-modal segmentation losses."""
    fused, coarse, separate = raw
    return F.nll_loss(fused.clamp(min=1e-6).log(), target) + coarse.mean() + separate.sum(1).mean()


def official(module: Any, *, side: int, mask_type: str, **changes: Any) -> Trial:
    """Return the trial of a network of this repository, called as train.py does without ``use_passion``."""
    on_cpu()
    target = labels(side)
    one_hot = F.one_hot(target, 4).movedim(-1, 1).float()

    def make(parts: Sequence[Tensor], present: Sequence[bool]) -> Call:
        return (torch.cat(list(parts), dim=1), torch.tensor([present, present]), one_hot), {}

    trial = trial_of(
        module,
        side=side,
        inputs=(images(side), torch.ones(2, 4, dtype=torch.bool), one_hot),
        make=make,
        task_loss=task_loss,
        **{
            "traps": "leave its own `use_passion` off; what it returns in training are losses, which need the target",
            **changes,
        },
    )
    trial.model.mask_type = mask_type
    return trial


def build(checkout: Path) -> Trial:
    """Return the network that masks its input and its features."""
    return official(load(checkout / "code", "models.rfnet"), side=16, mask_type="idt")

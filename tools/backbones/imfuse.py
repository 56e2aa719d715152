"""IM-Fuse (2025): mmFormer with Mamba fusion; a small layer stands in for Mamba, which needs CUDA."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.backbones.checkout import images, labels, load
from tools.backbones.sources import edited, replacing
from tools.backbones.trial import Trial

SOURCE = "https://github.com/AImageLab-zip/IM-Fuse"
COMMIT = "fbbd48eed03eb2aea3decb475d8918419d7d4c47"
DATE = "2026-11-25"


class StandIn(nn.Module):
    """Mixes a sequence (B, L, C) causally, as a selective state space does: gated mean of all that came before."""

    def __init__(self, d_model: int, **_: Any) -> None:
        super().__init__()
        self.enter = nn.Linear(d_model, 2 * d_model)
        self.leave = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, L, C)."""
        value, gate = self.enter(x).chunk(2, dim=-1)
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        return self.leave(value.cumsum(1) / count * F.silu(gate))


def smaller(source: str) -> str:
    """Divide the numbers of tokens, which are cubes in the source, by 4³ and the width by 8; leave Mamba out."""
    source = re.sub(r"\b(128|64|32|16|8)\*\*3", lambda cube: f"{int(cube[1]) // 4}**3", source)
    pairs = ("patch_size = 8", "patch_size = 2"), ("input_patch_size = 128", "input_patch_size = 32")
    source = re.sub(r"\b(4096|512)\b", lambda number: str(int(number[1]) // 8), source)
    return replacing(*pairs, ("from mamba_ssm import Mamba", "Mamba = None"))(source)


def task_loss(raw: tuple[Any, ...], target: Tensor) -> Tensor:
    """Cross-entropy of the fused probabilities."""
    return F.nll_loss(raw[0].clamp(min=1e-6).log(), target)


def build(checkout: Path) -> Trial:
    """Return the network of its training script, with Mamba in the skip connections, for images of 32³."""
    with edited({"IMFuse": smaller}):
        networks = load(checkout / "IMFuse", "IMFuse", Mamba=StandIn)
    torch.manual_seed(0)
    model = networks.IMFuse(num_cls=4, interleaved_tokenization=True, mamba_skip=True)
    model.is_training = True
    return Trial(
        model=model.train(),
        inputs=(images(32), torch.ones(2, 4, dtype=torch.bool)),
        modalities=("flair", "t1ce", "t1", "t2"),
        spec=None,
        written="",
        traps="`mamba_ssm` needs CUDA; images must be 128³; an integer mask masks nothing",
        expect="exact",
        target=labels(32),
        task_loss=task_loss,
        truth="decoder_fuse.seg_layer",
        size="32³ with 2³ tokens of an eighth of the width, another layer in the place of Mamba",
    )

"""SFusion, the port in IM-Fuse, with its mask columns named."""

from __future__ import annotations

from pathlib import Path

import torch

from passion_plugin.detection import detect_spec
from tools.backbones.checkout import images, labels
from tools.backbones.sfusion_port import CHANNELS, COLUMNS, network, task_loss
from tools.backbones.trial import Call, Trial
from tools.backbones.uhved import COMMIT, DATE, SOURCE

__all__ = ["COMMIT", "DATE", "SOURCE", "build"]


def call(parts: list[torch.Tensor], present: list[bool]) -> Call:
    """Return the call in which each modality is switched by its own column."""
    columns = [present[CHANNELS.index(name)] for name in COLUMNS]
    return (torch.cat(list(parts), dim=1), torch.tensor([columns] * len(parts[0]))), {}


def build(checkout: Path) -> Trial:
    """Return the network, called by somebody who has read the error of the other recipe."""
    model = network(checkout)
    x, mask = images(16), torch.ones(2, 4, dtype=torch.bool)
    return Trial(
        model=model,
        inputs=(x, mask),
        make=call,
        modalities=CHANNELS,
        spec=detect_spec(model, x, mask, modalities=CHANNELS, mask_columns=COLUMNS),
        written=f"`spec=detect_spec(…, mask_columns={COLUMNS})`",
        traps="only the first row of the mask is read: batches of one mask, or of one sample; parameters without shape "
        "until the first pass",
        expect="exact",
        target=labels(16),
        task_loss=task_loss,
        truth="mask_decoder.conv_seg",
        size="16³, 2³ tokens, 2 transformer layers",
    )

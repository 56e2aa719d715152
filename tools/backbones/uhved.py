"""U-HVED (Dorent et al., MICCAI 2019), the port in IM-Fuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.backbones.checkout import images, labels, load
from tools.backbones.trial import Call, Trial

SOURCE = "https://github.com/AImageLab-zip/IM-Fuse"
COMMIT = "fbbd48eed03eb2aea3decb475d8918419d7d4c47"
DATE = "2026-11-25"

COLUMNS = ("T1", "T1c", "T2", "Flair")


def call(parts: Sequence[Tensor], present: Sequence[bool]) -> Call:
    """Return the call of its training script; of a single modality the posterior mean is asked for."""
    by_name = dict(zip(COLUMNS, parts, strict=True))
    x = {name: by_name[name] for name in ("Flair", "T1c", "T1", "T2")}
    return (x, torch.tensor([present] * len(parts[0]))), {"is_inference": not all(present)}


def task_loss(raw: tuple[Mapping[str, Tensor], Any], target: Tensor) -> Tensor:
    """Cross-entropy of the segmentation."""
    return F.nll_loss(raw[0]["seg"].clamp(min=1e-6).log(), target)


def build(checkout: Path) -> Trial:
    """Return the network as it is."""
    torch.manual_seed(0)
    model = load(checkout / "UHVED", "UHVED").U_HVED(num_classes=4)
    parts = images(16).split(1, dim=1)
    inputs, keywords = call(parts, [True] * 4)
    return Trial(
        model=model,
        inputs=inputs,
        keywords=keywords,
        images=parts,
        make=call,
        modalities=COLUMNS,
        spec=None,
        written="",
        traps="mask columns are T1, T1c, T2, Flair whatever the order of the images; every encoder returns the same "
        "list at each call; training samples from the posterior, students take its mean",
        expect="exact",
        target=labels(16),
        task_loss=task_loss,
        truth="seg_decoder.conv_out",
        size="16³",
    )

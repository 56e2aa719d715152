"""Dual-stream U-Net (Hafner et al., 2022): radar and optical images in 2-D, and no mask at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from passion_plugin.detection import detect_spec
from tools.backbones.checkout import load
from tools.backbones.sources import edited
from tools.backbones.trial import Call, Trial

SOURCE = "https://github.com/SebastianHafner/MissingModality"
COMMIT = "f4ecfd790a889d5bd221269c5396702d76f0a280"
DATE = "2026-11-25"


def make(parts: Sequence[Tensor], present: Sequence[bool]) -> Call:
    """Return the call with one argument for each sensor."""
    return tuple(parts), {}


CONFIGURATION = SimpleNamespace(
    MODEL=SimpleNamespace(TOPOLOGY=[16, 32]),
    DATALOADER=SimpleNamespace(S1_BANDS=[0, 1], S2_BANDS=[2, 1, 0, 3]),
)


def networks(checkout: Path) -> ModuleType:
    """Return the module with the networks of the repository."""
    with edited(absent=("fvcore", "tabulate")):
        return load(checkout, "utils.networks")


def build(checkout: Path) -> Trial:
    """Build the network with the topology of its debug configuration."""
    torch.manual_seed(0)
    model = networks(checkout).DualStreamUNet(CONFIGURATION)
    parts = [torch.randn(2, 2, 32, 32), torch.randn(2, 4, 32, 32)]
    return Trial(
        model=model.train(),
        inputs=tuple(parts),
        modalities=("s1", "s2"),
        spec=detect_spec(model, tuple(parts), modalities=("s1", "s2"), input_argument=(0, 1), mask_argument=None),
        written="`spec=detect_spec(…, input_argument=(0, 1), mask_argument=None)`; in each call `passion_presence=`",
        traps="no mask: a missing sensor is a blank image, whose features are not zero; the decoder pops from the list "
        "that the encoder returned",
        expect="mixed",
        target=(torch.rand(2, 1, 32, 32) > 0.7).float(),
        task_loss=F.binary_cross_entropy_with_logits,
        truth="outc.conv",
        images=parts,
        make=make,
        call={"passion_presence": torch.ones(2, 2, dtype=torch.bool)},
        size="16 and 32 channels, 32²",
    )

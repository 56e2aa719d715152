"""HeMIS in 2-D of ivadomed: the variance of one modality is NaN, so that none can be let through alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from passion_plugin.backbone import MaskCodec
from passion_plugin.detection import detect_spec
from tools.backbones.checkout import images, load
from tools.backbones.sources import edited
from tools.backbones.trial import Call, Trial

SOURCE = "https://github.com/ivadomed/ivadomed"
COMMIT = "46248ae8206174c4b303a0cadad88754330019f0"
DATE = "2026-11-25"

MODALITIES = ("T1w", "T2w", "T2star")

ROWS = MaskCodec(encode=lambda mask: mask.cpu().numpy(), decode=torch.from_numpy)


def make(parts: Sequence[Tensor], present: Sequence[bool]) -> Call:
    """Return the call with a list of images and a NumPy array with a row for each sample."""
    return (list(parts), ROWS.encode(torch.tensor([list(present)] * len(parts[0])))), {}


def build(checkout: Path) -> Trial:
    """Return the network as it is, with dropout and one region, in 2-D."""
    with edited(absent=("torchvision",)):
        networks = load(checkout / "ivadomed", "models")
    torch.manual_seed(0)
    model = networks.HeMISUnet(MODALITIES, out_channel=1, depth=3)
    # Blocks that every modality shows, with uncertain labels: a teacher that becomes certain within six steps runs
    # away from the heads, and the sum of the losses would say nothing.
    blocks = F.interpolate((images(4, modalities=1, ndim=2) > 0).float(), scale_factor=8)
    parts = (blocks + images(32, modalities=3, ndim=2)).split(1, dim=1)
    target = (torch.rand(blocks.shape) < 0.1 + 0.8 * blocks).float()
    args, _ = make(parts, [True] * 3)
    return Trial(
        model=model.train(),
        inputs=args,
        modalities=MODALITIES,
        spec=detect_spec(model, *args, modalities=MODALITIES, mask_format=ROWS),
        written="`spec=detect_spec(…, mask_format=rows)`, with `rows` a `MaskCodec` for an array of NumPy; "
        "`example_input=`, `example_mask=`",
        traps="the variance of one modality is NaN: none can be let through alone (with `var(0, unbiased=False)` in "
        "its `forward` students are replayed, difference 0); an integer mask picks features instead of masking them",
        expect="heads",
        target=target,
        task_loss=lambda raw, target: F.binary_cross_entropy(raw, target),
        truth="decoder.last_conv",
        images=parts,
        make=make,
        wrap={"example_input": args[0], "example_mask": args[1]},
        size="32²",
    )

"""U-HeMIS as in the original SFusion repository: images as a list, the mask as a number for the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from passion_plugin.backbone import MaskCodec
from passion_plugin.detection import detect_spec
from tools.backbones.checkout import images, labels, load
from tools.backbones.trial import Call, Trial

SOURCE = "https://github.com/scut-cszcl/SFusion"
COMMIT = "dae6d59bab980945b0f78763d2f7f76698e88b56"
DATE = "2026-11-25"

MODALITIES = ("t1ce", "t1", "t2", "flair")

BITS = MaskCodec(
    encode=lambda mask: sum(1 << m for m, here in enumerate(mask[0].tolist()) if here),
    decode=lambda code: torch.tensor([bool(int(code) >> m & 1) for m in range(4)]),
)


def call(parts: Sequence[Tensor], present: Sequence[bool]) -> Call:
    """Return the call with a number whose bits are the modalities."""
    return (list(parts), sum(1 << m for m, here in enumerate(present) if here)), {}


def task_loss(raw: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the logits."""
    return F.cross_entropy(raw, target)


def build(checkout: Path) -> Trial:
    """Return the network with a quarter of the width."""
    torch.manual_seed(0)
    model = load(checkout, "net.Network_HEMIS").U_Hemis3D(feature_maps=8)
    parts = images(16).split(1, dim=1)
    inputs, _ = call(parts, [True] * 4)
    return Trial(
        model=model,
        inputs=inputs,
        images=parts,
        make=call,
        modalities=MODALITIES,
        spec=detect_spec(model, *inputs, modalities=MODALITIES, mask_format=BITS, per_sample_masks=False),
        written="`spec=detect_spec(…, mask_format=bits, per_sample_masks=False)`, with `bits` as in "
        "[your own backbone](own-backbone.md#how-it-is-called)",
        traps="one number says for the whole batch what is there; the decoder reverses the encoders' list in place",
        expect="exact",
        target=labels(16),
        task_loss=task_loss,
        truth="decoder.score",
        size="16³, 8 channels instead of 32",
    )

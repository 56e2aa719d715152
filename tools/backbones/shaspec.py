"""ShaSpec (CVPR 2023): four specific encoders and a shared one that hands its skips over by a side channel."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from passion_plugin.backbone import MaskCodec
from passion_plugin.detection import detect_spec
from tools.backbones.checkout import load
from tools.backbones.sources import edited, replacing
from tools.backbones.trial import Call, Trial

SOURCE = "https://github.com/billhhh/ShaSpec"
COMMIT = "081fe7a1e40d6bbc0736dc93e779a0a5a439d091"
DATE = "2026-11-25"

MODALITIES = ("flair", "t1", "t1ce", "t2")

# "0,2": the modalities of the whole batch.
NUMBERS = MaskCodec(
    encode=lambda mask: ",".join(str(m) for m, here in enumerate(mask[0].tolist()) if here),
    decode=lambda mode: torch.tensor([str(m) in mode.split(",") for m in range(4)]),
)


def region_loss(raw: Any, target: Tensor) -> Tensor:
    """Binary cross entropy of the three regions, the first thing that these networks return."""
    return F.binary_cross_entropy_with_logits(raw[0], target)


def narrower(source: str) -> str:
    """Divide the channels of the networks of this author, which are numbers in the source, by four."""
    source = re.sub(r"\b(1280|320|256|128|64|32)\b", lambda number: str(int(number[0]) // 4), source)
    return replacing(("nn.GroupNorm(16,", "nn.GroupNorm(4,"))(source)


def make(images: Sequence[Tensor], present: Sequence[bool]) -> Call:
    """Return the call with the images along the channels and the numbers of what is there as ``mode``."""
    return (torch.cat(list(images), dim=1),), {"mode": NUMBERS.encode(torch.tensor([list(present)]))}


def build(checkout: Path) -> Trial:
    """Build the network with a quarter of the channels and one block in each stage."""
    narrow = {"DualNet_SS": narrower, "Res50": narrower}
    with edited(narrow, absent=("sklearn", "matplotlib")), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an initialiser that PyTorch has renamed
        networks = load(checkout, "DualNet_SS")
        residual = networks.Res50
        residual.ResNet.arch_settings = {50: (residual.Bottleneck, (1, 1, 1, 1))}
        torch.manual_seed(0)
        model = networks.DualNet_SS(None, norm_cfg="GN", num_classes=3, weight_std=True)
    images = [torch.randn(2, 1, 16, 32, 32) for _ in MODALITIES]
    args, keywords = make(images, [True] * 4)
    return Trial(
        model=model.train(),
        inputs=args,
        keywords=keywords,
        modalities=MODALITIES,
        spec=detect_spec(
            model,
            *args,
            keywords["mode"],
            modalities=MODALITIES,
            outputs="sigmoid",
            mask_argument="mode",
            mask_format=NUMBERS,
        ),
        written='`spec=detect_spec(…, outputs="sigmoid", mask_argument="mode", mask_format=numbers)`, with '
        "`numbers` a `MaskCodec` for text such as `'0,2'`",
        traps="`shared_enc` hands its skips over through an attribute, so that its output alone must not be replayed; "
        "one mode for the batch, and `'random'` draws it inside `forward`: draw it yourself; three overlapping regions",
        expect="exact",
        target=(torch.rand(2, 3, 16, 32, 32) > 0.7).float(),
        task_loss=region_loss,
        truth="shared_dec.cls_conv.0",
        images=images,
        make=make,
        size="a quarter of the channels, one block in each of the four stages, group normalisation, 16×32×32",
    )

"""LCKD (MICCAI 2023): one encoder for all modalities, so that nothing can be replayed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passion_plugin.detection import detect_spec
from tools.backbones.checkout import load
from tools.backbones.shaspec import MODALITIES, NUMBERS, make, narrower, region_loss
from tools.backbones.sources import edited, replacing
from tools.backbones.trial import Trial

SOURCE = "https://github.com/billhhh/LCKD"
COMMIT = "5ba51b5366a74d01906cc8389855bb8e3e1ae42a"
DATE = "2026-11-25"


def task_loss(raw: Any, target: Tensor) -> Tensor:
    """Loss of the regions and the distillation between features that the network adds up in ``forward``."""
    return region_loss(raw, target) + 0.1 * raw[2]


def build(checkout: Path) -> Trial:
    """Build the network with a quarter of the channels and one block in each stage, on the CPU."""

    def on_cpu(source: str) -> str:
        return replacing(("device='cuda'", "device='cpu'"))(narrower(source))

    with edited({"DualNet": on_cpu, "Res50": narrower}, absent=("sklearn", "matplotlib")), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an initialiser that PyTorch has renamed
        networks = load(checkout, "DualNet")
        residual = networks.Res50
        residual.ResNet.arch_settings = {50: (residual.Bottleneck, (1, 1, 1, 1))}
        torch.manual_seed(0)
        model = networks.DualNet(None, norm_cfg="GN", num_classes=3, weight_std=True)
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
            student_kwargs={"val": True},
        ),
        written='`spec=detect_spec(…, outputs="sigmoid", mask_argument="mode", mask_format=numbers, '
        'student_kwargs={"val": True})`, with `numbers` as for ShaSpec',
        traps="needs CUDA; one encoder for all modalities, whose skips travel through an attribute: nothing to replay; "
        "one mode for the batch, and `'random'` draws it inside `forward`: draw it yourself; three overlapping regions",
        expect="rerun",
        target=(torch.rand(2, 3, 16, 32, 32) > 0.7).float(),
        task_loss=task_loss,
        truth="shared_dec.cls_conv.0",
        images=images,
        make=make,
        size="a quarter of the channels, one block in each of the four stages, group normalisation, 16×32×32",
    )

"""ESANet of MMANet (CVPR 2023): RGB and depth in 2-D, and the mask is an attribute."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passion_plugin.backbone import BackboneSpec
from tools.backbones.checkout import labels, load
from tools.backbones.sources import edited, replacing
from tools.backbones.trial import Call, Trial

SOURCE = "https://github.com/shicaiwei123/MMANet-CVPR2023"
COMMIT = "c3306896c0f2e569e27755aa6100399966d29fb5"
DATE = "2026-11-25"

# What depends on depth alone, in front of where it is masked.
DEPTH = ("encoder_depth.conv1", *(f"encoder_depth.layer{level}.{block}" for level in range(1, 5) for block in (0, 1)))


def with_p(net: nn.Module, x: tuple[Tensor, Tensor], mask: Tensor) -> Any:
    """Call the network with its attribute ``p`` set to what is present."""
    before = net.p
    net.p = mask[0].int().tolist()
    try:
        return net(*x)
    finally:
        net.p = before


def build(checkout: Path) -> Trial:
    """Build the network with its smallest encoders, on the CPU and without dropping modalities itself."""
    on_cpu = {"src.models.model": replacing(("p = p.float().cuda()", "p = p.float()"))}
    with edited(on_cpu, absent=("pandas",)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the network's own remarks on its upsampling
        networks = load(checkout / "segmentation", "src.models.model")
        torch.manual_seed(0)
        model = networks.ESANet(
            height=64,
            width=64,
            num_classes=4,
            pretrained_on_imagenet=False,
            upsampling="learned-3x3-zeropad",
            args=SimpleNamespace(p=[1, 1]),
        )
    parts = [torch.randn(2, 3, 64, 64), torch.randn(2, 1, 64, 64)]

    def make(images: Sequence[Tensor], present: Sequence[bool]) -> Call:
        model.p = [int(here) for here in present]
        return tuple(images), {}

    # What the measurement sets holds for one call; then everything is there again.
    model.register_forward_hook(lambda net, *_: setattr(net, "p", [1, 1]))

    return Trial(
        model=model.train(),
        inputs=tuple(parts),
        modalities=("rgb", "depth"),
        spec=BackboneSpec(
            classifier="decoder.conv_out",
            encoders={"rgb": "encoder_rgb.conv1", "depth": DEPTH},
            input_argument=(0, 1),
            mask_argument=None,
            per_sample_masks=False,
            forward_fn=with_p,
        ),
        written='`spec=BackboneSpec(classifier="decoder.conv_out", encoders=…, input_argument=(0, 1), '
        "mask_argument=None, per_sample_masks=False, forward_fn=with_p)`, where `with_p(net, x, mask)` sets `net.p` "
        "around `net(*x)`; in each call `passion_presence=`",
        traps="needs CUDA; the mask is the attribute `p`, and `[0, 0]` draws one inside `forward`: set it yourself; "
        "encoders are called by methods: name their blocks, of RGB the first convolution only, because depth joins it "
        "after each stage; the last layers are a learned up-sampling: name the classifier",
        expect="exact",
        target=labels(64, ndim=2),
        task_loss=lambda raw, target: F.cross_entropy(raw[0], target),
        truth="decoder.conv_out",
        images=parts,
        make=make,
        call={"passion_presence": torch.ones(2, 2, dtype=torch.bool)},
        size="ResNet-18, 64²",
    )

"""MaM: learned tokens for missing modalities in an nnU-Net, as compared with in the repository of IM-Fuse."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passion_plugin.backbone import MaskCodec
from passion_plugin.detection import detect_spec
from tools.backbones.checkout import images, load
from tools.backbones.trial import Call, Trial

SOURCE = "https://github.com/AImageLab-zip/IM-Fuse"
COMMIT = "fbbd48eed03eb2aea3decb475d8918419d7d4c47"
DATE = "2026-11-25"

MODALITIES = ("t2", "t1c", "t1", "flair")

# A list of bools for the batch.
BOOLS = MaskCodec(encode=lambda mask: mask[0].tolist(), decode=torch.tensor)


def call(parts: Sequence[Tensor], present: Sequence[bool]) -> Call:
    """Return the call with a list of bools that holds for the batch."""
    return (torch.cat(list(parts), dim=1), list(present)), {}


def task_loss(raw: Any, target: Tensor) -> Tensor:
    """Binary cross-entropy of the regions at full resolution; deep supervision comes finest first."""
    return F.binary_cross_entropy_with_logits(raw[0][0], target)


def build(checkout: Path) -> Trial:
    """Build the network with four stages, whose last has the 4³ voxels and 128 channels that it insists on."""
    path = list(sys.path)
    networks = load(checkout / "MaM/nnunetv2/utilities/my_dynamic_network_architectures/architectures", "unet")
    sys.path[:] = path  # the module puts its neighbours there
    torch.manual_seed(0)
    model = networks.MultimodalRecon(
        input_channels=4,
        n_stages=4,
        features_per_stage=[16, 32, 64, 512],
        conv_op=nn.Conv3d,
        kernel_sizes=[[3, 3, 3]] * 4,
        strides=[[1, 1, 1], *[[2, 2, 2]] * 3],
        n_conv_per_stage=[1] * 4,
        num_classes=3,
        n_conv_per_stage_decoder=[1] * 3,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    parts = images(32).split(1, dim=1)
    inputs, _ = call(parts, [True] * 4)
    return Trial(
        model=model.train(),
        inputs=inputs,
        images=parts,
        make=call,
        modalities=MODALITIES,
        spec=detect_spec(
            model,
            *inputs,
            modalities=MODALITIES,
            outputs="sigmoid",
            mask_format=BOOLS,
            student_mode={"decoder.deep_supervision": False},
        ),
        written='`spec=detect_spec(…, outputs="sigmoid", mask_format=bools, student_mode={"decoder.deep_supervision": '
        "False})`, with `bools` a `MaskCodec` for a list of bools",
        traps="one list for the batch; images must be 128³; a joint encoder is registered and never runs; three "
        "overlapping regions",
        expect="exact",
        target=(torch.rand(2, 3, 32, 32, 32, generator=torch.Generator().manual_seed(1)) > 0.7).float(),
        task_loss=task_loss,
        truth="decoder.seg_layers.2",
        size="four stages of one convolution, 32³",
    )

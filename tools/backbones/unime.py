"""UniME (CVPR 2026): four convolutional encoders beside one transformer that reads the masked images."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.backbones.checkout import images, labels, load
from tools.backbones.sources import edited
from tools.backbones.trial import Trial

SOURCE = "https://github.com/Hooorace-S/UniME"
COMMIT = "88ef06d68bbf4d74be99db5f3a10fd07d90e690a"
DATE = "2026-11-25"


def task_loss(raw: tuple[Any, ...], target: Tensor) -> Tensor:
    """Cross-entropy of the fused logits."""
    return F.cross_entropy(raw[0], target)


def build(checkout: Path) -> Trial:
    """Return the base model, which checkpoints its encoders, with two narrow transformer blocks for images of 32³."""
    with edited(absent=("timm",)):
        networks = load(checkout, "models.UniME.networks")
    networks._DEFAULT_SCALE_SETTINGS["Base"]["config"] = networks.BackboneConfig(
        in_channels=4,
        crop_shape=(32, 32, 32),
        patch_shape=(8, 8, 8),
        tokens_spatial_shape=(4, 4, 4),
        embed_dim=96,
        num_heads=4,
        depth=2,
        drop_path_rate=0.2,
        patch_drop_rate=0.0,
        num_register_tokens=4,
        use_rotary_pos_embed=False,
    )
    networks.get_scale_spec = lambda _: {"embed_dim": 96, "basic_dims": 8}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there are no pretrained weights
        model = networks.UniMEModel(
            scale="Base", checkpoint_config={"encoder": True, "regularizer": True, "decoder": False}
        )
    model.is_training = True
    return Trial(
        model=model.train(),
        inputs=(images(32), torch.ones(2, 4, dtype=torch.bool)),
        modalities=("flair", "t1ce", "t1", "t2"),
        spec=None,
        written="",
        traps="images must be 96³; the transformer reads the masked images: it runs for each student; logits are "
        'returned: `outputs="sigmoid"` for regions',
        expect="exact",
        target=labels(32),
        task_loss=task_loss,
        truth="decoder_fuse.stages.2.seg_head",
        size="32³ with 4³ tokens, two blocks of 96 channels without rotary embedding, encoders of 8 channels",
    )

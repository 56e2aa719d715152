"""Students for backbones that cannot predict from a single modality: small heads on encoder features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passion_plugin.backbone._prediction import Prediction
from passion_plugin.errors import ConfigError, InputError


class UnimodalHead(nn.Module):
    r"""Predict a segmentation from the features of one encoder.

    Each feature map is projected to ``hidden`` channels by a 1×1 convolution, brought to the size of the
    prediction and summed; normalisation and activation make the features :math:`f_m`, a 1×1 convolution the
    logits. The student of modality m is then this head instead of the backbone with m alone, so distillation
    reaches encoder m but not the shared decoder. Distance and prototypes compare similarity maps, which do not
    need the channels of student and teacher to agree.

    Args:
        in_channels: channels of each feature map of the encoder, in the order in which they come.
        num_classes: K.
        ndim: number of spatial axes, 2 or 3.
        hidden: channels of the features that are compared.

    Raises:
        ConfigError: a number that makes no sense.

    Example:
        >>> import torch
        >>> head = UnimodalHead([8, 16], num_classes=4, ndim=2)
        >>> maps = [torch.rand(2, 8, 16, 16), torch.rand(2, 16, 8, 8)]
        >>> head(maps, size=(16, 16)).logits.shape
        torch.Size([2, 4, 16, 16])
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, ndim: int, hidden: int = 16) -> None:
        super().__init__()
        if not in_channels or ndim not in (2, 3) or num_classes < 1 or hidden < 1:
            raise ConfigError(
                f"UnimodalHead needs at least one feature map, 2 or 3 spatial axes, a class and a hidden channel; got "
                f"in_channels={list(in_channels)}, ndim={ndim}, num_classes={num_classes}, hidden={hidden}"
            )
        convolution = nn.Conv2d if ndim == 2 else nn.Conv3d
        self.ndim = ndim
        self.projections = nn.ModuleList(convolution(channels, hidden, 1) for channels in in_channels)
        self.norm = nn.GroupNorm(1, hidden)
        self.classifier = convolution(hidden, num_classes, 1)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Prediction:
        """Predict.

        Args:
            maps: feature maps (B, C_i, *spatial_i), as many as ``in_channels``.
            size: spatial size of the prediction.

        Returns:
            Logits (B, K, *size) and features (B, hidden, *size).

        Raises:
            InputError: another number of maps.
        """
        if len(maps) != len(self.projections):
            raise InputError(f"this head was built for {len(self.projections)} feature maps, got {len(maps)}")
        mode = "bilinear" if self.ndim == 2 else "trilinear"
        parts = [
            F.interpolate(projection(feature), size=tuple(size), mode=mode, align_corners=False)
            for projection, feature in zip(self.projections, maps, strict=True)
        ]
        features = F.leaky_relu(self.norm(sum(parts[1:], parts[0])), 0.01)
        return Prediction(self.classifier(features), features)


def feature_maps(tensors: Sequence[Tensor], ndim: int) -> list[Tensor]:
    """Return those of an encoder's outputs that are feature maps: floating point, (B, C, *spatial)."""
    return [tensor for tensor in tensors if tensor.ndim == ndim + 2 and tensor.is_floating_point()]


def build_heads(features: dict[str, list[Tensor]], prediction: Prediction, dtype: torch.dtype) -> nn.ModuleList:
    """Build a head for each modality that fits what its encoder returned for an example.

    The dtype is that of the backbone's parameters, since autocast changes that of the features.
    """
    ndim = prediction.logits.ndim - 2
    heads = nn.ModuleList()
    for modality, tensors in features.items():
        channels = [tensor.shape[1] for tensor in feature_maps(tensors, ndim)]
        if not channels:
            raise ConfigError(f"the encoder of {modality!r} returns no feature map to set a UnimodalHead on")
        heads.append(UnimodalHead(channels, prediction.logits.shape[1], ndim))
    return heads.to(prediction.features.device, dtype)

"""The plain network that every zoo animal bends at one place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Net", "block", "column", "conv", "hide"]

CONV = {2: nn.Conv2d, 3: nn.Conv3d}


def conv(inputs: int, outputs: int, size: int = 3, *, dim: int = 2) -> nn.Module:
    """Same-size convolution with bias, so that a zero image has non-zero features."""
    return CONV[dim](inputs, outputs, size, padding=size // 2)


def block(inputs: int, outputs: int, *, dim: int = 2) -> nn.Sequential:
    """Convolution and GELU."""
    return nn.Sequential(conv(inputs, outputs, dim=dim), nn.GELU())


def column(mask: Tensor, index: int, like: Tensor) -> Tensor:
    """Column ``index`` of ``mask`` (B, M), shaped to broadcast against ``like`` (B, ...)."""
    return mask[:, index].reshape(-1, *[1] * (like.ndim - 1))


def hide(feature: Tensor, mask: Tensor, index: int) -> Tensor:
    """``feature`` (B, C, *spatial), zero in the rows without modality ``index``; NaN does not survive it."""
    return torch.where(column(mask, index, feature), feature, torch.zeros((), dtype=feature.dtype))


class Net(nn.Module):
    """One encoder per modality, features masked, concatenated, fused, classified by a 1x1 convolution."""

    dim = 2

    def __init__(
        self,
        modalities: Sequence[str],
        num_classes: int,
        *,
        width: int = 4,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.names = tuple(modalities)
        self.width = width
        self.channels = list(channels or [1] * len(self.names))
        self.add_encoders()
        self.fusion = block(width * len(self.names), width, dim=self.dim)
        self.add_head(num_classes)

    def add_encoders(self) -> None:
        """Register ``{name}_encoder`` for every modality."""
        for name, channels in zip(self.names, self.channels, strict=True):
            self.add_module(f"{name}_encoder", self.make_encoder(channels))

    def make_encoder(self, channels: int) -> nn.Module:
        """One encoder."""
        return block(channels, self.width, dim=self.dim)

    def add_head(self, num_classes: int) -> None:
        """Register ``classifier``."""
        self.classifier = conv(self.width, num_classes, 1, dim=self.dim)

    def encoder(self, index: int) -> nn.Module:
        """The encoder of one modality."""
        return self.get_submodule(f"{self.names[index]}_encoder")

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        """Masked features, one (B, width, *spatial) per modality."""
        return [hide(self.encoder(index)(image), mask, index) for index, image in enumerate(images)]

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B, K, *spatial)."""
        return self.classifier(self.fusion(torch.cat(list(features), dim=1)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """StudentInput ``x`` (B, sum of channels, *spatial) given ``mask`` bool (B, M), True = present."""
        return self.decode(self.encode(x.split(self.channels, dim=1), mask))

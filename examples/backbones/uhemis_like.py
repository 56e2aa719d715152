"""A compact U-HeMIS: hetero-modal segmentation by mean and variance of what is present."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from examples.backbones.blocks import Encoder, UNetDecoder, conv, encode

__all__ = ["UHeMISLike", "mean_and_variance"]


def mean_and_variance(stack: Tensor, mask: Tensor) -> Tensor:
    """First two moments over the modalities that are present.

    The variance is the biased one, so that a single modality gives exactly 0 and not NaN.

    Args:
        stack: (B, M, C, *spatial), zero where absent.
        mask: (B, M) bool.

    Returns:
        (B, 2C, *spatial).
    """
    weight = mask.to(stack.dtype).reshape(*mask.shape, *([1] * (stack.ndim - 2)))
    count = weight.sum(dim=1).clamp(min=1)
    mean = stack.sum(dim=1) / count
    variance = ((stack - mean.unsqueeze(1)).square() * weight).sum(dim=1) / count
    return torch.cat([mean, variance], dim=1)


class UHeMISLike(nn.Module):
    """U-Net with one encoder per modality; every skip is the mean and variance over present modalities.

    After HeMIS (Havaei et al., MICCAI 2016, arXiv:1607.05194) and its U-Net form in Dorent et al.,
    "Hetero-Modal Variational Encoder-Decoder for Joint Modality Completion and Segmentation"
    (MICCAI 2019, arXiv:1907.11150).

    Args:
        modalities: names, in the order of the channels of the input.
        num_classes: K, background included.
        ndim: 2 or 3.
        widths: channels per level; spatial sizes must be multiples of 2^(levels - 1) and leave more than
            one voxel at the coarsest level (instance norm).

    Example:
        >>> import torch
        >>> model = UHeMISLike(("ct", "pet"), num_classes=3, ndim=2)
        >>> model(torch.randn(1, 2, 16, 16), torch.tensor([[True, False]])).shape
        torch.Size([1, 3, 16, 16])
    """

    def __init__(
        self,
        modalities: Sequence[str] = ("flair", "t1ce", "t1", "t2"),
        num_classes: int = 4,
        ndim: int = 3,
        widths: Sequence[int] = (8, 12, 16, 24),
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: Encoder(ndim, widths) for name in modalities})
        self.decoder = UNetDecoder(ndim, [2 * width for width in widths], widths)
        self.classifier = conv(ndim, widths[0], num_classes, kernel=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return logits (B, K, *spatial) for ``x`` (B, M, *spatial) and ``mask`` (B, M) bool."""
        levels = encode(self.encoders, x, mask)
        features = self.decoder([mean_and_variance(level, mask) for level in levels])
        logits: Tensor = self.classifier(features)
        return logits

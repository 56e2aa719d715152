"""Building blocks shared by the reference networks, for two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ConvBlock", "Encoder", "UNetDecoder", "conv", "encode", "keep_present", "upsample_to"]


def conv(ndim: int, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    """Return a 2-D or 3-D convolution that keeps the spatial size at stride 1.

    Raises:
        ValueError: when ``ndim`` is neither 2 nor 3.
    """
    if ndim == 2:
        return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
    if ndim == 3:
        return nn.Conv3d(inputs, outputs, kernel, stride, padding=kernel // 2)
    raise ValueError(f"ndim is {ndim}; these networks are 2-D or 3-D.")


class ConvBlock(nn.Sequential):
    """3-wide convolution, instance norm, leaky ReLU. ``stride=2`` halves every spatial size."""

    def __init__(self, ndim: int, inputs: int, outputs: int, stride: int = 1) -> None:
        norm = nn.InstanceNorm2d if ndim == 2 else nn.InstanceNorm3d
        super().__init__(
            conv(ndim, inputs, outputs, stride=stride),
            norm(outputs, affine=True),
            nn.LeakyReLU(0.1),
        )


class Encoder(nn.Module):
    """One modality's private encoder: (B, 1, *spatial) to a list of features, finest first.

    Level i has ``widths[i]`` channels at the input size divided by 2^i.
    """

    def __init__(self, ndim: int, widths: Sequence[int]) -> None:
        super().__init__()
        inputs = [1, *widths[:-1]]
        self.levels = nn.ModuleList(
            ConvBlock(ndim, before, width, stride=1 if level == 0 else 2)
            for level, (before, width) in enumerate(zip(inputs, widths, strict=True))
        )
        # None at full size: it would cost more than all other levels together.
        self.refine = nn.ModuleList(ConvBlock(ndim, width, width) for width in widths[1:])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of every level."""
        features = [self.levels[0](x)]
        for down, refine in zip(list(self.levels)[1:], self.refine, strict=True):
            hidden = down(features[-1])
            features.append(hidden + refine(hidden))
        return features


class UNetDecoder(nn.Module):
    """From skip features (finest first, ``inputs[i]`` channels) to ``widths[0]`` channels at full size.

    Skips and coarser features are brought to the width of a level by 1-wide convolutions and added, which is
    cheaper than to concatenate them: the decoder is what PASSION runs again for every student.
    """

    def __init__(self, ndim: int, inputs: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        self.skips = nn.ModuleList(
            conv(ndim, skip, width, kernel=1) for skip, width in zip(inputs, widths, strict=True)
        )
        self.ups = nn.ModuleList(
            conv(ndim, below, width, kernel=1) for below, width in zip(widths[1:], widths[:-1], strict=True)
        )
        self.merge = nn.ModuleList(ConvBlock(ndim, width, width) for width in widths)

    def forward(self, skips: Sequence[Tensor]) -> Tensor:
        """Return the features that enter the classifier, (B, widths[0], *spatial)."""
        hidden: Tensor = self.merge[-1](self.skips[-1](skips[-1]))
        for level in reversed(range(len(self.ups))):
            skip = self.skips[level](skips[level])
            hidden = self.merge[level](skip + upsample_to(self.ups[level](hidden), skip))
        return hidden


def upsample_to(x: Tensor, like: Tensor) -> Tensor:
    """Resize ``x`` to the spatial size of ``like``, bi- or trilinearly."""
    mode = "bilinear" if x.ndim == 4 else "trilinear"
    return F.interpolate(x, size=like.shape[2:], mode=mode, align_corners=False)


def keep_present(stack: Tensor, mask: Tensor) -> Tensor:
    """Set absent modalities to zero.

    ``torch.where`` and not a product: whatever an absent modality holds, NaN included, leaves no trace in
    the result.

    Args:
        stack: (B, M, ...) values by modality.
        mask: (B, M) bool, True = present.
    """
    shape = (*mask.shape, *([1] * (stack.ndim - 2)))
    return torch.where(mask.reshape(shape), stack, torch.zeros((), dtype=stack.dtype, device=stack.device))


def encode(encoders: nn.ModuleDict, x: Tensor, mask: Tensor) -> list[Tensor]:
    """Run every modality's encoder and mask what is absent.

    The input is masked too: a NaN that enters an encoder would come back as a NaN in the gradient of its
    weights, even though the features are masked afterwards.

    Args:
        encoders: one :class:`Encoder` per modality, in the order of the channels of ``x``.
        x: (B, M, *spatial).
        mask: (B, M) bool.

    Returns:
        Per level, finest first, the stacked features (B, M, C, *spatial of the level).
    """
    x = keep_present(x, mask)
    features = [encoder(x[:, m : m + 1]) for m, encoder in enumerate(encoders.values())]
    return [keep_present(torch.stack(level, dim=1), mask) for level in zip(*features, strict=True)]

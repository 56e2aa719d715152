"""A compact RFNet: region-aware fusion guided by coarse predictions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from examples.backbones.blocks import ConvBlock, Encoder, UNetDecoder, conv, encode, upsample_to
from passion_plugin.backbone import BackboneSpec

__all__ = ["RFNetLike", "RegionFusion", "rfnet_spec"]


class RegionFusion(nn.Module):
    """Fuse modalities with weights of their own in every coarsely predicted region.

    A coarse head predicts class probabilities p[k]. Each modality is pooled over each region,
    ``d[k, m] = sum_v p[k] f[m] / sum_v p[k]``; a small network turns ``d[k]`` into one weight per modality;
    the fused feature is ``sum_m f[m] * sum_k p[k] w[k, m]``, refined together with the decoder below.
    """

    def __init__(self, ndim: int, num_modalities: int, width: int, below: int, num_classes: int) -> None:
        super().__init__()
        self.coarse = nn.Sequential(
            ConvBlock(ndim, num_modalities * width + below, width), conv(ndim, width, num_classes, kernel=1)
        )
        self.weights = nn.Sequential(
            nn.Linear(num_modalities * width, width), nn.LeakyReLU(0.1), nn.Linear(width, num_modalities)
        )
        self.refine = ConvBlock(ndim, width + below, width)

    def forward(self, stack: Tensor, below: Tensor | None) -> tuple[Tensor, Tensor]:
        """Fuse one level.

        Args:
            stack: (B, M, C, *spatial), zero where absent.
            below: (B, C', *spatial) features of the coarser level, already upsampled; None at the bottom.

        Returns:
            Fused features (B, C, *spatial) and coarse logits (B, K, *spatial).
        """
        context = [] if below is None else [below]
        coarse: Tensor = self.coarse(torch.cat([rearrange(stack, "b m c ... -> b (m c) ..."), *context], dim=1))
        regions = rearrange(coarse.softmax(dim=1), "b k ... -> b k (...)")
        voxels = rearrange(stack, "b m c ... -> b m c (...)")
        mass = reduce(regions, "b k v -> b k 1", "sum") + 1e-5
        pooled = rearrange(einsum(regions, voxels, "b k v, b m c v -> b k m c"), "b k m c -> b k (m c)") / mass
        attention = einsum(regions, self.weights(pooled).sigmoid(), "b k v, b k m -> b m v")
        fused = einsum(attention, voxels, "b m v, b m c v -> b c v").unflatten(2, stack.shape[3:])
        return self.refine(torch.cat([fused, *context], dim=1)), coarse


class RFNetLike(nn.Module):
    """Encoders by modality, a region-aware fusion decoder, and a shared uni-modal decoder for training.

    After Ding, Yu and Yang, "RFNet: Region-aware Fusion Network for Incomplete Multi-modal Brain Tumor
    Segmentation" (ICCV 2021). As there, ``is_training`` (not ``training``) selects the rich output.

    Attributes:
        is_training: when True, ``forward`` returns ``(logits, unimodal, coarse)``: ``unimodal`` is a tuple
            of M logits (B, K, *spatial) of the uni-modal decoder, ``coarse`` a tuple of logits by level,
            finest first, at their own resolution. When False, ``logits`` alone, and the uni-modal decoder
            does not run.

    Args:
        modalities: names, in the order of the channels of the input.
        num_classes: K, background included.
        ndim: 2 or 3.
        widths: channels per level (see :class:`examples.backbones.uhemis_like.UHeMISLike`).

    Example:
        >>> import torch
        >>> model = RFNetLike(("ct", "pet"), num_classes=3, ndim=2)
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
        self.is_training = False
        below = [*widths[1:], 0]
        self.encoders = nn.ModuleDict({name: Encoder(ndim, widths) for name in modalities})
        self.fusion = nn.ModuleList(
            RegionFusion(ndim, len(self.encoders), width, coarser, num_classes)
            for width, coarser in zip(widths, below, strict=True)
        )
        self.classifier = conv(ndim, widths[0], num_classes, kernel=1)
        self.unimodal_decoder = UNetDecoder(ndim, widths, widths)
        self.unimodal_classifier = conv(ndim, widths[0], num_classes, kernel=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor | tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Segment ``x`` (B, M, *spatial) from the modalities that are True in ``mask`` (B, M) bool."""
        levels = encode(self.encoders, x, mask)
        coarse: list[Tensor] = []
        below: Tensor | None = None
        for stack, fusion in zip(reversed(levels), reversed(list(self.fusion)), strict=True):
            if below is not None:
                below = upsample_to(below, stack[:, 0])
            below, prediction = fusion(stack, below)
            coarse.insert(0, prediction)
        logits: Tensor = self.classifier(below)
        if not self.is_training:
            return logits
        unimodal = tuple(
            self.unimodal_classifier(self.unimodal_decoder([level[:, m] for level in levels]))
            for m in range(len(self.encoders))
        )
        return logits, unimodal, tuple(coarse)


def rfnet_spec(modalities: Sequence[str], levels: int = 4) -> BackboneSpec:
    """How PASSION talks to :class:`RFNetLike`, written by hand.

    Detection finds the encoders and the classifier by itself. What only the author knows is which modules
    give coarse predictions worth distilling (level 0 is at full size, so it is left to the classifier) and
    that students do not need what ``is_training`` adds.

    Args:
        modalities: names, in the order of the channels of the input.
        levels: length of ``widths``.
    """
    return BackboneSpec(
        encoders={name: f"encoders.{name}" for name in modalities},
        classifier="classifier",
        deep_supervision=[f"fusion.{level}.coarse" for level in range(1, levels)],
        student_mode={"is_training": False},
    )

"""A compact mmFormer: convolutional encoders with intra- and inter-modal transformers at the bottom."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from examples.backbones.blocks import Encoder, UNetDecoder, conv, encode, keep_present

__all__ = ["MMFormerLike", "TransformerBlock"]


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and MLP on tokens (B, T, C); tokens that are absent are never attended to."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}.")
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor, present: Tensor | None = None) -> Tensor:
        """Return tokens (B, T, C); ``present`` (B, T) bool says which may be attended to (None: all)."""
        query, key, value = rearrange(
            self.qkv(self.norm(tokens)), "b t (three h c) -> three b h t c", three=3, h=self.heads
        )
        allowed = None
        if present is not None:
            # With nothing present a softmax over no keys is NaN; letting all (zero) tokens in is finite.
            allowed = (present | ~present.any(dim=1, keepdim=True))[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        tokens = tokens + self.out(rearrange(attended, "b h t c -> b t (h c)"))
        return tokens + self.mlp(tokens)


class IntraModal(nn.Module):
    """One modality's tokens: 1x1 convolution, position embedding, transformer."""

    def __init__(self, ndim: int, width: int, grid: int = 4) -> None:
        super().__init__()
        self.embed = conv(ndim, width, width, kernel=1)
        self.position = nn.Parameter(0.02 * torch.randn(1, width, *([grid] * ndim)))
        self.transformer = TransformerBlock(width)

    def forward(self, features: Tensor) -> Tensor:
        """Return tokens (B, T, C) for the coarsest features (B, C, *spatial), at any spatial size."""
        mode = "bilinear" if features.ndim == 4 else "trilinear"
        position = F.interpolate(self.position, size=features.shape[2:], mode=mode, align_corners=False)
        tokens: Tensor = self.transformer(rearrange(self.embed(features) + position, "b c ... -> b (...) c"))
        return tokens


class MMFormerLike(nn.Module):
    """Private encoder, 1x1 convolution and transformer per modality, one transformer over all of them.

    After Zhang et al., "mmFormer: Multimodal Medical Transformer for Incomplete Multimodal Learning of Brain
    Tumor Segmentation" (MICCAI 2022, arXiv:2206.02425). The private path of a modality is
    ``encoders.<name>`` and ``intra.<name>``. Unlike there, absent modalities are left out of the attention
    and not only set to zero.

    Args:
        modalities: names, in the order of the channels of the input.
        num_classes: K, background included.
        ndim: 2 or 3.
        widths: channels per level, the last a multiple of 4 (see
            :class:`examples.backbones.uhemis_like.UHeMISLike`).

    Example:
        >>> import torch
        >>> model = MMFormerLike(("ct", "pet"), num_classes=3, ndim=2)
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
        self.intra = nn.ModuleDict({name: IntraModal(ndim, widths[-1]) for name in modalities})
        self.inter = TransformerBlock(widths[-1])
        self.decoder = UNetDecoder(ndim, [len(self.encoders) * width for width in widths], widths)
        self.classifier = conv(ndim, widths[0], num_classes, kernel=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return logits (B, K, *spatial) for ``x`` (B, M, *spatial) and ``mask`` (B, M) bool."""
        levels = encode(self.encoders, x, mask)
        bottom = levels[-1]
        tokens = torch.stack([intra(bottom[:, m]) for m, intra in enumerate(self.intra.values())], dim=1)
        tokens = keep_present(tokens, mask)
        present = repeat(mask, "b m -> b (m t)", t=tokens.shape[2])
        mixed = self.inter(rearrange(tokens, "b m t c -> b (m t) c"), present)
        mixed = keep_present(rearrange(mixed, "b (m t) c -> b m c t", m=mask.shape[1]), mask)
        levels[-1] = mixed.unflatten(3, bottom.shape[3:])
        features = self.decoder([rearrange(level, "b m c ... -> b (m c) ...") for level in levels])
        logits: Tensor = self.classifier(features)
        return logits

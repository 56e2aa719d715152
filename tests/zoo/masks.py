"""How presence is told, mistold, or not told at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from passion_plugin.backbone import MaskCodec

from .blocks import Net, column, hide
from .entry import THREE, one_subset, zoo


def image_of(images: list[Tensor]) -> Tensor:
    """All modalities along the channels."""
    return torch.cat(images, dim=1)


@zoo(
    pack=lambda images, presence: ((image_of(images),), {"available": presence}),
    spec={"mask_argument": "available"},
    example=lambda x, available: (x, available),
)
class KeywordMask(Net):
    """The mask is keyword-only and has another name."""

    def forward(self, x: Tensor, *, available: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, available)


@zoo(
    pack=lambda images, presence: ((presence, image_of(images)), {}),
    spec={"mask_argument": 0, "input_argument": 1},
    example=lambda mask, x: (x, mask),
)
class MaskFirst(Net):
    """The mask comes before the image."""

    def forward(self, mask: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, mask)


@zoo(
    pack=lambda images, presence: ((image_of(images), presence.float()), {}),
    spec={"mask_format": "float"},
    nan_safe=False,
)
class FloatMask(Net):
    """A float mask that multiplies features, so that NaN in an absent image would pass."""

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        return [self.encoder(index)(image) * column(mask, index, image) for index, image in enumerate(images)]


@zoo(
    pack=lambda images, presence: ((image_of(images), presence.long()), {}),
    spec={"mask_format": "int"},
    nan_safe=False,
)
class IntegerMask(FloatMask):
    """An int64 mask, used as a factor and not as an index."""


@zoo(pack=lambda images, presence: ((image_of(images), ~presence), {}), spec={"mask_meaning": "missing"})
class OneIsMissing(Net):
    """True says "missing"."""

    def forward(self, x: Tensor, drop: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, ~drop)


@zoo(
    pack=lambda images, presence: ((image_of(images), presence[0].nonzero().flatten().tolist()), {}),
    presence=one_subset,
    spec={"mask_format": "indices", "per_sample_masks": False},
)
class IndicesForTheBatch(Net):
    """A list of present modalities that holds for the whole batch."""

    def forward(self, x: Tensor, subset: list[int]) -> Tensor:  # type: ignore[override]
        mask = torch.zeros(len(x), len(self.names), dtype=torch.bool)
        mask[:, subset] = True
        return super().forward(x, mask)


def bit_code(mask: Tensor) -> int:
    """Bit m set when modality m is present; one code for the batch."""
    return sum(1 << index for index, here in enumerate(mask[0].tolist()) if here)


def bits(code: int) -> Tensor:
    """The way back, bool (M,)."""
    return torch.tensor([bool(code >> index & 1) for index in range(len(THREE))])


@zoo(
    pack=lambda images, presence: ((image_of(images), bit_code(presence)), {}),
    presence=one_subset,
    spec={"mask_format": MaskCodec(bit_code, bits), "per_sample_masks": False},
)
class BitCode(Net):
    """One integer bit code for the whole batch."""

    def forward(self, x: Tensor, code: int) -> Tensor:  # type: ignore[override]
        return super().forward(x, bits(code).expand(len(x), -1))


@zoo(
    pack=lambda images, presence: ((image_of(images), presence[:, [1, 2, 0]]), {}),
    spec={"mask_columns": ("t1ce", "t1", "flair")},
)
@zoo(
    "permuted_mask_undeclared",
    expected="refused",
    reason=r"column 0 switches 't1ce'.*mask_columns=\('t1ce', 't1', 'flair'\)",
)
class PermutedMask(Net):
    """Mask columns are (t1ce, t1, flair) while channels are (flair, t1ce, t1)."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask[:, [2, 0, 1]])


@zoo(rung="mixed", nan_safe=False)
class MaskWithoutEffect(Net):
    """The mask is accepted and ignored; only blanking the input hides a modality."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.decode([self.encoder(index)(image) for index, image in enumerate(x.split(1, dim=1))])


@zoo(
    pack=lambda images, presence: ((image_of(images),), {}),
    spec={"mask_argument": None},
    rung="mixed",
    nan_safe=False,
)
class NoMask(Net):
    """No mask argument: absent means a zero image, whose features are not zero because of the bias."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.decode([self.encoder(index)(image) for index, image in enumerate(x.split(1, dim=1))])


@zoo(pack=lambda images, presence: ((image_of(images),), {}), spec={"mask_argument": None})
class MaskFromZeros(Net):
    """No mask argument: what is missing is read off all-zero channels."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, (x != 0).flatten(2).any(dim=2))


@zoo()
class OptionalMask(Net):
    """The mask may be left out."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            mask = torch.ones(len(x), len(self.names), dtype=torch.bool)
        return super().forward(x, mask)


@zoo(rung="mixed", nan_safe=False)
class LeakyBottleneck(Net):
    """Skips are masked, a bottleneck is not: content of a masked modality leaks, as in MMMViT."""

    def decode_with(self, shown: Sequence[Tensor], raw: Sequence[Tensor]) -> Tensor:
        """Logits from masked features plus the mean of unmasked ones."""
        fused = self.fusion(torch.cat(list(shown), dim=1))
        return self.classifier(fused + torch.stack(list(raw)).mean(dim=0))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        raw = [self.encoder(index)(image) for index, image in enumerate(x.split(1, dim=1))]
        return self.decode_with([hide(feature, mask, index) for index, feature in enumerate(raw)], raw)


@zoo(presence=one_subset, by_hand={"per_sample_masks": False})
class FirstRowOnly(Net):
    """Takes a mask per sample but reads the first row only."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, mask[:1].expand(len(x), -1))


@zoo(
    expected="refused",
    reason=r"samples of a batch are not independent",
)
@zoo(
    "mixes_the_batch_with_one_mask",
    presence=one_subset,
    spec={"per_sample_masks": False},
    reference="batch",
)
class MixesTheBatch(Net):
    """A softmax over the batch axis: what one sample gets depends on the others."""

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        fused = self.fusion(torch.cat(list(features), dim=1))
        return self.classifier(fused * (3 * fused.mean(dim=(1, 2, 3), keepdim=True)).softmax(dim=0))


@zoo()
class StoresTheMask(Net):
    """The forward keeps the mask on the module and reads it back in the decoder."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.present = mask
        return self.decode(self.encode(x.split(1, dim=1), self.present))

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        share = self.present.to(features[0].dtype).mean(dim=1).view(-1, 1, 1, 1)
        return super().decode([feature * share for feature in features])


@zoo(expected="refused", reason=r"batch of one .* is the mask used as an index")
class IntegerIndexTrap(Net):
    """``y[mask] = x[mask]`` with an int64 mask: indexes rows instead of masking and hides nothing."""

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        x = torch.stack([self.encoder(index)(image) for index, image in enumerate(images)], dim=1)
        y = x.clone()
        y[mask.long()] = x[mask.long()]
        return list(y.unbind(1))

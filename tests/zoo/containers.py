"""What encoders return, and what others do to it afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .blocks import Net, block, column, conv, hide
from .entry import zoo


class TwoLevels(nn.Module):
    """Encoder with a skip and a deep feature; subclasses choose the container."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = block(channels, width)
        self.second = nn.Sequential(nn.AvgPool2d(2), block(width, width))

    def forward(self, image: Tensor) -> Any:
        skip = self.first(image)
        return [skip, self.second(skip)]


class Skips(Net):
    """Two-level network: deep features fused, up-sampled, joined with the fused skips."""

    encoder_class: type[nn.Module] = TwoLevels

    def __init__(self, modalities: Sequence[str], num_classes: int, **options: Any) -> None:
        super().__init__(modalities, num_classes, **options)
        self.deep_fusion = block(self.width * len(self.names), self.width)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")

    def make_encoder(self, channels: int) -> nn.Module:
        return self.encoder_class(channels, self.width)

    def levels(self, returned: Any) -> tuple[Tensor, Tensor]:
        """Skip and deep feature out of whatever the encoder returned."""
        skip, deep = returned
        return skip, deep

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        returned = [self.encoder(index)(image) for index, image in enumerate(x.split(self.channels, dim=1))]
        pairs = [self.levels(item) for item in returned]
        skips = torch.cat([hide(skip, mask, index) for index, (skip, _) in enumerate(pairs)], dim=1)
        deeps = torch.cat([hide(deep, mask, index) for index, (_, deep) in enumerate(pairs)], dim=1)
        return self.classifier(self.fusion(skips) + self.up(self.deep_fusion(deeps)))


@zoo()
class TupleFeatures(Skips):
    """Encoders return a list of two scales."""


class Reusing(TwoLevels):
    """Keeps one list for life."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width)
        self.flow: list[Tensor] = []

    def forward(self, image: Tensor) -> list[Tensor]:
        self.flow.clear()
        self.flow.append(self.first(image))
        self.flow.append(self.second(self.flow[0]))
        return self.flow


@zoo(copies=False)
class SameListEveryCall(Skips):
    """The encoder returns the same list every call: holding it means holding the next call's content."""

    encoder_class = Reusing


@zoo()
class DecoderPops(Skips):
    """The decoder pops the features off the encoder's list: a list kept by reference is empty afterwards."""

    def levels(self, returned: list[Tensor]) -> tuple[Tensor, Tensor]:
        deep = returned.pop()
        return returned.pop(), deep


@zoo()
class DecoderReverses(Skips):
    """The decoder reverses the encoder's list in place: every second replay would be upside down."""

    def levels(self, returned: list[Tensor]) -> tuple[Tensor, Tensor]:
        returned.reverse()
        deep, skip = returned
        return skip, deep


class InDict(TwoLevels):
    """Returns a dict."""

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        skip = self.first(image)
        return {"skip": skip, "deep": self.second(skip)}


@zoo()
class DictFeatures(Skips):
    """Encoders return dicts, from which the decoder deletes what it has used."""

    encoder_class = InDict

    def levels(self, returned: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return returned.pop("skip"), returned.pop("deep")


class Pair(NamedTuple):
    """Skip and deep feature by name."""

    skip: Tensor
    deep: Tensor


class InNamedTuple(TwoLevels):
    """Returns a named tuple."""

    def forward(self, image: Tensor) -> Pair:
        return Pair(*super().forward(image))


@zoo()
class NamedTupleFeatures(Skips):
    """Encoders return named tuples that are read by attribute."""

    encoder_class = InNamedTuple

    def levels(self, returned: Pair) -> tuple[Tensor, Tensor]:
        return returned.skip, returned.deep


class InNest(TwoLevels):
    """Returns tensors inside tuples inside lists, with a number and a None among them."""

    def forward(self, image: Tensor) -> Any:
        skip = self.first(image)
        return (skip, [None, 2, {"deep": (self.second(skip),)}])


@zoo()
class NestedFeatures(Skips):
    """Encoders return a nest of tuple, list and dict with entries that are no tensors."""

    encoder_class = InNest

    def levels(self, returned: Any) -> tuple[Tensor, Tensor]:
        skip, (_, _, rest) = returned
        return skip, rest["deep"][0]


@dataclass
class Levels:
    """Skip and deep feature as a dataclass, which torch's pytree does not open."""

    skip: Tensor
    deep: Tensor


class InDataclass(TwoLevels):
    """Returns a dataclass."""

    def forward(self, image: Tensor) -> Levels:
        return Levels(*super().forward(image))


@zoo(by_hand={"students": "rerun"}, rung="replay")
class DataclassFeatures(Skips):
    """Encoders return dataclass instances that the decoder overwrites."""

    encoder_class = InDataclass

    def levels(self, returned: Levels) -> tuple[Tensor, Tensor]:
        skip, deep = returned.skip, returned.deep
        returned.skip = returned.deep = torch.zeros(())
        return skip, deep


@zoo(by_hand={"copy_features": True})
class InPlaceActivation(Net):
    """In-place ReLU inside the encoder and in-place scaling right after it: the returned tensor changes."""

    def make_encoder(self, channels: int) -> nn.Module:
        return nn.Sequential(conv(channels, self.width), nn.ReLU(inplace=True), conv(self.width, self.width))

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        features = []
        for index, image in enumerate(images):
            feature = self.encoder(index)(image)
            feature.mul_(1.5).add_(0.1)
            features.append(hide(torch.relu_(feature), mask, index))
        return features


@zoo(by_hand={"copy_features": True})
class InPlaceMasking(Net):
    """``feature[~mask] = 0`` writes into the encoder's own output, and again into the stack."""

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        features = []
        for index, image in enumerate(images):
            feature = self.encoder(index)(image)
            feature[~mask[:, index]] = 0
            features.append(feature)
        return features

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        stack = torch.stack(list(features), dim=1)
        stack[:, 0] *= 0.5
        return super().decode(stack.unbind(1))


@zoo()
class MaskedByIndex(Net):
    """``y[mask] = x[mask]`` as in RFNet and mmFormer: with an integer mask it would silently mask nothing."""

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        x = torch.stack([self.encoder(index)(image) for index, image in enumerate(images)], dim=1)
        y = torch.zeros_like(x)
        y[mask, ...] = x[mask, ...]
        return list(y.unbind(1))


@zoo()
class MaskedTwice(Net):
    """Input and features are masked, as in the IDT variants of the published networks."""

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        return super().encode([hide(image, mask, index) for index, image in enumerate(images)], mask)


@zoo(by_hand={"students": "rerun"}, rung="replay")
class EncoderSeesTheMask(Net):
    """The encoder is called with its column of the mask as a second argument and returns masked features."""

    class Gated(nn.Module):
        """Encoder with a gate."""

        def __init__(self, channels: int, width: int) -> None:
            super().__init__()
            self.body = block(channels, width)

        def forward(self, image: Tensor, *, gate: Tensor) -> Tensor:
            feature = self.body(image)
            return torch.where(gate, feature, torch.zeros_like(feature))

    def make_encoder(self, channels: int) -> nn.Module:
        return self.Gated(channels, self.width)

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        return [self.encoder(i)(image, gate=column(mask, i, image)) for i, image in enumerate(images)]

"""How images come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .blocks import Net, hide
from .entry import THREE, Arguments, blank, zoo


def as_list(images: list[Tensor], presence: Tensor) -> Arguments:
    """Images as a list."""
    return (images, presence), {}


def as_dict(images: list[Tensor], presence: Tensor) -> Arguments:
    """Images by name, in another order than the mask columns."""
    return ({name: image for name, image in reversed(list(zip(THREE, images, strict=True)))}, presence), {}


def as_positional(images: list[Tensor], presence: Tensor) -> Arguments:
    """One positional argument per modality, then the mask."""
    return (*images, presence), {}


@zoo(pack=as_list)
class ListInput(Net):
    """A list of images, which the forward empties: the caller's list must survive."""

    def forward(self, x: list[Tensor], mask: Tensor) -> Tensor:
        images = [x[index] for index in range(len(self.names))]
        return self.decode(self.encode(images, mask))


@zoo(pack=as_dict)
class DictInput(Net):
    """A mapping from modality name to image, in its own order."""

    def forward(self, x: Mapping[str, Tensor], mask: Tensor) -> Tensor:
        return self.decode(self.encode([x[name] for name in self.names], mask))


@zoo(channels=(2, 2, 2), options={"channels": (2, 2, 2)})
class MultiChannel(Net):
    """Two channels per modality, six in the tensor."""


def blank_unequal(x: Tensor, mask: Tensor) -> Tensor:
    """Blank what is absent in a tensor with 1 + 3 + 2 channels."""
    parts = x.split([1, 3, 2], dim=1)
    return torch.cat([blank(part, mask[:, index]) for index, part in enumerate(parts)], dim=1)


@zoo(
    channels=(1, 3, 2),
    options={"channels": (1, 3, 2)},
    spec={
        "fill_missing": blank_unequal,
        "encoders": {name: f"{name}_encoder" for name in THREE},
        "classifier": "classifier",
        "students": "replay",
    },
)
class UnequalChannels(Net):
    """1 + 3 + 2 channels in one tensor: equal splitting would be wrong."""


@zoo(
    modalities=("optical", "radar"),
    channels=(3, 2),
    options={"channels": (3, 2)},
    pack=as_positional,
    spec={"input_argument": (0, 1), "mask_argument": 2},
    example=lambda optical, radar, mask: ((optical, radar), mask),
)
class TwoTensors(Net):
    """Two positional tensors with different channel counts."""

    def forward(self, optical: Tensor, radar: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return self.decode(self.encode([optical, radar], mask))


def stacked(images: list[Tensor], presence: Tensor) -> Arguments:
    """Images stacked to (B, M, C, *spatial)."""
    return (torch.stack(images, dim=1), presence), {}


@zoo(pack=stacked)
class ExtraAxis(Net):
    """Images as (B, M, C, H, W), an axis of their own for the modalities."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.decode(self.encode(list(x.unbind(1)), mask))


@zoo()
class WritesIntoItsInput(Net):
    """The forward normalises its input in place: the caller's tensor changes, and so must nothing of ours."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x.mul_(0.5)
        return super().forward(x, mask)


def call_scaled(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Call with the extra argument."""
    return model(x, mask, scale=torch.full((3,), 0.5))


@zoo(
    pack=lambda images, presence: ((torch.cat(images, 1), presence), {"scale": torch.full((3,), 0.5)}),
    spec={"forward_fn": call_scaled, "classifier": "classifier"},
    example=lambda x, mask, scale: (x, mask),
)
class ExtraArgument(Net):
    """A keyword tensor of K entries travels along and must not be cut into rows."""

    def forward(self, x: Tensor, mask: Tensor, *, scale: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, mask) * scale.view(1, -1, 1, 1)


@zoo()
class JointBranch(Net):
    """Besides its encoders the network reads the masked image as a whole, so replay saves only a part."""

    def add_encoders(self) -> None:
        super().add_encoders()
        self.joint = self.make_encoder(sum(self.channels))

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        shown = torch.cat([hide(image, mask, index) for index, image in enumerate(images)], dim=1)
        features = super().encode(images, mask)
        features[0] = features[0] + self.joint(shown)
        return features

"""Where encoders live and how they are called."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Net, block, conv, hide
from .entry import zoo


@zoo("plain", rung="replay")
@zoo("two_modalities", modalities=("pd", "t2"))
@zoo("six_modalities", modalities=("adc", "dwi", "flair", "t1", "t1ce", "t2"))
@zoo("two_classes", num_classes=2)
@zoo("seven_classes", num_classes=7)
@zoo("float64", dtype=torch.float64)
class Plain(Net):
    """Nothing awkward: the yardstick."""


@zoo("volumes", spatial=(4, 6, 4))
class Volumes(Net):
    """Three-dimensional images, no side equal to the batch size everywhere."""

    dim = 3


@zoo(encoders=(), rung="rerun")
class SharedEncoder(Net):
    """One encoder called once per modality: its calls cannot be told apart by name."""

    def add_encoders(self) -> None:
        self.shared = self.make_encoder(1)

    def encoder(self, index: int) -> nn.Module:
        return self.shared


@zoo(encoders=())
class SharedAndSpecific(Net):
    """A specific encoder per modality followed by a shared one: only the first half may be replayed alone."""

    def add_encoders(self) -> None:
        super().add_encoders()
        self.shared = self.make_encoder(self.width)

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        return [self.shared(feature) for feature in super().encode(images, mask)]


@zoo(encoders=("encoders.{i}",))
class EncoderList(Net):
    """Encoders in a ModuleList: no names to match, only positions."""

    def add_encoders(self) -> None:
        self.encoders = nn.ModuleList(self.make_encoder(channels) for channels in self.channels)

    def encoder(self, index: int) -> nn.Module:
        return self.encoders[index]


@zoo(encoders=("encoders.{name}",))
class EncoderDict(Net):
    """Encoders in a ModuleDict that is registered in another order than the mask columns."""

    def add_encoders(self) -> None:
        self.encoders = nn.ModuleDict({name: self.make_encoder(1) for name in reversed(self.names)})

    def encoder(self, index: int) -> nn.Module:
        return self.encoders[self.names[index]]


@zoo(encoders=("levels.0.{i}", "levels.1.{i}"))
class LevelsThenModalities(Net):
    """``levels[level][modality]``: a modality is spread over several containers."""

    def add_encoders(self) -> None:
        first = nn.ModuleList(block(1, self.width) for _ in self.names)
        second = nn.ModuleList(block(self.width, self.width) for _ in self.names)
        self.levels = nn.ModuleList([first, second])

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        features = list(images)
        for level in self.levels:
            features = [encoder(feature) for encoder, feature in zip(level, features, strict=True)]
        return [hide(feature, mask, index) for index, feature in enumerate(features)]


class Tokens(nn.Module):
    """Self-attention among the positions of one modality."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)

    def forward(self, feature: Tensor) -> Tensor:
        tokens = feature.flatten(2).transpose(1, 2)
        query, key, value = self.mix(self.norm(tokens)).chunk(3, dim=-1)
        tokens = tokens + F.scaled_dot_product_attention(query, key, value)
        return tokens.transpose(1, 2).reshape(feature.shape)


@zoo(encoders=("{name}_encoder", "{name}_encode_conv", "{name}_transformer"))
class LongPrivatePath(Net):
    """Encoder, 1x1 convolution, parameter of the parent and transformer per modality, as in mmFormer."""

    def add_encoders(self) -> None:
        super().add_encoders()
        for name in self.names:
            self.add_module(f"{name}_encode_conv", conv(self.width, self.width, 1))
            self.add_module(f"{name}_transformer", Tokens(self.width))
            self.register_parameter(f"{name}_position", nn.Parameter(torch.randn(1, self.width, 8, 8)))

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        features = []
        for index, (name, image) in enumerate(zip(self.names, images, strict=True)):
            feature = self.get_submodule(f"{name}_encode_conv")(self.encoder(index)(image))
            feature = self.get_submodule(f"{name}_transformer")(feature + self.get_parameter(f"{name}_position"))
            features.append(hide(feature, mask, index))
        return features


@zoo(private=False, private_modules=False)
class TiedEncoders(Net):
    """The first and the last modality use one module under two names: neither can be replayed by name."""

    def add_encoders(self) -> None:
        super().add_encoders()
        self.add_module(f"{self.names[-1]}_encoder", self.encoder(0))


@zoo(private=False)
class TiedWeights(Net):
    """Two encoders are separate modules that share one weight tensor: replay is fine, gradients add up."""

    def add_encoders(self) -> None:
        super().add_encoders()
        self.encoder(2)[0].weight = self.encoder(0)[0].weight  # type: ignore[index]


class Staged(nn.Module):
    """An encoder that is never called itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv(1, width)
        self.body = block(width, width)

    def first(self, image: Tensor) -> Tensor:
        return F.gelu(self.stem(image))

    def second(self, feature: Tensor) -> Tensor:
        return self.body(feature)


@zoo(encoders=("{name}_encoder",))
class CalledByMethods(Net):
    """Encoders used through methods: ``encoder.forward`` never runs, so overriding it replays nothing."""

    def make_encoder(self, channels: int) -> nn.Module:
        return Staged(self.width)

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        encoders = [self.encoder(index) for index in range(len(images))]
        features = [encoder.first(image) for encoder, image in zip(encoders, images, strict=True)]
        features = [encoder.second(feature) for encoder, feature in zip(encoders, features, strict=True)]
        return [hide(feature, mask, index) for index, feature in enumerate(features)]


@zoo()
class EncoderCalledTwice(Net):
    """Each encoder sees the image and its mirror image: two calls per forward, in order."""

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        features = []
        for index, image in enumerate(images):
            encoder = self.encoder(index)
            features.append(hide(encoder(image) + 0.5 * encoder(image.flip(-1)), mask, index))
        return features


@zoo()
class AbsentSkipped(Net):
    """Encoders of modalities that no sample has do not run, so the number of calls depends on the mask."""

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        features = []
        for index, image in enumerate(images):
            if mask[:, index].any():
                features.append(hide(self.encoder(index)(image), mask, index))
            else:
                features.append(image.new_zeros(len(image), self.width, *image.shape[2:]))
        return features


class Remembering(nn.Module):
    """Keeps its skip feature on itself and returns only the deep one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = block(1, width)
        self.second = block(width, width)
        self.skip: Tensor | None = None

    def forward(self, image: Tensor) -> Tensor:
        self.skip = self.first(image)
        return self.second(self.skip)


@zoo(by_hand={"students": "rerun"}, rung="replay", copies=False)
class SideChannel(Net):
    """Skips travel on ``encoder.skip``: replaying what an encoder returns leaves the skip of another pass."""

    def make_encoder(self, channels: int) -> nn.Module:
        return Remembering(self.width)

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        features = []
        for index, image in enumerate(images):
            encoder = self.encoder(index)
            deep = encoder(image)
            features.append(hide(deep + encoder.skip, mask, index))
        return features


@zoo(encoders=(), copies=False, rung="rerun")
class SideChannelShared(Net):
    """A shared encoder on the stacked batch keeps its skips on itself, as in ShaSpec."""

    def add_encoders(self) -> None:
        self.shared = Remembering(self.width)

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        shown = [hide(image, mask, index) for index, image in enumerate(images)]
        deep = self.shared(torch.cat(shown))
        parts = (deep + self.shared.skip).chunk(len(images))
        return [hide(part, mask, index) for index, part in enumerate(parts)]


@zoo(encoders=(), rung="rerun")
class GroupedConvolution(Net):
    """One grouped convolution holds all encoders: no module belongs to one modality."""

    def add_encoders(self) -> None:
        self.grouped = nn.Conv2d(len(self.names), self.width * len(self.names), 3, padding=1, groups=len(self.names))

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        features = F.gelu(self.grouped(torch.cat(list(images), dim=1))).chunk(len(images), dim=1)
        return [hide(feature, mask, index) for index, feature in enumerate(features)]


@zoo(encoders=(), rung="rerun")
class FunctionalEncoders(Net):
    """Encoders are bare parameters and F.conv2d: there is no encoder module at all."""

    def add_encoders(self) -> None:
        self.kernels = nn.ParameterList(torch.randn(self.width, 1, 3, 3) for _ in self.names)

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        features = [F.gelu(F.conv2d(x, k, padding=1)) for x, k in zip(images, self.kernels, strict=True)]
        return [hide(feature, mask, index) for index, feature in enumerate(features)]


@zoo()
class LazyEncoders(Net):
    """Lazy convolutions: no parameters before the first forward."""

    def make_encoder(self, channels: int) -> nn.Module:
        return nn.Sequential(nn.LazyConv2d(self.width, 3, padding=1), nn.GELU())


@zoo(encoders=("inner.{name}_encoder",), classifier="inner.classifier")
class Delegating(nn.Module):
    """Custom ``__getattr__`` that hands unknown names to an inner network, as many wrappers do."""

    def __init__(self, modalities: Sequence[str], num_classes: int) -> None:
        super().__init__()
        self.inner = Net(modalities, num_classes)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x, mask)


@zoo()
class PermissiveGetattr(Net):
    """``__getattr__`` answers None for every unknown public name, so ``hasattr`` is always true."""

    def __init__(self, modalities: Sequence[str], num_classes: int) -> None:
        super().__init__(modalities, num_classes)
        self.permissive = True

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "permissive" not in self.__dict__:
                raise
            return None

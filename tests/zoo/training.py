"""What acts while training: normalisation, noise, checkpoints, parametrisations, compilers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from .blocks import Net, block, conv, hide
from .entry import zoo


@zoo(reference="batch")
class EncoderBatchNorm(Net):
    """BatchNorm in the encoders: statistics of the fused pass must be the only ones that count."""

    def make_encoder(self, channels: int) -> nn.Module:
        return nn.Sequential(conv(channels, self.width), nn.BatchNorm2d(self.width), nn.GELU())


@zoo(reference="rows")
class DecoderBatchNorm(Net):
    """BatchNorm in the decoder: student passes would move the running statistics."""

    def add_head(self, num_classes: int) -> None:
        super().add_head(num_classes)
        self.norm = nn.BatchNorm2d(self.width)

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        return self.classifier(self.norm(self.fusion(torch.cat(list(features), dim=1))))


@zoo(reference="rows")
class CumulativeBatchNorm(DecoderBatchNorm):
    """BatchNorm with ``momentum=None``: the running mean depends on the number of batches seen."""

    def add_head(self, num_classes: int) -> None:
        super().add_head(num_classes)
        self.norm = nn.BatchNorm2d(self.width, momentum=None)


@zoo(reference="rows")
class FrozenBatchNorm(DecoderBatchNorm):
    """A BatchNorm that its owner keeps in eval mode while the rest trains."""

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        super().train(mode)
        self.norm.eval()
        return self


@zoo("encoder_dropout", options={"where": "encoder"})
@zoo("decoder_dropout", options={"where": "decoder"})
@zoo("always_on_dropout", options={"where": "always"})
class Dropout(Net):
    """Dropout in the encoders, in the decoder, or in the decoder even in eval."""

    def __init__(self, modalities: Sequence[str], num_classes: int, *, where: str) -> None:
        self.where = where
        super().__init__(modalities, num_classes)
        self.noise = nn.Dropout(0.5 if where == "decoder" else 0.0)
        self.always = 0.5 if where == "always" else 0.0

    def make_encoder(self, channels: int) -> nn.Module:
        return nn.Sequential(block(channels, self.width), nn.Dropout(0.5 if self.where == "encoder" else 0.0))

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        fused = self.noise(self.fusion(torch.cat(list(features), dim=1)))
        return self.classifier(nn.functional.dropout(fused, self.always, training=True))


@zoo("checkpointed_encoder", options={"reentrant": False})
@zoo("checkpointed_reentrant", options={"reentrant": True}, expected="refused", reason=r"reentrant")
class Checkpointed(Net):
    """Each encoder runs under activation checkpointing, so it runs again in backward."""

    def __init__(self, modalities: Sequence[str], num_classes: int, *, reentrant: bool) -> None:
        super().__init__(modalities, num_classes)
        self.reentrant = reentrant

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        features = []
        for index, image in enumerate(images):
            image = image.detach().requires_grad_(self.reentrant)
            feature = checkpoint(self.encoder(index), image, use_reentrant=self.reentrant)
            features.append(hide(feature, mask, index))
        return features


class CheckpointedInside(nn.Module):
    """Encoder that checkpoints its own second half."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = block(1, width)
        self.second = block(width, width)

    def forward(self, image: Tensor) -> Tensor:
        return checkpoint(self.second, self.first(image), use_reentrant=False)


@zoo()
class CheckpointInsideEncoder(Net):
    """The checkpoint is inside the encoder, where replay does not meet it."""

    def make_encoder(self, channels: int) -> nn.Module:
        return CheckpointedInside(self.width)


@zoo()
class CheckpointedDecoder(Net):
    """The decoder with its classifier runs under checkpointing: both run again in backward."""

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        return checkpoint(super().decode, list(features), use_reentrant=False)


@zoo()
class CheckpointedWhileTraining(Net):
    """In training only, the second half of each private path runs under checkpointing: in eval it can be replayed."""

    def add_encoders(self) -> None:
        super().add_encoders()
        for name in self.names:
            self.add_module(f"{name}_more", conv(self.width, self.width))

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        def more(name: str, feature: Tensor) -> Tensor:
            return nn.functional.gelu(self.get_submodule(f"{name}_more")(feature))

        features = []
        for index, name in enumerate(self.names):
            feature = self.encoder(index)(images[index])
            how = functools.partial(checkpoint, use_reentrant=False) if self.training else run_as_it_is
            features.append(hide(how(more, name, feature), mask, index))
        return features


@zoo(rung="rerun", encoders=())
class AllCheckpointedWhileTraining(Net):
    """In training only, encoders and fusion share one checkpoint: nothing can be replayed, and nothing left out."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        def fused(x: Tensor, mask: Tensor) -> Tensor:
            return self.fusion(torch.cat(self.encode(x.split(self.channels, dim=1), mask), dim=1))

        how = functools.partial(checkpoint, use_reentrant=False) if self.training else run_as_it_is
        return self.classifier(how(fused, x, mask))


def run_as_it_is(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """In place of ``checkpoint``."""
    return function(*args)


@zoo(frozen=(0,))
class FrozenEncoder(Net):
    """The first encoder is frozen: it gets no gradient, and its distillation must not raise."""

    def add_encoders(self) -> None:
        super().add_encoders()
        self.encoder(0).requires_grad_(False)


@zoo(frozen=(0, 1, 2))
class FrozenEncoders(Net):
    """All encoders are frozen; only the decoder learns."""

    def add_encoders(self) -> None:
        super().add_encoders()
        for index in range(len(self.names)):
            self.encoder(index).requires_grad_(False)


@zoo(frozen=(0,), by_hand={"students": "rerun"})
class NoGradEncoder(Net):
    """The first encoder runs under ``no_grad``, as pretrained feature extractors do."""

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        with torch.no_grad():
            first = hide(self.encoder(0)(images[0]), mask, 0)
        return [first, *(hide(self.encoder(i)(images[i]), mask, i) for i in range(1, len(images)))]


@zoo(copies=False)
class SpectralNormEncoder(Net):
    """Spectral norm in the encoders: every call in train mode moves the power iteration."""

    def make_encoder(self, channels: int) -> nn.Module:
        return nn.Sequential(spectral_norm(conv(channels, self.width), n_power_iterations=60), nn.GELU())


@zoo(copies=False)
class SpectralNormDecoder(Net):
    """Spectral norm in the decoder: its buffers must end where a bare step leaves them."""

    def add_head(self, num_classes: int) -> None:
        super().add_head(num_classes)
        self.fusion = nn.Sequential(
            spectral_norm(conv(self.width * len(self.names), self.width), n_power_iterations=60), nn.GELU()
        )


@zoo(copies=False)
class WeightNormClassifier(Net):
    """The classifier's weight is parametrised."""

    def add_head(self, num_classes: int) -> None:
        self.classifier = weight_norm(conv(self.width, num_classes, 1))


@zoo(
    finish=lambda model: torch.compile(model, backend="eager"),
    encoders=("_orig_mod.{name}_encoder",),
    classifier="_orig_mod.classifier",
    copies=False,
)
class Compiled(Net):
    """The whole model under ``torch.compile`` before it is wrapped."""


@zoo(copies=False)
class CompiledEncoders(Net):
    """Each encoder is compiled on its own."""

    def make_encoder(self, channels: int) -> nn.Module:
        return torch.compile(super().make_encoder(channels), backend="eager")  # type: ignore[return-value]


@zoo()
class CountsItsCalls(Net):
    """A buffer counts forwards, as warm-up schedules do; only the fused pass may count."""

    def add_encoders(self) -> None:
        super().add_encoders()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return super().forward(x, mask)


@zoo()
class UserHooks(Net):
    """The user has hooks on an encoder and on the classifier: they act in every pass, and stay."""

    def add_head(self, num_classes: int) -> None:
        super().add_head(num_classes)
        self.encoder(0).register_forward_hook(scale_output)
        self.classifier.register_forward_pre_hook(shift_input)


def scale_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook that changes the output."""
    return 1.5 * output


def shift_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A forward pre-hook that changes the input."""
    return (inputs[0] + 0.25,)


@zoo()
class ForwardOnTheInstance(Net):
    """Somebody else replaced ``forward`` on an encoder instance: theirs must be back afterwards."""

    def add_encoders(self) -> None:
        super().add_encoders()
        self.encoder(1).forward = Doubled(self.encoder(1))  # type: ignore[method-assign]


class Doubled:
    """Calls the class's forward and doubles it; picklable, unlike a lambda."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, image: Tensor) -> Tensor:
        return 2 * type(self.module).forward(self.module, image)

"""How modalities meet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Net, block, conv, hide
from .entry import zoo


@zoo()
class MeanOverPresent(Net):
    """U-HeMIS: the mean over present modalities."""

    def __init__(self, modalities: Sequence[str], num_classes: int) -> None:
        super().__init__(modalities, num_classes)
        self.fusion = block(self.width, self.width)

    def decode_present(self, features: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Logits from the mean."""
        count = mask.sum(dim=1).view(-1, 1, 1, 1)
        return self.classifier(self.fusion(torch.stack(list(features)).sum(dim=0) / count))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.decode_present(self.encode(x.split(1, dim=1), mask), mask)


class Moments(Net):
    """HeMIS: mean and variance over the present modalities of each sample."""

    unbiased = False

    def __init__(self, modalities: Sequence[str], num_classes: int) -> None:
        super().__init__(modalities, num_classes)
        self.fusion = block(2 * self.width, self.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        stack = torch.stack([self.encoder(index)(image) for index, image in enumerate(x.split(1, dim=1))], dim=1)
        moments = []
        for row, present in zip(stack, mask, strict=True):
            shown = row[present]
            moments.append(torch.cat([shown.mean(dim=0), shown.var(dim=0, unbiased=self.unbiased)]))
        return self.classifier(self.fusion(torch.stack(moments)))


@zoo()
class MeanAndVariance(Moments):
    """Mean and biased variance: zero variance for one modality alone, finite."""


@zoo(
    rung="heads",
    presence=lambda count: torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0]], dtype=torch.bool),
)
class VarianceOfOne(Moments):
    """Unbiased variance: NaN for one modality alone, so no student pass is possible."""

    unbiased = True


@zoo()
class AttentionFusion(Net):
    """Attention over modality tokens with -inf for the absent ones."""

    def add_encoders(self) -> None:
        super().add_encoders()
        self.query = nn.Parameter(torch.randn(self.width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        stack = torch.stack(self.encode(x.split(1, dim=1), mask), dim=1)
        scores = torch.einsum("c,bmchw->bmhw", self.query, stack)
        scores = scores.masked_fill(~mask[:, :, None, None], float("-inf"))
        weighted = stack * scores.softmax(dim=1).unsqueeze(2)
        return self.decode(weighted.unbind(1))


@zoo()
class ProductOfExperts(Net):
    """U-HVED: product of Gaussians over the present modalities, posterior mean."""

    def make_encoder(self, channels: int) -> nn.Module:
        return nn.Sequential(block(channels, self.width), conv(self.width, 2 * self.width, 1))

    def __init__(self, modalities: Sequence[str], num_classes: int) -> None:
        super().__init__(modalities, num_classes)
        self.fusion = block(self.width, self.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        precision = total = 1e-3
        for index, image in enumerate(x.split(1, dim=1)):
            mean, log_variance = self.encoder(index)(image).chunk(2, dim=1)
            weight = hide(torch.exp(-log_variance), mask, index)
            precision, total = precision + weight, total + weight * hide(mean, mask, index)
        return self.classifier(self.fusion(total / precision))


@zoo()
class LearnedToken(Net):
    """An absent modality is replaced by a learned token instead of zero."""

    def add_encoders(self) -> None:
        super().add_encoders()
        self.tokens = nn.Parameter(torch.randn(len(self.names), self.width, 1, 1))

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        features = []
        for index, image in enumerate(images):
            feature = self.encoder(index)(image)
            features.append(torch.where(mask[:, index, None, None, None], feature, self.tokens[index]))
        return features


@zoo(spatial=(6, 8, 6))
class InstanceNorm3d(Net):
    """InstanceNorm: borders of a zero image are amplified to the scale of a real one."""

    dim = 3

    def make_encoder(self, channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv3d(channels, self.width, 3, padding=1), nn.InstanceNorm3d(self.width), nn.GELU())


@zoo(encoders=("{name}_encoder", "{name}_gate"))
class GatedByFeatures(Net):
    """A private gate computed from the private feature, used far from the encoder."""

    def add_encoders(self) -> None:
        super().add_encoders()
        for name in self.names:
            self.add_module(f"{name}_gate", conv(self.width, 1, 1))

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        raw = [self.encoder(index)(image) for index, image in enumerate(images)]
        gates = [self.get_submodule(f"{name}_gate")(feature) for name, feature in zip(self.names, raw, strict=True)]
        return [
            hide(feature * torch.sigmoid(gate), mask, index)
            for index, (feature, gate) in enumerate(zip(raw, gates, strict=True))
        ]


@zoo()
class EarlyCrossTalk(Net):
    """Encoders run in stages and exchange the mean of what is present between them."""

    def add_encoders(self) -> None:
        super().add_encoders()
        for name in self.names:
            self.add_module(f"{name}_late", block(self.width, self.width))

    def encode(self, images: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        first = super().encode(images, mask)
        mean = torch.stack(first).sum(dim=0) / mask.sum(dim=1).view(-1, 1, 1, 1)
        late = [self.get_submodule(f"{name}_late")(f + mean) for name, f in zip(self.names, first, strict=True)]
        return [hide(feature, mask, index) for index, feature in enumerate(late)]


@zoo()
class MaxFusion(Net):
    """Maximum over present modalities, F.dropout of zero behind it."""

    def __init__(self, modalities: Sequence[str], num_classes: int) -> None:
        super().__init__(modalities, num_classes)
        self.fusion = block(self.width, self.width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        stack = torch.stack(self.encode(x.split(1, dim=1), mask), dim=1)
        stack = stack.masked_fill(~mask[:, :, None, None, None], float("-inf"))
        return self.classifier(self.fusion(F.dropout(stack.amax(dim=1), 0.0)))

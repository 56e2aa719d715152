"""Small, well-behaved backbones that the tests of the core share; the awkward ones live in ``zoo``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passion_plugin.backbone import BackboneSpec
from passion_plugin.baselines import named_strategy
from passion_plugin.config import PassionConfig

__all__ = ["NAMES", "DeepNet", "MeanNet", "NoMaskNet", "batch", "copies_gradients", "spec_of"]

NAMES = ("flair", "t1ce", "t1", "t2", "pd", "dwi")
CONV = {2: nn.Conv2d, 3: nn.Conv3d}


class MeanNet(nn.Module):
    """One encoder per modality, mean over what is present, a decoder, a 1x1 classifier.

    Args:
        modalities: M names.
        classes: K.
        ndim: spatial axes.
        norm: ``"batch"`` puts a BatchNorm into the decoder, ``"none"`` nothing.
        dropout: probability in the decoder.
        returns: ``"tensor"``, ``"tuple"`` or ``"dict"``.
    """

    names: tuple[str, ...]
    encoders: Any
    decoder: Any
    classifier: Any

    def __init__(
        self,
        modalities: Sequence[str],
        classes: int = 3,
        ndim: int = 2,
        *,
        width: int = 4,
        norm: str = "none",
        dropout: float = 0.0,
        returns: str = "tensor",
    ) -> None:
        super().__init__()
        conv = CONV[ndim]
        self.names = tuple(modalities)
        self.returns = returns
        self.encoders = nn.ModuleDict(
            {name: nn.Sequential(conv(1, width, 3, padding=1), nn.LeakyReLU(0.1, inplace=True)) for name in self.names}
        )
        batch_norm = nn.BatchNorm2d if ndim == 2 else nn.BatchNorm3d
        self.decoder = nn.Sequential(
            conv(width, width, 3, padding=1),
            batch_norm(width) if norm == "batch" else nn.Identity(),
            nn.Tanh(),
            nn.Dropout(dropout),
        )
        self.classifier = conv(width, classes, 1)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Features of each modality."""
        return [self.encoders[name](x[:, index : index + 1]) for index, name in enumerate(self.names)]

    def fuse(self, encoded: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Mean of the features of the modalities that are present."""
        stacked = torch.stack(list(encoded), dim=1)
        weight = mask.view(*mask.shape, *[1] * (stacked.ndim - 2)).to(stacked.dtype)
        return (stacked * weight).sum(1) / weight.sum(1)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        """Logits (B, K, *spatial) in the container that was asked for."""
        features = self.decoder(self.fuse(self.encode(x), mask))
        logits = self.classifier(features)
        if self.returns == "tuple":
            return logits, {"features": features}, 7
        return {"logits": logits, "extra": [features]} if self.returns == "dict" else logits


class DeepNet(MeanNet):
    """With a coarse output, an auxiliary training output behind ``is_training``, and uni-modal predictions."""

    def __init__(self, modalities: Sequence[str], classes: int = 3, ndim: int = 2, **options: Any) -> None:
        super().__init__(modalities, classes, ndim, **options)
        width = self.classifier.in_channels
        self.coarse = CONV[ndim](width, classes, 1)
        self.separate = CONV[ndim](width, classes, 1)
        self.is_training = True

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        """Probabilities; in training mode also uni-modal ones and a coarse one."""
        encoded = self.encode(x)
        fused = self.fuse(encoded, mask)
        logits = self.classifier(self.decoder(fused))
        pool = nn.functional.avg_pool2d if x.ndim == 4 else nn.functional.avg_pool3d
        coarse = self.coarse(pool(fused, 2))
        if not self.is_training:
            return logits.softmax(1)
        alone = tuple(self.separate(one).softmax(1) for one in encoded)
        return logits.softmax(1), alone, (coarse.softmax(1),)


class NoMaskNet(nn.Module):
    """Takes images only; absent modalities are zeros in it."""

    encoders: Any

    def __init__(self, modalities: Sequence[str], classes: int = 3) -> None:
        super().__init__()
        self.names = tuple(modalities)
        self.encoders = nn.ModuleDict({name: nn.Conv2d(1, 4, 3, padding=1) for name in self.names})
        self.decoder = nn.Conv2d(4 * len(self.names), 4, 3, padding=1)
        self.classifier = nn.Conv2d(4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W)."""
        features = [self.encoders[name](x[:, i : i + 1]).tanh() for i, name in enumerate(self.names)]
        return self.classifier(self.decoder(torch.cat(features, 1)).tanh())


def spec_of(net: MeanNet | NoMaskNet, **changes: Any) -> BackboneSpec:
    """What detection would find, without running it."""
    fields: dict[str, Any] = {
        "encoders": {name: f"encoders.{name}" for name in net.names},
        "classifier": "classifier",
        "students": "replay",
    }
    if isinstance(net, DeepNet):
        fields |= {"deep_supervision": ("coarse",), "student_mode": {"is_training": False}}
    return BackboneSpec(**{**fields, **changes})


def set_beta(model: Any, beta: Tensor) -> None:
    """Give the estimator of a wrapper or an engine other weights."""
    preference = getattr(model, "passion", model).preference
    preference.set_extra_state({**preference.get_extra_state(), "beta": beta.clone()})


def options_of(name: str | None, config: PassionConfig | None = None) -> dict[str, Any]:
    """``strategy=`` and ``config=`` for the name of a strategy; None is PASSION."""
    strategy, config = (None, config) if name is None else named_strategy(name, config)
    return {"strategy": strategy, "config": config}


def batch(
    presence: Sequence[Sequence[int]],
    *,
    classes: int = 3,
    ndim: int = 2,
    side: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Images that are zero where a modality is absent, their mask, and labels that hold every class."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor(presence, dtype=torch.bool)
    spatial = (side,) * ndim
    x = torch.randn(*mask.shape, *spatial, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.where(mask.view(*mask.shape, *[1] * ndim), x, 0)
    voxels = side**ndim
    order = torch.stack([torch.randperm(voxels, generator=generator) for _ in range(len(mask))])
    return x, mask, (order % classes).view(len(mask), *spatial)


def copies_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients, zeros where there is none; the gradients are reset."""
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return found

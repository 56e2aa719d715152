"""Tiny multi-encoder networks, built from a drawn description."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from passion_plugin.backbone import BackboneSpec

__all__ = ["DrawnNet", "Plan", "build", "plans", "right_spec"]

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
NORM: dict[str, dict[int, Any]] = {
    "batch": {2: nn.BatchNorm2d, 3: nn.BatchNorm3d},
    "instance": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d},
}
NAMES = (("flair", "t1ce", "t1", "t2", "pd"), ("a", "aa", "ä", "modality 4", "0"))


@dataclass(frozen=True)
class Plan:
    """Description of a network.

    Attributes:
        modalities: M names.
        ndim: spatial axes.
        width: channels of features.
        classes: K.
        fusion: how features become one.
        mask: what the mask looks like; ``"missing"`` is a bool mask of what is missing.
        takes: container of the images; ``"arguments"``: each modality is one.
        returns: container of the prediction.
        outputs: ``"softmax"`` or ``"sigmoid"``.
        activated: the prediction comes as probabilities.
        stride: of the encoders; the logits are that much coarser than the images.
        upsampled: the prediction is brought back to the size of the images.
        norm: layer behind encoders and in the decoder.
        dropout: rate in the decoder.
        shared: one encoder for all modalities.
        in_place: encoder outputs are changed in place.
        deep: coarse logits besides, ``"always"`` or in ``"training"`` mode only.
        double: float64 instead of float32.
    """

    modalities: tuple[str, ...]
    ndim: int = 2
    width: int = 2
    classes: int = 3
    fusion: str = "mean"
    mask: str = "bool"
    takes: str = "tensor"
    returns: str = "tensor"
    outputs: str = "softmax"
    activated: bool = False
    stride: int = 1
    upsampled: bool = False
    norm: str = "none"
    dropout: float = 0.0
    shared: bool = False
    in_place: bool = False
    deep: str = "no"
    double: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and images."""
        return torch.float64 if self.double else torch.float32


@st.composite
def plans(draw: st.DrawFn, *, plain: bool = False) -> Plan:
    """Draw a description.

    Args:
        draw: given by hypothesis.
        plain: only networks that can be trained with :func:`right_spec` whatever the batch.
    """
    flag, pick = st.booleans(), st.sampled_from
    outputs = draw(pick(["softmax", "sigmoid"]))
    return Plan(
        modalities=draw(pick(NAMES))[: draw(st.integers(2, 5))],
        ndim=draw(pick([2, 3])),
        width=draw(st.integers(1, 4)),
        classes=draw(pick([3, 2, 5, 40] if plain or outputs == "softmax" else [3, 2, 5, 40, 1])),
        fusion=draw(pick(["mean", "concat", "max", "attention"])),
        mask=draw(pick(["bool", "float", "int", "missing", "indices", "none"])),
        takes=draw(pick(["tensor", "list", "tuple", "dict", "arguments"])),
        returns=draw(pick(["tensor", "list", "tuple", "dict"])),
        outputs=outputs,
        activated=draw(flag),
        stride=draw(pick([1, 2])),
        upsampled=draw(flag),
        norm="none" if plain else draw(pick(["none", "batch", "instance"])),
        dropout=draw(pick([0.0, 0.5])),
        shared=draw(flag),
        in_place=draw(flag),
        deep=draw(pick(["no", "always", "training"])),
        double=draw(flag),
    )


class DrawnNet(nn.Module):
    """The network of a description; called as ``net(images, mask, scale=1.0)``."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        conv, width, count = CONV[plan.ndim], plan.width, len(plan.modalities)
        self.encoders = nn.ModuleList(
            nn.Sequential(conv(1, width, 3, padding=1, stride=plan.stride), self._norm(), self._activation())
            for _ in range(1 if plan.shared else count)
        )
        self.score = conv(width, 1, 1)
        self.fusion = conv(width * count if plan.fusion == "concat" else width, width, 1)
        self.decoder = nn.Sequential(self._norm(), nn.Tanh(), nn.Dropout(plan.dropout))
        self.classifier = conv(width, plan.classes, 1)
        self.coarse = conv(width, plan.classes, 1)
        self.to(plan.dtype)

    def forward(self, x: Any, mask: Any = None, scale: float = 1.0) -> Any:
        """Prediction, in the container of the plan."""
        plan = self.plan
        images = self._images(x)
        features = [self.encoders[0 if plan.shared else m](image) for m, image in enumerate(images)]
        if plan.in_place:
            features = [feature.mul_(scale) for feature in features]
        fused = self.decoder(self._fuse(features, self._present(mask, images[0])))
        result = [self._finished(self.classifier(fused), images[0])]
        if plan.deep == "always" or (plan.deep == "training" and self.training):
            pooled = F.interpolate(fused, size=[max(1, side // 2) for side in fused.shape[2:]])
            result.append(self._finished(self.coarse(pooled), images[0]))
        if plan.returns == "dict":
            return {"logits": result[0], "aux": result[1:]}
        return {"list": list, "tuple": tuple}[plan.returns](result) if plan.returns != "tensor" else result[0]

    def _norm(self) -> nn.Module:
        kinds = NORM.get(self.plan.norm)
        return kinds[self.plan.ndim](self.plan.width) if kinds else nn.Identity()

    def _activation(self) -> nn.Module:
        # An activation keeps its output for the backward pass, which nobody may then change in place.
        return nn.Identity() if self.plan.in_place else nn.LeakyReLU(inplace=True)

    def _images(self, x: Any) -> list[Tensor]:
        if self.plan.takes == "dict":
            return [x[name] for name in self.plan.modalities]
        return list(x.split(1, dim=1)) if self.plan.takes == "tensor" else list(x)

    def _present(self, mask: Any, like: Tensor) -> Tensor:
        shape = (len(like), len(self.plan.modalities))
        if self.plan.mask == "none":
            return torch.ones(shape, dtype=torch.bool)
        if self.plan.mask == "indices":
            listed = torch.zeros(shape, dtype=torch.bool)
            listed[:, list(mask)] = True
            return listed
        return ~mask if self.plan.mask == "missing" else mask.bool()

    def _fuse(self, features: Sequence[Tensor], present: Tensor) -> Tensor:
        stacked = torch.stack(list(features), dim=1)
        here = present.view(*present.shape, *[1] * (stacked.ndim - 2))
        if self.plan.fusion == "max":
            return self.fusion(torch.where(here, stacked, -torch.inf).amax(1))
        kept = torch.where(here, stacked, 0)
        if self.plan.fusion == "concat":
            return self.fusion(kept.flatten(1, 2))
        if self.plan.fusion == "mean":
            return self.fusion(kept.sum(1) / here.sum(1))
        scores = torch.stack([self.score(feature) for feature in kept.unbind(1)], dim=1)
        return self.fusion((kept * torch.where(here, scores, -torch.inf).softmax(1)).sum(1))

    def _finished(self, logits: Tensor, like: Tensor) -> Tensor:
        if self.plan.upsampled:
            logits = F.interpolate(logits, size=like.shape[2:])
        if not self.plan.activated:
            return logits
        return logits.softmax(1) if self.plan.outputs == "softmax" else logits.sigmoid()


class Spread(DrawnNet):
    """Takes each modality as an argument of its own, then the mask."""

    def forward(self, *arguments: Any, scale: float = 1.0) -> Any:
        """Prediction, in the container of the plan."""
        count = len(self.plan.modalities)
        return super().forward(arguments[:count], arguments[count] if len(arguments) > count else None, scale)


def build(plan: Plan) -> DrawnNet:
    """The network of a plan, with reproducible weights."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return (Spread if plan.takes == "arguments" else DrawnNet)(plan)


def right_spec(plan: Plan, students: str = "auto") -> BackboneSpec:
    """What somebody writes who knows the network."""
    count = len(plan.modalities)
    several = plan.takes == "arguments"
    apart = plan.norm != "batch"
    if plan.shared and students != "auto":
        students = "rerun"
    return BackboneSpec(
        classifier="classifier",
        encoders={} if plan.shared else {name: f"encoders.{m}" for m, name in enumerate(plan.modalities)},
        deep_supervision=("coarse",) if plan.deep != "no" else (),
        outputs=plan.outputs,  # type: ignore[arg-type]
        input_argument=tuple(range(count)) if several else 0,
        mask_argument=None if plan.mask == "none" else count if several else 1,
        mask_format=plan.mask if plan.mask in ("float", "int", "indices") else "bool",
        mask_meaning="missing" if plan.mask == "missing" else "present",
        per_sample_masks=plan.mask != "indices",
        students=students,  # type: ignore[arg-type]
        copy_features=plan.in_place,
        can_skip_encoders=apart and not plan.shared and plan.mask != "none",
    )

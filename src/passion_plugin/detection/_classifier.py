"""Finding the classifier by value: the last layer whose output is the prediction."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

_EXACT = 8
"""How many units in the last place a recomputed softmax or interpolation may be off."""


@dataclass(frozen=True)
class Match:
    """A layer whose output gives the prediction.

    Attributes:
        name: of the layer.
        relation: what happens to its output on the way to the prediction; empty when nothing does.
        classes: K, number of output channels.
        channels_last: the classes are in the last dimension.
    """

    name: str
    relation: str
    classes: int
    channels_last: bool = False


@dataclass
class ClassifierSearch:
    """Compares outputs of layers with the prediction while the network runs.

    Attributes:
        prediction: (B, K, *spatial), as the backbone returns it.
        matches: layers whose output gives the prediction, in call order.
        calls: how often each layer ran.
        candidates: layers whose output has the shape of a prediction, for messages.
    """

    prediction: Tensor
    matches: list[Match] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    candidates: list[str] = field(default_factory=list)

    def best(self) -> Match | None:
        """Return the last match that ran once; the last match when all ran several times."""
        once = [match for match in self.matches if self.calls[match.name] == 1]
        return next(reversed(once or self.matches), None)

    def see(self, name: str, module: nn.Module, output: Any) -> None:
        """Look at the output of a module, if it is a layer."""
        is_leaf = not any(module.children()) and any(True for _ in module.parameters())
        if isinstance(module, (_ConvNd, nn.Linear)) or is_leaf:
            self.calls[name] += 1
            if isinstance(output, Tensor):
                self._compare(name, output)

    def _compare(self, name: str, output: Tensor) -> None:
        wanted = self.prediction
        if output.ndim == wanted.ndim >= 3 and output.shape[:2] == wanted.shape[:2]:
            self.candidates.append(name)
            relation = follows(output, wanted)
            if relation is not None:
                self.matches.append(Match(name, relation, output.shape[1]))
                return
        last = _channels_first(output, wanted)
        relation = None if last is None else follows(last, wanted)
        if relation is not None:
            self.matches.append(Match(name, relation, output.shape[-1], channels_last=True))


def follows(output: Tensor, prediction: Tensor) -> str | None:
    """Say how a prediction (B, K, *spatial) follows from the output (B, K, *spatial or coarser) of a layer.

    Returns:
        ``""`` when they are equal, the operations in between such as ``"softmax"`` or
        ``"bilinear interpolation, softmax"``, or None when none of those tried gives the prediction.
    """
    if output.shape[:2] != prediction.shape[:2] or not prediction.is_floating_point():
        return None
    output = output.to(prediction.dtype)
    for name, apply in _activations(output.shape[1]):
        if output.shape == prediction.shape:
            if _equal(apply(output), prediction):
                return name
            continue
        for how, resize in _resizings(output, prediction):
            if _equal(apply(resize(output)), prediction):
                return f"{how}, {name}" if name else how
            if name and _equal(resize(apply(output)), prediction):
                return f"{name}, {how}"
    return None


def _activations(classes: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    yield "", lambda logits: logits
    yield "sigmoid", torch.sigmoid
    if classes > 1:
        yield "softmax", functools.partial(torch.softmax, dim=1)
        yield "log-softmax", functools.partial(torch.log_softmax, dim=1)
    yield "log-sigmoid", F.logsigmoid


def _resizings(output: Tensor, prediction: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    size = tuple(prediction.shape[2:])
    linear = {3: "linear", 4: "bilinear", 5: "trilinear"}.get(output.ndim)
    if linear is None or output.ndim != prediction.ndim:
        return
    for align in (False, True):
        name = f"{linear} interpolation" + (" with aligned corners" if align else "")
        yield name, functools.partial(F.interpolate, size=size, mode=linear, align_corners=align)
    yield "nearest interpolation", functools.partial(F.interpolate, size=size, mode="nearest")


def _equal(value: Tensor, prediction: Tensor) -> bool:
    tolerance = _EXACT * torch.finfo(prediction.dtype).eps * float(prediction.abs().max())
    return bool(((value - prediction).abs() <= tolerance).all())


def _channels_first(output: Tensor, prediction: Tensor) -> Tensor | None:
    """Return the output of a layer on channels-last features or tokens in the layout of the prediction."""
    if output.ndim < 3 or output.shape[0] != prediction.shape[0] or output.shape[-1] != prediction.shape[1]:
        return None
    if output.numel() != prediction.numel():
        return None
    return rearrange(output, "b ... k -> b k (...)").reshape(prediction.shape)

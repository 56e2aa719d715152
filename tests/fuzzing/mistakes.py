"""What can be wrong with a call, and a part of the message that must say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["IMAGES", "MASKS", "NONSENSE", "NO_MODULES", "TARGETS", "Mistake"]


@dataclass(frozen=True)
class Mistake:
    """One wrong argument.

    Attributes:
        name: what is wrong.
        change: from the right argument to the wrong one.
        says: regular expression that the message must match.
    """

    name: str
    change: Callable[[Any], Any]
    says: str

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of it."""
        printer.text(f"Mistake({self.name!r})")


NO_MODULES: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        10**30,
        1.5,
        float("nan"),
        float("inf"),
        1j,
        "",
        "encoders",
        "encoders.0",
        "no.such",
        "\0",
        b"x",
    ),
    *([], [0], ["encoders.0", "encoders.0"], (), (0, "x"), {}, {"a": 1}, {"a": [None]}, set(), range(3), ...),
    *(object(), int, len, lambda *_: None, torch.zeros(2), torch.tensor(True), np.zeros(2), np.array(["a", "b"])),
    *([[]], {"a": {"a": {}}}, torch.float32, slice(2), iter(()), float),
]
"""Values of every kind that are no module."""

NONSENSE: list[Any] = [*NO_MODULES, torch.nn.Identity()]


def some(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    """Change the first tensor of a container, whatever kind it is."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, dict):
            first = next(iter(value))
            return {**value, first: change(value[first])}
        return type(value)([change(value[0]), *value[1:]])

    return changed


def every(change: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    """Change every tensor of a container."""

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, dict):
            return {key: change(part) for key, part in value.items()}
        return type(value)(change(part) for part in value)

    return changed


def fewer(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value[:, 1:]
    return dict(list(value.items())[1:]) if isinstance(value, dict) else value[1:]


def filled(number: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, number)


_IMAGES = r"input|images|batch size|NaN|argument|image"
_MASK = r"mask|passion_presence"
_TARGET = r"target|labels"

IMAGES = [
    Mistake("NaN", every(filled(float("nan"))), "NaN or infinity.*marked present"),
    Mistake("infinity", every(filled(float("-inf"))), "NaN or infinity.*marked present"),
    Mistake("too few", fewer, _IMAGES),
    Mistake("too many", lambda x: torch.cat([x, x[:, :1]], 1) if isinstance(x, Tensor) else [*x, *x], _IMAGES),
    Mistake("None", lambda _: None, _IMAGES),
    Mistake("one is None", some(lambda _: None), _IMAGES),
    Mistake("one is a list", some(lambda tensor: tensor.tolist()), _IMAGES),
    Mistake("NumPy", every(lambda tensor: tensor.numpy()), _IMAGES),
    Mistake("a string", lambda _: "image.nii", _IMAGES),
    Mistake("a number", lambda _: 3, _IMAGES),
    Mistake("a scalar", every(lambda tensor: tensor.sum()), _IMAGES),
    Mistake("a vector", every(lambda tensor: tensor.flatten()), _IMAGES),
    Mistake("integers", every(lambda tensor: tensor.nan_to_num(0, 0, 0).long()), _IMAGES),
    Mistake("complex", every(lambda tensor: tensor.nan_to_num(0, 0, 0) * 1j), _IMAGES),
    Mistake("half the batch in one", some(lambda tensor: tensor[: len(tensor) // 2]), _IMAGES + "|batch|shape"),
    Mistake("empty batch", every(lambda tensor: tensor[:0]), _IMAGES + "|empty batch|" + _MASK),
    Mistake("no voxels", every(lambda tensor: tensor[..., :0]), _IMAGES),
    Mistake("meta", every(lambda tensor: tensor.to("meta")), _IMAGES),
    Mistake("another axis", every(lambda tensor: tensor[..., None]), _IMAGES),
    Mistake("other sizes", some(lambda tensor: torch.cat([tensor] * 3, -1)), f"{_IMAGES}|{_TARGET}"),
    Mistake("sparse", some(lambda tensor: tensor.to_sparse()), _IMAGES),
]


def _rows(value: Any, change: Callable[[Tensor], Any]) -> Any:
    return change(value) if isinstance(value, Tensor) else value


MASKS = [
    Mistake("None", lambda _: None, _MASK),
    Mistake("a string", lambda _: "all", _MASK),
    Mistake("a number", lambda _: 1, _MASK),
    Mistake("a nested list", lambda mask: mask.tolist() if isinstance(mask, Tensor) else [mask], _MASK),
    Mistake("NumPy", lambda mask: mask.numpy() if isinstance(mask, Tensor) else np.zeros(2), _MASK),
    Mistake("strings", lambda _: ["flair", "t1"], _MASK),
    Mistake(
        "too many columns", lambda mask: torch.cat([mask, mask], 1) if isinstance(mask, Tensor) else [*mask, 99], _MASK
    ),
    Mistake("too few columns", lambda mask: mask[:, :1] if isinstance(mask, Tensor) else [-1], _MASK),
    Mistake("too many rows", lambda mask: torch.cat([mask, mask]) if isinstance(mask, Tensor) else [0, 0], _MASK),
    Mistake("no rows", lambda mask: mask[:0] if isinstance(mask, Tensor) else [], _MASK),
    Mistake("another axis", lambda mask: mask[..., None] if isinstance(mask, Tensor) else [[0]], _MASK),
    Mistake("a scalar", lambda mask: mask.sum() if isinstance(mask, Tensor) else torch.tensor(0), _MASK),
    Mistake("complex", lambda mask: mask + 0j if isinstance(mask, Tensor) else [0j], _MASK),
    Mistake("int8", lambda mask: mask.to(torch.int8) * 2 if isinstance(mask, Tensor) else [1.0], _MASK),
    Mistake("NaN", lambda mask: mask * float("nan") if isinstance(mask, Tensor) else [float("nan")], _MASK),
    Mistake("meta", lambda mask: mask.to("meta") if isinstance(mask, Tensor) else torch.zeros(2).to("meta"), _MASK),
    Mistake("sparse", lambda mask: mask.to_sparse() if isinstance(mask, Tensor) else torch.eye(2).to_sparse(), _MASK),
    Mistake("huge", lambda mask: mask.long() * 2**62 if isinstance(mask, Tensor) else [10**30], _MASK),
]

TARGETS = [
    Mistake("None", lambda _: None, _TARGET),
    Mistake("a string", lambda _: "labels.nii", _TARGET),
    Mistake("NumPy", lambda target: target.numpy(), _TARGET),
    Mistake("a list", lambda target: target.tolist(), _TARGET),
    Mistake("floating", lambda target: target.double() + 0.5, _TARGET),
    Mistake("NaN", lambda target: target * float("nan"), _TARGET),
    Mistake("complex", lambda target: target * 1j, _TARGET),
    Mistake("too high", lambda target: target.long() + 10**9, _TARGET),
    Mistake("ignored", lambda target: torch.full_like(target, 255, dtype=torch.uint8), _TARGET),
    Mistake("negative", lambda target: -1 - target.long(), _TARGET),
    Mistake("one row less", lambda target: target[1:], _TARGET),
    Mistake("transposed", lambda target: target.movedim(0, -1)[..., None], _TARGET),
    Mistake("a scalar", lambda target: target.sum(), _TARGET),
    Mistake("no voxels", lambda target: target[..., :0], _TARGET),
    Mistake("other size", lambda target: torch.cat([target, target], -1), _TARGET),
    Mistake("another axis", lambda target: target[..., None, None], _TARGET),
    Mistake("meta", lambda target: target.to("meta"), _TARGET),
    Mistake("sparse", lambda target: target.to_sparse(), _TARGET),
    Mistake("soft one-hot", lambda target: torch.full((len(target), 3, *target.shape[1:]), 1 / 3), _TARGET),
]

"""Batches that fit a drawn network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from passion_plugin.testing.strategies import presence_tables

from .nets import Plan

__all__ = ["Batch", "batches"]

PACK: dict[str, Callable[[list[Tensor], tuple[str, ...]], Any]] = {
    "tensor": lambda images, names: torch.cat(images, dim=1),
    "list": lambda images, names: images,
    "tuple": lambda images, names: tuple(images),
    "arguments": lambda images, names: tuple(images),
    "dict": lambda images, names: dict(zip(names, images, strict=True)),
}
ENCODE: dict[str, Callable[[Tensor], Any]] = {
    "bool": lambda presence: presence,
    "missing": lambda presence: ~presence,
    "int": lambda presence: presence.long(),
    "float": lambda presence: presence.float(),
    "indices": lambda presence: presence[0].nonzero().flatten().tolist(),
}


@dataclass(frozen=True)
class Batch:
    """Arguments of one training step.

    Attributes:
        plan: of the network.
        images: as the network takes them; B, C and the spatial axes are arbitrary.
        mask: as the network takes it, or bool (B, M) for ``passion_presence`` where it takes none.
        target: labels (B, *spatial) or masks (B, K, *spatial).
        by_name: images and mask are passed by keyword, where the network has names for them.
        note: what hypothesis prints of it.
    """

    plan: Plan
    images: Any
    mask: Any
    target: Any
    by_name: bool
    note: str

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints of a batch: shapes instead of numbers."""
        printer.text(f"Batch({self.note})")

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the network."""
        masks = [] if self.plan.mask == "none" else [self.mask]
        if self.plan.takes == "arguments":
            images = self.images if isinstance(self.images, tuple) else (self.images,)
            return (*images, *masks), {}
        if self.by_name:
            return (), dict(zip(("x", "mask"), (self.images, *masks), strict=False))
        return (self.images, *masks), {}

    def ours(self) -> dict[str, Any]:
        """Keywords of the wrapper besides: presence, where no mask says it."""
        return {"passion_presence": self.mask} if self.plan.mask == "none" else {}

    def changed(self, part: str, change: Callable[[Any], Any]) -> Batch:
        """A batch with another ``"images"``, ``"mask"`` or ``"target"``."""
        return replace(self, **{part: change(getattr(self, part))})


@st.composite
def batches(draw: st.DrawFn, plan: Plan) -> Batch:
    """Draw a batch that fits: any shape from one voxel on, any presence without empty rows, junk where absent."""
    size, count = draw(st.sampled_from([2, 1, 3, 4])), len(plan.modalities)
    sides = st.sampled_from([4, 1, 2, 3, 5])
    spatial = draw(st.one_of(st.lists(sides, min_size=plan.ndim, max_size=plan.ndim), st.just([1] * plan.ndim)))
    presence = draw(presence_tables(size, count))
    if plan.mask == "indices":
        presence = presence[:1].expand(size, -1).clone()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([1.0, 0.0, 1e-6, 1e4]))
    junk = draw(st.sampled_from([0.0, float("nan"), float("inf"), 7.0]))
    images = []
    for m in range(count):
        image = scale * torch.randn((size, 1, *spatial), generator=generator, dtype=torch.float64).to(plan.dtype)
        image[~presence[:, m]] = junk
        images.append(image)
    if plan.outputs == "sigmoid":
        shape, dtypes, most = (size, plan.classes, *spatial), [torch.bool, plan.dtype], 2
    else:
        shape, dtypes, most = (size, *spatial), [torch.int64, torch.uint8], draw(st.integers(1, plan.classes))
    target = torch.randint(most, shape, generator=generator).to(draw(st.sampled_from(dtypes)))
    note = f"{size} x {spatial}, presence {presence.int().tolist()}, scale {scale}, absent {junk}, {target.dtype}"
    mask = ENCODE.get(plan.mask, ENCODE["bool"])(presence)
    return Batch(plan, PACK[plan.takes](images, plan.modalities), mask, target, draw(st.booleans()), note)

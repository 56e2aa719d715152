"""Hypothesis strategies for the inputs of segmentation losses on incomplete multi-modal data.

Tensors are float64 on the CPU. Shapes and the character of the values are drawn, and shrink, one by one; the
numbers themselves come from a drawn seed, which keeps an example with hundreds of voxels cheap. Hypothesis passes the
argument ``draw``; a ``shape`` (B, K, *spatial) that is not given is drawn from :func:`shapes`.
"""

from __future__ import annotations

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        'passion_plugin.testing.strategies needs hypothesis: pip install "passion-plugin[testing]"'
    ) from error

import torch
from torch import Tensor

__all__ = ["features", "labels", "logits", "presence_tables", "shapes"]

Shape = tuple[int, ...]


@st.composite
def shapes(
    draw: st.DrawFn,
    *,
    batch: tuple[int, int] = (1, 3),
    channels: tuple[int, int] = (2, 4),
    axes: tuple[int, ...] = (2, 3),
    side: tuple[int, int] = (1, 4),
) -> Shape:
    """Draw a shape (B, K, *spatial), possibly of one voxel.

    ``batch``, ``channels`` and ``side`` are the smallest and largest B, K and size of a spatial axis; ``axes`` are the
    numbers of spatial axes to choose from.
    """
    spatial = [draw(st.integers(*side)) for _ in range(draw(st.sampled_from(axes)))]
    return (draw(st.integers(*batch)), draw(st.integers(*channels)), *spatial)


@st.composite
def logits(
    draw: st.DrawFn, shape: Shape | None = None, *, scales: tuple[float, ...] = (1.0, 0.0, 10.0, 100.0)
) -> Tensor:
    """Draw logits (B, K, *spatial): uncertain, undecided (all equal), confident, or saturated.

    ``scales`` are the standard deviations to choose from.
    """
    size = draw(shapes()) if shape is None else shape
    return _normal(draw, size) * draw(st.sampled_from(scales))


@st.composite
def labels(draw: st.DrawFn, shape: Shape | None = None) -> Tensor:
    """Draw int64 class numbers (B, *spatial) that fit logits of ``shape``; each sample has some of the K classes."""
    size = draw(shapes()) if shape is None else shape
    samples = []
    for _ in range(size[0]):
        present = draw(st.lists(st.integers(0, size[1] - 1), min_size=1, max_size=size[1], unique=True))
        index = torch.randint(len(present), size[2:], generator=_generator(draw))
        samples.append(torch.tensor(present)[index])
    return torch.stack(samples)


@st.composite
def features(draw: st.DrawFn, shape: Shape | None = None, *, rectified: bool | None = None) -> Tensor:
    """Draw features (B, C, *spatial) as they enter a classifier.

    They are normal, or ``rectified`` as behind a ReLU, where whole voxels may be zero; None: either.
    """
    values = _normal(draw, draw(shapes()) if shape is None else shape)
    cut = draw(st.booleans()) if rectified is None else rectified
    return values.clamp(min=0) if cut else values


@st.composite
def presence_tables(
    draw: st.DrawFn, samples: int | None = None, modalities: int | None = None, *, at_least: int = 1
) -> Tensor:
    """Draw which modalities each sample has: bool (samples, modalities), True = present.

    Samples are 1 to 4 and modalities 2 to 5 where None; every sample keeps ``at_least`` of them.
    """
    rows = draw(st.integers(1, 4)) if samples is None else samples
    columns = draw(st.integers(max(2, at_least), 5)) if modalities is None else modalities
    subsets = st.sets(st.integers(0, columns - 1), min_size=at_least)
    table = torch.zeros(rows, columns, dtype=torch.bool)
    for row in table:
        row[list(draw(subsets))] = True
    return table


def _generator(draw: st.DrawFn) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**16)))


def _normal(draw: st.DrawFn, shape: Shape) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_generator(draw))

"""Patients for the examples: what a cohort is, patients in memory, random patches, and the phantom of the package.

A :class:`Cohort` is all that demo and experiment need to know: who is in training, who is in the test set, how often
each modality is missing in training. Real data is read from a folder and never copied into the repository:
:mod:`examples.folders` knows two formats, :mod:`examples.own_cohort` is a beginning for another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from passion_plugin.evaluation import BRATS_REGIONS
from passion_plugin.phantom import CLASSES, MODALITIES, PhantomDataset

__all__ = ["Cases", "Cohort", "RandomPatches", "phantom_cohort"]

Item = dict[str, Any]


@dataclass(frozen=True)
class Cohort:
    """Patients of one study, split into training and test.

    Attributes:
        name: for titles; the same for all folds of one study in an experiment.
        modalities: names, in the order of the image channels.
        classes: names of the labels 0..K-1.
        regions: what is scored: name to labels.
        missing_rates: how often each modality is missing in training.
        train: complete training patients; what is missing is removed later.
        test: complete test patients.
        credit: to be quoted wherever a figure is shown.
        steps: default number of optimizer steps, for a demo of a few minutes.
        patch: default size of the training patches, voxels per axis.
        ndim: 3, or 2 to train and predict slice by slice, across the first spatial axis.
        batch_size: default number of patches or slices per step.
        widths: default channels of the network, by level.
        primary: the regions that a comparison is about; empty: all of them.
    """

    name: str
    modalities: tuple[str, ...]
    classes: tuple[str, ...]
    regions: Mapping[str, Sequence[int]]
    missing_rates: Mapping[str, float]
    train: PhantomDataset | Cases
    test: PhantomDataset | Cases
    credit: str = ""
    steps: int = 200
    patch: int = 24
    ndim: int = 3
    batch_size: int = 2
    widths: tuple[int, ...] = (8, 12, 16, 24)
    primary: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """K, background included."""
        return len(self.classes)


class Cases(Dataset[Item]):
    """Patients as items that a function makes, kept in memory after the first access.

    Args:
        ids: names, in order.
        read: ``read(id)`` gives image (M, *spatial) float32, label (*spatial) int64, and if it is known the
            spacing, mm per spatial axis.
        least: spatial sizes are padded with zeros (background) to at least this
        multiple: and to a multiple of this.
    """

    def __init__(
        self,
        ids: Sequence[str],
        read: Callable[[str], tuple[NDArray[Any], ...]],
        least: int = 16,
        multiple: int = 8,
    ) -> None:
        self.ids = list(ids)
        self._read = read
        self._least, self._multiple = least, multiple
        self._cache: dict[int, Item] = {}

    def __len__(self) -> int:
        """Number of patients."""
        return len(self.ids)

    def __getitem__(self, index: int) -> Item:
        """``{"image": (M, *spatial) float32, "label": (*spatial) int64, "id": str}``, and ``"spacing"`` if known."""
        if index not in self._cache:
            parts = [torch.from_numpy(part) for part in self._read(self.ids[index])]
            size = [max(self._least, -(-s // self._multiple) * self._multiple) for s in parts[1].shape]
            padded = [pad_to(part, size) for part in parts[:2]]
            self._cache[index] = dict(zip(("image", "label", "spacing"), [*padded, *parts[2:]], strict=False))
        return {**{key: part.clone() for key, part in self._cache[index].items()}, "id": self.ids[index]}


class RandomPatches(Dataset[Item]):
    """Random patches, half of them around a labelled voxel, with random flips.

    Patient and position of patch i depend on ``seed`` and i alone, so that two runs get the same batches.
    Every patient is drawn equally often: patches ``N e .. N (e + 1) - 1`` are one epoch over N patients.

    Args:
        cases: items with ``"image"`` (M, *spatial), ``"label"`` (*spatial) and what else is to be handed on.
        size: voxels of a patch; patients that are smaller are padded with zeros.
        count: number of patches.
        seed: of the random numbers.
    """

    def __init__(self, cases: Any, size: Sequence[int], count: int, seed: int = 0) -> None:
        self.cases, self.size, self.count, self.seed = cases, tuple(size), count, seed

    def __len__(self) -> int:
        """Number of patches."""
        return self.count

    def __getitem__(self, index: int) -> Item:
        """The item of one patient, cropped and flipped."""
        if not 0 <= index < self.count:
            raise IndexError(f"patch {index} is outside 0..{self.count - 1}.")
        epoch, place = divmod(index, len(self.cases))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.cases))
        item = dict(self.cases[int(order[place])])
        rng = np.random.default_rng((self.seed, epoch, place))
        image, label = pad_to(item["image"], self.size), pad_to(item["label"], self.size)
        corner = [int(rng.integers(full - part + 1)) for full, part in zip(label.shape, self.size, strict=True)]
        marked = label.nonzero()
        if len(marked) and rng.random() < 0.5:
            corner = corner_around(marked, label.shape, self.size, rng)
        image, label = cut_and_flip(image, label, corner, self.size, rng)
        return {**item, "image": image.contiguous(), "label": label.contiguous()}


def corner_around(marked: Tensor, shape: Sequence[int], size: Sequence[int], rng: np.random.Generator) -> list[int]:
    """First corner of a random window that holds one of the ``marked`` voxels (n, axes), inside ``shape``."""
    voxel = marked[int(rng.integers(len(marked)))].tolist()
    return [
        min(max(v - int(rng.integers(part)), 0), full - part) for v, full, part in zip(voxel, shape, size, strict=True)
    ]


def cut_and_flip(
    image: Tensor, label: Tensor, corner: Sequence[int], size: Sequence[int], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """The window of image (M, *spatial) and label (*spatial), each axis flipped in half of the cases."""
    window = tuple(slice(start, start + part) for start, part in zip(corner, size, strict=True))
    axes = [axis for axis in range(-len(size), 0) if rng.random() < 0.5]
    return image[(slice(None), *window)].flip(axes), label[window].flip(axes)


def phantom_cohort(seed: int = 0, train: int = 32, test: int = 12, size: int = 40) -> Cohort:
    """Phantom patients of ``size``^3 voxels at the missing rates of the paper, (0.2, 0.4, 0.6, 0.8)."""
    return Cohort(
        name="phantom",
        modalities=MODALITIES,
        classes=CLASSES,
        regions=BRATS_REGIONS,
        missing_rates=dict(zip(MODALITIES, (0.2, 0.4, 0.6, 0.8), strict=True)),
        train=PhantomDataset(train, (size,) * 3, seed=2 * seed),
        test=PhantomDataset(test, (size,) * 3, seed=2 * seed + 1),
    )


def pad_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """Pad the last ``len(size)`` axes with zeros at their end, up to ``size`` where they are smaller."""
    missing = [max(0, want - have) for want, have in zip(size, x.shape[-len(size) :], strict=True)]
    return F.pad(x, [amount for extra in reversed(missing) for amount in (0, extra)])

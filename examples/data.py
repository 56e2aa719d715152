"""Patients for the examples: the phantom that ships with the package, or real data from a folder.

A :class:`Cohort` is all that demo and experiment need to know: who is in training, who is in the test set, how often
each modality is missing in training. Real data is read from a folder and never copied into the repository.

Formats of a folder with ``index.json`` (soft-tissue sarcoma: CT, FDG-PET, T1 MR with an expert outline of the
tumour) or of ``*.npz`` files with ``flair``, ``t1c``, ``t1``, ``t2`` and ``lesion`` (multiple sclerosis).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from passion_plugin.evaluation import BRATS_REGIONS
from passion_plugin.phantom import CLASSES, MODALITIES, PhantomDataset, standardise

__all__ = [
    "Cases",
    "Cohort",
    "RandomPatches",
    "load_cohort",
    "ms4_cohort",
    "phantom_cohort",
    "sts_cohort",
    "sts_slices",
]

Item = dict[str, Any]

STS_MODALITIES = ("ct", "pet", "t1")
STS_CREDIT = (
    "Vallières et al. 2015, Soft-tissue-Sarcoma, The Cancer Imaging Archive, "
    "doi:10.7937/K9/TCIA.2015.7GO2GSKS, CC BY 3.0, processed by the IBSI validation study; "
    "reduced in resolution and to 8 bits here"
)


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
    """Patients read from files, kept in memory after the first access.

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


def load_cohort(data: str, *, seed: int = 0, fold: int = 0, smoke: bool = False) -> Cohort:
    """Read the cohort that ``--data`` names.

    Args:
        data: ``"phantom"``, or a folder in one of the two formats of this module.
        seed: of the phantom.
        fold: test fold of a folder that has folds.
        smoke: few and small phantoms.

    Raises:
        FileNotFoundError: when ``data`` is neither.
    """
    if data == "phantom":
        return phantom_cohort(seed, *((4, 2, 16) if smoke else (32, 12, 40)))
    folder = Path(data)
    if (folder / "index.json").is_file():
        return sts_cohort(folder, fold)
    if any(folder.glob("ms_*.npz")):
        return ms4_cohort(folder)
    raise FileNotFoundError(
        f"--data {data!r}: not 'phantom', and no folder with index.json or ms_*.npz files. "
        f"{'The folder exists but has neither.' if folder.is_dir() else 'There is no such folder.'}"
    )


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


def sts_cohort(folder: Path, fold: int = 0) -> Cohort:
    """Soft-tissue sarcoma, CT, PET and T1; the test set is one of the folds of ``index.json``.

    The label is the expert outline of the tumour. PET, which shows it best, is missing most often.
    """
    train, test = _sts_folds(folder, fold)

    def read(name: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        image, stored = _read_sts(folder / f"{name}.npz")
        return image, stored["gtv"].astype(np.int64)

    return Cohort(
        name=f"soft-tissue sarcoma, fold {fold}",
        modalities=STS_MODALITIES,
        classes=("background", "gross tumour volume"),
        regions={"GTV": (1,)},
        missing_rates={"ct": 0.2, "pet": 0.8, "t1": 0.5},
        train=Cases(train, read),
        test=Cases(test, read),
        credit=STS_CREDIT,
        # More of the body has to be in view than of the phantom, to tell a tumour from other soft tissue.
        steps=400,
        patch=32,
    )


def sts_slices(folder: Path, fold: int = 0, held_out: Path | None = None) -> Cohort:
    """The same patients slice by slice, with the metabolically active part of the tumour as a second class.

    Volumes are neither padded nor resampled, so that scores are those of the data as it is stored.

    Args:
        folder: the patients.
        fold: which of them are the test set.
        held_out: a folder of others to test on instead; all in ``folder`` are trained on then, whatever the fold.

    Raises:
        ValueError: there is no such fold, or no held-out patient, or one that is in both folders.
    """
    if held_out is None:
        train, test = _sts_folds(folder, fold)
        paths = {name: folder / f"{name}.npz" for name in (*train, *test)}
    else:
        paths = {name: folder / f"{name}.npz" for name in _sts_subjects(folder)}
        others = {path.stem: path for path in sorted(held_out.glob("*.npz"))}
        if both := sorted(set(others) & set(paths)):
            raise ValueError(f"{', '.join(both[:3])} are in both folders; held-out patients must be others")
        if not others:
            raise ValueError(f"there are no *.npz files in {held_out}")
        train, test, paths = sorted(paths), list(others), paths | others

    def read(name: str) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
        image, stored = _read_sts(paths[name])
        gtv = stored["gtv"].astype(np.int64)
        return image, gtv + gtv * stored["mtv"], stored["spacing"]

    return Cohort(
        name="soft-tissue sarcoma",
        modalities=STS_MODALITIES,
        classes=("background", "tumour, not active", "tumour, active"),
        regions={"gtv": (1, 2), "mtv": (2,)},
        missing_rates={"ct": 0.2, "pet": 0.8, "t1": 0.5},
        train=Cases(train, read, least=1, multiple=1),
        test=Cases(test, read, least=1, multiple=1),
        credit=STS_CREDIT,
        steps=600,
        patch=48,
        ndim=2,
        batch_size=8,
        widths=(8, 16, 32, 48),
        primary=("gtv",),
    )


def _sts_subjects(folder: Path) -> dict[str, Any]:
    """What ``index.json`` says about each patient, in the order of their names."""
    return dict(sorted(json.loads((folder / "index.json").read_text())["subjects"].items()))


def _sts_folds(folder: Path, fold: int) -> tuple[list[str], list[str]]:
    """Training and test patients of one fold."""
    folds = {name: int(entry["fold"]) for name, entry in _sts_subjects(folder).items()}
    if fold not in folds.values():
        known = sorted(set(folds.values()))
        raise ValueError(f"fold {fold} is not in {folder / 'index.json'}; it has {known}.")
    train = [name for name, place in folds.items() if place != fold]
    return train, [name for name, place in folds.items() if place == fold]


def _read_sts(path: Path) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
    """The image (3, z, y, x) of one patient, and all that is stored."""
    with np.load(path) as file:
        stored = {key: file[key] for key in file.files}
    ct, pet, t1 = (stored[key].astype(np.float32) for key in STS_MODALITIES)
    # CT and PET are quantitative and keep a common scale; MR is scaled within its own field of view.
    # Air and no uptake are 0 in all of them, as are the padding and a modality that is missing.
    image = np.stack([2 * ct / 100, np.sqrt(30) * pet / 255, standardise(t1[None])[0]])
    return image.astype(np.float32), stored


def ms4_cohort(folder: Path) -> Cohort:
    """Multiple sclerosis, four MR modalities; the last patient is the test set.

    For trying that real files go through. Nothing can be concluded from so few patients.
    """
    stored = {"flair": "flair", "t1ce": "t1c", "t1": "t1", "t2": "t2"}
    names = sorted(path.stem for path in folder.glob("ms_*.npz"))

    def read(name: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        with np.load(folder / f"{name}.npz") as file:
            image = np.stack([file[key].astype(np.float32) for key in stored.values()])
            label = file["lesion"].astype(np.int64)
        return standardise(image), label

    return Cohort(
        name="multiple sclerosis",
        modalities=tuple(stored),
        classes=("background", "lesion"),
        regions={"lesion": (1,)},
        missing_rates=dict(zip(stored, (0.2, 0.4, 0.6, 0.8), strict=True)),
        train=Cases(names[:-1], read),
        test=Cases(names[-1:], read),
        credit="Lesjak et al., Neuroinformatics 2017, doi:10.1007/s12021-017-9348-7, CC BY; "
        "cropped and reduced to 8 bits here",
    )


def pad_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """Pad the last ``len(size)`` axes with zeros at their end, up to ``size`` where they are smaller."""
    missing = [max(0, want - have) for want, have in zip(size, x.shape[-len(size) :], strict=True)]
    return F.pad(x, [amount for extra in reversed(missing) for amount in (0, extra)])

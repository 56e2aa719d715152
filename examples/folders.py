"""Patients from a folder in one of two formats, which examples/README.md describes.

With ``index.json``: soft-tissue sarcoma, CT, FDG-PET and T1 MR with an expert outline of the tumour. With files
``ms_*.npz``: multiple sclerosis, four MR modalities. All files are read and checked at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.data import Cases, Cohort, phantom_cohort
from examples.patient_files import Arrays, read_folds, read_patients
from passion_plugin.errors import ConfigError
from passion_plugin.phantom import standardise

__all__ = ["load_cohort", "ms4_cohort", "sts_cohort", "sts_slices"]

STS_MODALITIES = ("ct", "pet", "t1")
STS_CREDIT = (
    "Vallières et al. 2015, Soft-tissue-Sarcoma, The Cancer Imaging Archive, "
    "doi:10.7937/K9/TCIA.2015.7GO2GSKS, CC BY 3.0, processed by the IBSI validation study; "
    "reduced in resolution and to 8 bits here"
)


def load_cohort(data: str, *, seed: int = 0, fold: int = 0, smoke: bool = False) -> Cohort:
    """Read the cohort that ``--data`` of the demo names.

    Args:
        data: ``"phantom"``, or a folder in one of the two formats of this module.
        seed: of the phantom.
        fold: test fold of a folder.
        smoke: few and small phantoms.

    Raises:
        ConfigError: ``data`` is neither, or something is wrong with the folder.
    """
    if data == "phantom":
        return phantom_cohort(seed, *((4, 2, 16) if smoke else (32, 12, 40)))
    folder = Path(data)
    if (folder / "index.json").is_file():
        return sts_cohort(folder, fold)
    if any(folder.glob("ms_*.npz")):
        return ms4_cohort(folder, fold)
    raise ConfigError(
        f"--data {data!r}: not 'phantom', and no folder with index.json or ms_*.npz files. "
        f"{'The folder exists but has neither.' if folder.is_dir() else 'There is no such folder.'}"
    )


def sts_cohort(folder: Path, fold: int = 0) -> Cohort:
    """Soft-tissue sarcoma, CT, PET and T1; the test set is one of the folds of ``index.json``.

    The label is the expert outline of the tumour. PET, which shows it best, is missing most often.

    Raises:
        ConfigError: there is no such fold, or something is wrong with ``index.json`` or the files.
    """
    train, test = _sts_folds(folder, fold)
    patients = _sts_patients({name: folder / f"{name}.npz" for name in (*train, *test)})

    def read(name: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return _sts_image(patients[name]), patients[name]["gtv"].astype(np.int64)

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
        ConfigError: there is no such fold, or no held-out patient, or one that is in both folders, or something is
            wrong with ``index.json`` or the files.
    """
    if held_out is None:
        train, test = _sts_folds(folder, fold)
        paths = {name: folder / f"{name}.npz" for name in (*train, *test)}
    else:
        paths = {name: folder / f"{name}.npz" for name in read_folds(folder)}
        others = {path.stem: path for path in sorted(held_out.glob("*.npz"))}
        if both := sorted(set(others) & set(paths)):
            raise ConfigError(f"{', '.join(both[:3])} are in both folders; held-out patients must be others")
        if not others:
            raise ConfigError(f"there are no *.npz files in {held_out}")
        train, test, paths = sorted(paths), list(others), paths | others
    patients = _sts_patients(paths)

    def read(name: str) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
        stored = patients[name]
        gtv = stored["gtv"].astype(np.int64)
        return _sts_image(stored), gtv + gtv * stored["mtv"].astype(np.int64), stored["spacing"].astype(np.float32)

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


def _sts_folds(folder: Path, fold: int) -> tuple[list[str], list[str]]:
    """Training and test patients of one fold."""
    folds = read_folds(folder)
    known = sorted(set(folds.values()))
    if fold not in known or len(known) < 2:
        index = folder / "index.json"
        raise ConfigError(f"fold {fold}: {index} has the folds {known}; one is tested on, and others are trained on")
    train = [name for name, place in folds.items() if place != fold]
    return train, [name for name, place in folds.items() if place == fold]


def _sts_patients(paths: Mapping[str, Path]) -> dict[str, Arrays]:
    """All arrays of the format by patient and name."""
    return read_patients(paths, images=STS_MODALITIES, labels={"gtv": 2, "mtv": 2}, spacing=True)


def _sts_image(stored: Arrays) -> NDArray[np.float32]:
    """The image (3, z, y, x) of one patient."""
    ct, pet, t1 = (stored[key].astype(np.float32) for key in STS_MODALITIES)
    # CT and PET are quantitative and keep a common scale; MR is scaled within its own field of view.
    # Air and no uptake are 0 in all of them, as are the padding and a modality that is missing.
    image = np.stack([2 * ct / 100, np.sqrt(30) * pet / 255, standardise(t1[None])[0]])
    return image.astype(np.float32)


def ms4_cohort(folder: Path, fold: int = 0) -> Cohort:
    """Multiple sclerosis, four MR modalities; the last patient is the test set.

    For trying that real files go through. Nothing can be concluded from so few patients.

    Raises:
        ConfigError: a fold other than 0, which would repeat the same test patient; fewer than two patients; or
            something is wrong with the files.
    """
    stored = {"flair": "flair", "t1ce": "t1c", "t1": "t1", "t2": "t2"}
    names = sorted(path.stem for path in folder.glob("ms_*.npz"))
    if fold != 0:
        raise ConfigError(f"fold {fold}: ms_*.npz files have fold 0 alone, with {names[-1]} as its test patient")
    if len(names) < 2:
        raise ConfigError(f"{names[0]} is alone in {folder}: one ms_*.npz file to test on, and others to train on")
    paths = {name: folder / f"{name}.npz" for name in names}
    patients = read_patients(paths, images=[*stored.values()], labels={"lesion": 2}, spacing=False)

    def read(name: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        image = np.stack([patients[name][key].astype(np.float32) for key in stored.values()])
        return standardise(image), patients[name]["lesion"].astype(np.int64)

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

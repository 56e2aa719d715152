"""An experiment on patients of your own. Copy this file and change what differs.

    OWN_DATA=FOLDER python -m examples.experiment --data examples.own_cohort:cohort --folds 0 1 2 3 4

The folder holds one ``.npz`` file per patient: arrays (z, y, x) of one shape, one for each modality and ``label`` with
1 in the tumour, and ``spacing`` (3,), mm along z, y and x. Modalities have the names that you gave them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.data import Cases, Cohort
from examples.patient_files import array_names, read_patients
from passion_plugin.errors import ConfigError
from passion_plugin.phantom import standardise

CLASSES = ("background", "tumour")
FOLDS = 5


def cohort(fold: int) -> Cohort:
    """Every fifth patient in the order of their names is tested on, from number ``fold``; the others are trained on.

    Raises:
        ConfigError: OWN_DATA is not set, there is no such fold, or something is wrong with the files.
    """
    folder = os.environ.get("OWN_DATA")
    paths = {path.stem: path for path in sorted(Path(folder).glob("*.npz"))} if folder else {}
    if not 0 <= fold < FOLDS or len(paths) < FOLDS:
        found = f"fold {fold} with {len(paths)} *.npz files in OWN_DATA={folder!r}"
        raise ConfigError(f"{found}; give a fold from 0 to {FOLDS - 1}, and a folder with {FOLDS} files or more")
    modalities = tuple(name for name in array_names(min(paths.values())) if name not in ("label", "spacing"))
    patients = read_patients(paths, images=modalities, labels={"label": len(CLASSES)}, spacing=True)

    def read(name: str) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
        stored = patients[name]
        image = np.stack([stored[key].astype(np.float32) for key in modalities])
        return standardise(image), stored["label"].astype(np.int64), stored["spacing"].astype(np.float32)

    return Cohort(
        name="my patients",
        modalities=modalities,
        classes=CLASSES,
        regions={"tumour": (1,)},
        missing_rates=dict.fromkeys(modalities, 0.3),  # patients with one modality alone teach PASSION nothing
        train=Cases([name for i, name in enumerate(paths) if i % FOLDS != fold], read, least=1, multiple=1),
        test=Cases([*paths][fold::FOLDS], read, least=1, multiple=1),
        patch=48,
        ndim=2,  # slice by slice; 3 for volumes
        batch_size=8,
    )

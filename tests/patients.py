"""Folders of small random patients, in the formats that the examples read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def fake_sts(folder: Path, prefix: str = "sts") -> None:
    """Four patients in two folds, with ``index.json``."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    subjects = {f"{prefix}_{i:03d}": {"fold": i % 2} for i in range(4)}
    (folder / "index.json").write_text(json.dumps({"subjects": subjects}))
    for name in subjects:
        gtv = np.zeros((20, 13, 18), dtype=np.uint8)
        gtv[5:9, 4:8, 6:12] = 1
        arrays = {key: rng.integers(0, 256, gtv.shape).astype(np.uint8) for key in ("ct", "pet", "t1")}
        arrays["t1"][:5] = 0
        np.savez(folder / f"{name}.npz", gtv=gtv, mtv=gtv, spacing=np.ones(3, np.float32), **arrays)


def fake_ms4(folder: Path) -> None:
    """Three patients, ``ms_1.npz`` to ``ms_3.npz``."""
    rng = np.random.default_rng(0)
    for number in (1, 2, 3):
        keys = ("flair", "t1c", "t1", "t2")
        arrays = {key: rng.integers(0, 256, (9, 12, 10)).astype(np.uint8) for key in keys}
        np.savez(folder / f"ms_{number}.npz", lesion=(arrays["t2"] > 250).astype(np.uint8), **arrays)


def fake_own(folder: Path, count: int = 7) -> None:
    """Patients ``a`` to ``g`` with two modalities of unusual names; no two volumes have the same size."""
    rng = np.random.default_rng(0)
    for number, name in enumerate("abcdefg"[:count]):
        shape = (3, 10 + number, 12)
        images = {key: rng.normal(size=shape).astype(np.float32) for key in ("Perfusion", "adc map")}
        label = np.zeros(shape, dtype=np.uint8)
        label[1:, 3:7, 4:9] = 1
        np.savez(folder / f"{name}.npz", label=label, spacing=np.array([3.0, 1, 1]), **images)


def change(path: Path, **arrays: object) -> None:
    """Replace arrays of a file; None takes one out."""
    with np.load(path) as file:
        kept = {**file, **arrays}
    np.savez(path, **{key: array for key, array in kept.items() if array is not None})

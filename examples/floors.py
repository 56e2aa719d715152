"""What no network is needed for: the floors that results on the sarcoma patients should be read against.

    python -m examples.floors FOLDER

Both floors are fitted on the training patients of each fold and scored on its test patients, mean Dice of ``gtv``:

* **shape**: every training outline stretched to a common grid, averaged, stretched back to the size of the test volume,
  and cut at one threshold. It sees no image. The volumes are boxes around the tumour, so that it is not bad.
* **PET**: one threshold on the uptake.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.data import Cases
from examples.folders import sts_slices
from passion_plugin.errors import ConfigError
from passion_plugin.evaluation import dice_scores

__all__ = ["best_threshold", "floors", "mean_dice"]

_GRID = (32, 32, 32)
_PART_OF_OUTLINES = np.arange(0.2, 0.8, 0.05)
_UPTAKE = np.arange(0.6, 2.5, 0.05)  # of the PET channel, the root of the standardised uptake value


def mean_dice(scores: Sequence[Tensor], truths: Sequence[Tensor], threshold: float) -> float:
    """Mean over cases of the Dice of the voxels above a threshold and the outline, bool; 1 where both are empty."""
    pairs = [((score > threshold)[None, None], truth[None, None]) for score, truth in zip(scores, truths, strict=True)]
    return float(np.mean([dice_scores(*pair, empty="one").item() for pair in pairs]))


def best_threshold(scores: Sequence[Tensor], truths: Sequence[Tensor], thresholds: Sequence[float]) -> float:
    """The threshold above which the voxels of every case have the best mean Dice."""
    return max(thresholds, key=lambda threshold: mean_dice(scores, truths, threshold))


def floors(folder: Path, fold: int) -> dict[str, float]:
    """Both floors of one fold, in points of Dice."""
    cohort = sts_slices(folder, fold)
    channel = cohort.modalities.index("pet")
    truths, tests = _outlines(cohort.train), _outlines(cohort.test)
    shape = torch.stack([_stretched(outline.float(), _GRID) for outline in truths]).mean(0)
    found = {}
    for name, thresholds, score in (
        ("shape", _PART_OF_OUTLINES, lambda item: _stretched(shape, item["label"].shape)),
        ("PET", _UPTAKE, lambda item: item["image"][channel]),
    ):
        seen, new = ([score(cases[i]) for i in range(len(cases))] for cases in (cohort.train, cohort.test))
        threshold = best_threshold(seen, truths, thresholds.tolist())
        found[name] = 100 * mean_dice(new, tests, threshold)
    return found


def _outlines(cases: Cases) -> list[Tensor]:
    return [cases[i]["label"] > 0 for i in range(len(cases))]


def _stretched(volume: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(volume[None, None], size=tuple(size), mode="trilinear")[0, 0]


def main() -> None:
    """Print the floors of five folds and their means."""
    command = argparse.ArgumentParser(prog="python -m examples.floors", description="Floors of the sarcoma folds.")
    command.add_argument("folder", type=Path, help="the sarcoma patients, with index.json")
    folder = command.parse_args().folder
    try:
        rows = [floors(folder, fold) for fold in range(5)]
    except ConfigError as error:
        command.error(str(error))
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"{name}: {np.mean(values):.1f} (by fold {', '.join(f'{value:.1f}' for value in values)})")


if __name__ == "__main__":
    main()

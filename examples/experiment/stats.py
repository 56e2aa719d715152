r"""Paired differences between strategies, with intervals over patients.

Two strategies of one block (same network, assignment, fold, seed, batch size) differ in the strategy alone, and are
compared patient by patient. What is averaged first: subsets and targets of a patient in a block, then the blocks of
the patient; patients are the independent units, however many folds tested them. Intervals are percentiles of a
bootstrap that draws patients with replacement within each fold, because those of one fold share their trained
networks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from examples.experiment.cells import Cell

__all__ = ["Interval", "Sample", "Scores", "bootstrap", "by_patient", "by_run", "patient_means", "seed_means"]

Select = Callable[[Cell, str, str], bool]
"""Whether to use a score: (cell, subset, target) -> bool."""

_FEWEST = 5
"""Units that an interval takes; of fewer, percentiles of a bootstrap tell little more than least and greatest."""


class Interval(NamedTuple):
    """A mean with its 95 % interval.

    Attributes:
        mean: over units; NaN when there are none.
        low: 2.5th percentile of the bootstrap; NaN with fewer than five units.
        high: 97.5th percentile.
        units: number of independent units, patients or pairs of fold and seed.
        runs: number of trainings behind it (of each strategy, for a difference).
    """

    mean: float
    low: float
    high: float
    units: int
    runs: int


class Sample(NamedTuple):
    """One patient in one block, averaged over the selected subsets and targets."""

    block: tuple[Any, ...]
    fold: int
    seed: int
    patient: str
    value: float


class Scores:
    """All scores of one metric, by training.

    Args:
        records: finished cells, see :meth:`examples.experiment.store.Store.records`.
        metric: ``"dice"`` or ``"hd95"``.
        found_only: leave out scores that a convention decided because a mask is empty.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]], metric: str = "dice", found_only: bool = False) -> None:
        self.values: dict[Cell, dict[tuple[str, str, str], float]] = {}
        for record in records:
            found = {
                (subset, target, patient): value
                for subset, patient, target, name, value, status in record["scores"]
                if name == metric and value is not None and (status == "ok" or not found_only)
            }
            if found:
                self.values[Cell(**record["cell"])] = found

    def level(self, strategy: str, select: Select) -> list[Sample]:
        """The scores themselves, by block and patient."""
        return self._samples(strategy, None, select)

    def difference(self, first: str, second: str, select: Select) -> list[Sample]:
        """``first`` minus ``second``, over the blocks that have both, and the scores that both have."""
        return self._samples(first, second, select)

    def _samples(self, first: str, second: str | None, select: Select) -> list[Sample]:
        others = {cell.block: found for cell, found in self.values.items() if cell.strategy == second}
        samples = []
        for cell, found in self.values.items():
            if cell.strategy != first or (second is not None and cell.block not in others):
                continue
            baseline = others.get(cell.block)
            by_patient: dict[str, list[float]] = {}
            for (subset, target, patient), value in found.items():
                other = 0.0 if baseline is None else baseline.get((subset, target, patient))
                if other is not None and select(cell, subset, target):
                    by_patient.setdefault(patient, []).append(value - other)
            samples += [
                Sample(cell.block, cell.fold, cell.seed, patient, statistics.fmean(values))
                for patient, values in by_patient.items()
            ]
        return samples


def by_patient(samples: Sequence[Sample]) -> Interval:
    """Mean over patients of each patient's mean over blocks; patients are drawn within their folds."""
    folds: dict[str, int] = {}
    for sample in samples:
        folds[sample.patient] = min(sample.fold, folds.get(sample.patient, sample.fold))
    return _interval(samples, patient_means(samples), strata=folds)


def by_run(samples: Sequence[Sample]) -> Interval:
    """Mean over pairs of fold and seed of their means; the pairs are what is drawn."""
    means = _means(((sample.fold, sample.seed), sample.value) for sample in samples)
    return _interval(samples, means, strata=dict.fromkeys(means, 0))


def seed_means(samples: Sequence[Sample]) -> dict[int, float]:
    """Mean over patients of every seed."""
    seeds = sorted({sample.seed for sample in samples})
    return {seed: statistics.fmean(patient_means([s for s in samples if s.seed == seed]).values()) for seed in seeds}


def patient_means(samples: Sequence[Sample]) -> dict[str, float]:
    """Mean over blocks of every patient."""
    return _means((sample.patient, sample.value) for sample in samples)


def bootstrap(
    values: Sequence[float], strata: Sequence[Any], *, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    r"""95 % percentile interval of the mean, drawing with replacement within each stratum.

    Drawing :math:`n` from :math:`n` values gives a variance that is too small by :math:`(n-1)/n`, which matters where
    strata are small. Deviations from the mean of a stratum are scaled by :math:`\sqrt{n/(n-1)}` for that (Rao and Wu,
    JASA 1988, doi:10.1080/01621459.1988.10478591). A stratum of one value says nothing about its spread: where there
    is one, strata are not told apart.

    Args:
        values: one for each independent unit, two at least.
        strata: which group each belongs to.
        draws: repetitions.
        seed: same seed, same interval.
    """
    random = np.random.default_rng(seed)
    array = np.asarray(values, dtype=np.float64)
    _, labels, sizes = np.unique(np.asarray(strata), return_inverse=True, return_counts=True)
    if sizes.min() == 1:
        labels = np.zeros_like(labels)
    totals = np.full(draws, array.sum())
    for label in np.unique(labels):
        members = array[labels == label]
        size = len(members)
        deviations = (members - members.mean())[random.integers(size, size=(draws, size))].sum(axis=1)
        totals += deviations * np.sqrt(size / (size - 1))
    low, high = np.percentile(totals / len(array), [2.5, 97.5])
    return float(low), float(high)


def _interval(samples: Sequence[Sample], means: Mapping[Any, float], strata: Mapping[Any, Any]) -> Interval:
    runs = len({sample.block for sample in samples})
    mean = statistics.fmean(means.values()) if means else float("nan")
    if len(means) < _FEWEST:
        return Interval(mean, float("nan"), float("nan"), len(means), runs)
    bounds = bootstrap(list(means.values()), [strata[unit] for unit in means])
    return Interval(mean, *bounds, len(means), runs)


def _means(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    groups: dict[Any, list[float]] = {}
    for unit, value in pairs:
        groups.setdefault(unit, []).append(value)
    return {unit: statistics.fmean(values) for unit, values in groups.items()}

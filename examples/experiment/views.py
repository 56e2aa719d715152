"""How patients are shown to a network: batches in training, whole patients afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.data import corner_around, cut_and_flip
from passion_plugin.data import EvenSubsets, PresenceTable, blank_missing, drop_modalities
from passion_plugin.evaluation import Predict

__all__ = ["DRAWINGS", "Batches", "predict_whole"]

Draws = Iterator[tuple[int, Tensor]]


def draw_all(table: PresenceTable, seed: int, count: int) -> Draws:
    """Every patient equally often, in random order, with all that it has."""
    random = np.random.default_rng(seed)
    passes = (random.permutation(len(table)).tolist() for _ in itertools.count())
    for index in itertools.islice(itertools.chain.from_iterable(passes), count):
        yield index, torch.tensor(table.presence[index])


def draw_drop(table: PresenceTable, seed: int, count: int) -> Draws:
    """The same patients in the same order, with a random non-empty part of what they have."""
    generator = torch.Generator().manual_seed(seed)
    for index, present in draw_all(table, seed, count):
        yield index, drop_modalities(present[None], generator=generator)[0]


def draw_even(table: PresenceTable, seed: int, count: int) -> Draws:
    """A combination of modalities, all of them in turn, then one of the patients that have it."""
    for index, visible in EvenSubsets(table, seed, length=count):
        yield index, torch.from_numpy(visible)


DRAWINGS: Mapping[str, Callable[[PresenceTable, int, int], Draws]] = {
    "all": draw_all,
    "drop": draw_drop,
    "even": draw_even,
}
"""``count`` draws (patient, visible modalities (M,) bool) from a table and a seed."""


class Batches:
    """Random patches with random flips, half of them with something labelled in view where there is any.

    Batch i depends on the patients, ``seed``, ``drawing`` and i alone; strategies that draw alike see the same.

    Args:
        cases: training patients, items with ``"image"`` (M, *spatial) and ``"label"`` (*spatial).
        table: what each of them has, in the same order. What it lacks is never shown.
        drawing: one of :data:`DRAWINGS`.
        size: voxels of a patch, per axis; with two axes patches are cut from single slices.
        batch_size: B.
        steps: number of batches.
        seed: of all random numbers.
        device: where batches are put.
    """

    def __init__(
        self,
        cases: Any,
        table: PresenceTable,
        drawing: str,
        size: Sequence[int],
        *,
        batch_size: int,
        steps: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._patients = [(item["image"], item["label"]) for item in (cases[i] for i in range(len(cases)))]
        self._labelled = [[part.unique() for part in label.nonzero().unbind(1)] for _, label in self._patients]
        self.table, self.drawing, self.size, self.seed = table, drawing, tuple(size), seed
        self.batch_size, self.steps, self.device = batch_size, steps, device

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Batches of ``"image"`` (B, M, *size), ``"mask"`` and ``"presence"`` (B, M) bool, ``"label"`` (B, *size).

        The mask is what the drawing shows, the presence what the patients have. Images are blank where there is
        nothing; what the mask hides is still there, for students that are taught from a part of it.
        """
        draws = DRAWINGS[self.drawing](self.table, self.seed, self.steps * self.batch_size)
        for step in range(self.steps):
            drawn = [next(draws) for _ in range(self.batch_size)]
            first = step * self.batch_size
            patches = [self._patch(number, index) for number, (index, _) in enumerate(drawn, start=first)]
            mask = torch.stack([visible for _, visible in drawn])
            presence = torch.tensor(self.table.presence[[index for index, _ in drawn]])
            image, label = (torch.stack(part) for part in zip(*patches, strict=True))
            batch = {"image": blank_missing(image, presence), "mask": mask, "presence": presence, "label": label}
            yield {key: value.to(self.device) for key, value in batch.items()}

    def _patch(self, number: int, index: int) -> tuple[Tensor, Tensor]:
        """Patch ``number`` of the training, from patient ``index``."""
        random = np.random.default_rng((self.seed, number))
        image, label = self._patients[index]
        aimed = random.random() < 0.5
        if len(self.size) < label.ndim:
            slices = self._labelled[index][0]
            z = int(random.choice(slices)) if aimed and len(slices) else int(random.integers(len(label)))
            image, label = image[:, z], label[z]
        image, label = centred(image, self.size), centred(label, self.size)
        corner = [int(random.integers(full - part + 1)) for full, part in zip(label.shape, self.size, strict=True)]
        marked = label.nonzero() if aimed and tuple(label.shape) != self.size else ()
        if len(marked):
            corner = corner_around(marked, label.shape, self.size, random)
        return cut_and_flip(image, label, corner, self.size, random)


def predict_whole(size: Sequence[int], *, multiple: int = 8, slices: int = 32) -> Predict:
    """Make a ``predict`` for whole patients, in one piece or slice by slice.

    Instance norm averages over what is in view, so that no less is shown than in training.

    Args:
        size: smallest field of view, per axis; with two axes patients are predicted slice by slice.
        multiple: fields of view are padded to multiples of this.
        slices: slices per call of the network.

    Returns:
        A function for ``evaluate_subsets(..., predict=...)``.
    """

    def predict(model: Any, x: Tensor, mask: Tensor) -> Tensor:
        flat = len(size) < x.ndim - 2
        count = x.shape[2] if flat else 1
        views = x.transpose(1, 2).flatten(0, 1) if flat else x
        masks = mask.repeat_interleave(count, dim=0)
        shape = views.shape[2:]
        padded = centred(views, [max(s, -(-f // multiple) * multiple) for s, f in zip(size, shape, strict=True)])
        scores = torch.cat([model(*part) for part in zip(padded.split(slices), masks.split(slices), strict=True)])
        starts = [(full - part) // 2 for full, part in zip(scores.shape[2:], shape, strict=True)]
        scores = scores[(..., *(slice(a, a + part) for a, part in zip(starts, shape, strict=True)))]
        return scores.unflatten(0, (-1, count)).transpose(1, 2) if flat else scores

    return predict


def centred(x: Tensor, size: Sequence[int]) -> Tensor:
    """Pad the last ``len(size)`` axes with zeros on both sides, up to ``size`` where they are smaller."""
    missing = [max(0, want - have) for want, have in zip(size, x.shape[-len(size) :], strict=True)]
    return F.pad(x, [amount for extra in reversed(missing) for amount in (extra // 2, extra - extra // 2)])

"""Drawing every combination of modalities equally often, however rare it is in the data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from passion_plugin._validate import describe, is_int
from passion_plugin.data._presence import PresenceTable
from passion_plugin.data._subsets import all_subsets, subset_mask
from passion_plugin.errors import raise_problems

__all__ = ["EvenSubsets"]


class EvenSubsets(Sampler[tuple[int, NDArray[np.bool_]]]):
    """Draw each subset of the modalities equally often, and for it a sample that contains it.

    On data with missing modalities some combinations are rare and a loader shows them rarely; here all the
    2^M - 1 subsets take turns in random order, each turn with a sample drawn uniformly from those that have at least
    these modalities. This is the idea of HGA, the follow-up of PASSION by the same authors. Pass it as the sampler of a
    loader over an :class:`~passion_plugin.missing.IncompleteDataset`, which shows of the sample only the subset. Row i
    of the table belongs to item i of the data.

    Args:
        table: who has what.
        seed: of the draws. Every pass over the sampler draws anew; :meth:`set_epoch` says which pass it is. Processes
            that train together need a seed each, or all of them draw the same samples: ``seed + rank``.
        length: draws in one pass; as many as there are samples when None.

    Attributes:
        subsets: the subsets that are drawn.
        left_out: the subsets that no sample contains.

    Raises:
        ConfigError: no table, a negative seed, a length below 1, or more than 16 modalities.

    Example:
        >>> table = PresenceTable.from_array([[1, 0, 1], [1, 1, 0]], ("flair", "t1ce", "t2"))
        >>> sampler = EvenSubsets(table, seed=0, length=5)
        >>> sampler.left_out
        (('t1ce', 't2'), ('flair', 't1ce', 't2'))
        >>> sorted(sum(mask.tolist()) for _, mask in sampler)
        [1, 1, 1, 2, 2]
    """

    def __init__(self, table: PresenceTable, seed: int = 0, *, length: int | None = None) -> None:
        problems = []
        if not isinstance(table, PresenceTable):
            problems.append(f"table must be a PresenceTable, got {describe(table)}")
        if not is_int(seed, least=0):
            problems.append(f"seed must be a whole number, 0 or more, got {seed!r}")
        if length is not None and not is_int(length, least=1):
            problems.append(f"length must be 1 or more, got {length!r}")
        raise_problems(problems, what="EvenSubsets")
        self.seed, self.length, self.epoch = seed, len(table) if length is None else length, 0
        masks = {subset: subset_mask(subset, table.modalities).numpy() for subset in all_subsets(table.modalities)}
        holders = {subset: np.flatnonzero(table.presence[:, mask].all(axis=1)) for subset, mask in masks.items()}
        self.subsets = tuple(subset for subset, rows in holders.items() if len(rows))
        self.left_out = tuple(subset for subset, rows in holders.items() if not len(rows))
        self._masks = [masks[subset] for subset in self.subsets]
        self._holders = [holders[subset] for subset in self.subsets]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """Yield ``(index, visible)``: number of a sample and a (M,) bool array, a subset of what the sample has."""
        generator = np.random.default_rng((self.seed, self.epoch))
        self.epoch += 1
        order: list[int] = []
        for _ in range(self.length):
            if not order:
                order = generator.permutation(len(self.subsets)).tolist()
            number = order.pop()
            # Not tensors: a loader with workers would share each by a file of its own.
            yield int(generator.choice(self._holders[number])), self._masks[number].copy()

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next pass, for a training that is resumed."""
        self.epoch = epoch

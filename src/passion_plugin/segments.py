"""Which rows of a batch are shown which modalities."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Segment"]


@dataclass(frozen=True)
class Segment:
    """Rows of the batch in which only some modalities are let through.

    Attributes:
        modalities: their names, at least one.
        rows: int64 (n,) on the CPU, sample numbers in the batch of the fused pass.
    """

    modalities: tuple[str, ...]
    rows: Tensor

    @classmethod
    def singles(cls, modalities: Sequence[str], where: Tensor) -> list[Segment]:
        """Let every modality through alone.

        Args:
            modalities: M names.
            where: bool (B, M) on the CPU, which rows of the batch show which modality alone.

        Returns:
            Segments in the order of the modalities; none for a modality without rows.
        """
        rows = [where[:, column].nonzero().flatten() for column in range(len(modalities))]
        return [cls((name,), index) for name, index in zip(modalities, rows, strict=True) if len(index)]

    @classmethod
    def subsets(cls, modalities: Sequence[str], where: Tensor) -> list[Segment]:
        """Let the modalities of each row through together.

        Args:
            modalities: M names.
            where: bool (B, M) on the CPU, what each row of the batch shows; nothing for a row that is left out.

        Returns:
            A segment for each subset that some row shows.

        Example:
            >>> import torch
            >>> where = torch.tensor([[True, True, False], [False, False, False], [True, True, False]])
            >>> Segment.subsets(("flair", "t1", "t2"), where)
            [Segment(modalities=('flair', 't1'), rows=tensor([0, 2]))]
        """
        found = where[where.any(1)].unique(dim=0)
        names = [tuple(itertools.compress(modalities, subset.tolist())) for subset in found]
        rows = [(where == subset).all(1).nonzero().flatten() for subset in found]
        return [cls(*each) for each in zip(names, rows, strict=True)]

"""The data of the trainer examples: the phantom patients of `three_lines`, with the same modalities missing."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from passion_plugin.data import IncompleteDataset, PresenceTable, draw_presence
from passion_plugin.phantom import PhantomDataset

__all__ = ["incomplete_phantom"]


def incomplete_phantom(patients: int, size: int) -> tuple[DataLoader[Any], PresenceTable]:
    """A loader of batches of two patients, and who has what.

    Batches hold ``"image"`` (2, 4, size, size, size), ``"mask"`` (2, 4) bool and ``"label"`` (2, size, size, size).
    """
    phantom = PhantomDataset(patients, (size,) * 3)
    presence = draw_presence(phantom.ids, {"flair": 0.2, "t1ce": 0.4, "t1": 0.6, "t2": 0.8}, seed=0)
    return DataLoader(IncompleteDataset(phantom, presence), batch_size=2), presence

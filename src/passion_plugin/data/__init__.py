"""Missing modalities: which sample has what, subsets of modalities, and data sets that hide what is missing.

* ``_presence.py``: :class:`PresenceTable` (in memory and as CSV) and :func:`draw_presence`.
* ``_splits.py``: the split files that were published with the paper.
* ``_subsets.py``: names and masks of subsets, :func:`drop_modalities` for training.
* ``_dataset.py``: :class:`IncompleteDataset`, :func:`blank_missing` and the sampler :class:`EvenSubsets`.
* ``_csv.py``: reading of CSV files.
"""

from __future__ import annotations

from passion_plugin.data._csv import read_rows
from passion_plugin.data._dataset import EvenSubsets, IncompleteDataset, blank_missing
from passion_plugin.data._presence import PresenceTable, draw_presence
from passion_plugin.data._splits import read_split_csv, write_split_csv
from passion_plugin.data._subsets import all_subsets, drop_modalities, parse_subset, subset_mask, subset_name

__all__ = [
    "EvenSubsets",
    "IncompleteDataset",
    "PresenceTable",
    "all_subsets",
    "blank_missing",
    "draw_presence",
    "drop_modalities",
    "parse_subset",
    "read_rows",
    "read_split_csv",
    "subset_mask",
    "subset_name",
    "write_split_csv",
]

"""Missing modalities: which sample has what, subsets of modalities, and data sets that really lack them.

* :class:`PresenceTable`, :func:`draw_presence`: who has what; nominal and real missing rates.
* :func:`read_split_csv`, :func:`write_split_csv`: the split files that were published with the paper.
* :func:`all_subsets`, :func:`subset_name`, :func:`parse_subset`, :func:`subset_mask`: subsets by name.
* :func:`drop_modalities`, :func:`blank_missing`, :class:`IncompleteDataset`: what the network gets to see.
* :class:`EvenSubsets`: a sampler that draws every combination of modalities equally often.
"""

from __future__ import annotations

from passion_plugin.data._dataset import IncompleteDataset, blank_missing
from passion_plugin.data._draw import draw_presence
from passion_plugin.data._presence import PresenceTable
from passion_plugin.data._reading import read_rows, read_text, shorten, shortlist
from passion_plugin.data._sampler import EvenSubsets
from passion_plugin.data._splits import read_split_csv, write_split_csv
from passion_plugin.data._subsets import (
    all_subsets,
    drop_modalities,
    modality_problems,
    parse_subset,
    subset_mask,
    subset_name,
)

__all__ = [
    "EvenSubsets",
    "IncompleteDataset",
    "PresenceTable",
    "all_subsets",
    "blank_missing",
    "draw_presence",
    "drop_modalities",
    "modality_problems",
    "parse_subset",
    "read_rows",
    "read_split_csv",
    "read_text",
    "shorten",
    "shortlist",
    "subset_mask",
    "subset_name",
    "write_split_csv",
]

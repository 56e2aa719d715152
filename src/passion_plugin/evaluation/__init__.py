"""Evaluation of a segmentation model on every subset of its modalities.

:func:`evaluate_subsets` runs the model once per subset and batch and returns a :class:`SubsetResults`:
tidy rows with Dice (and HD95 on request) per subset, sample and target, which print as tables, survive a
CSV file, can be compared pair by pair and plotted.
"""

from __future__ import annotations

from passion_plugin.evaluation._evaluate import evaluate_subsets
from passion_plugin.evaluation._inference import sliding_window_predict
from passion_plugin.evaluation._metrics import BRATS_REGIONS, dice_scores, hd95_scores, region_masks
from passion_plugin.evaluation._results import SubsetResults
from passion_plugin.evaluation._rows import DIFFERENCE, Convention, Row, Summary
from passion_plugin.evaluation._tables import caption, in_shown_unit, table_lines, title

__all__ = [
    "BRATS_REGIONS",
    "DIFFERENCE",
    "Convention",
    "Row",
    "SubsetResults",
    "Summary",
    "caption",
    "dice_scores",
    "evaluate_subsets",
    "hd95_scores",
    "in_shown_unit",
    "region_masks",
    "sliding_window_predict",
    "table_lines",
    "title",
]

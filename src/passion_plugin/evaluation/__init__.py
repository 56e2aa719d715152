"""Evaluation of a segmentation model on every subset of its modalities.

* ``_evaluate.py``: :func:`evaluate_subsets` runs the model once per subset and batch.
* ``_metrics.py``: scores and labels to masks; Dice and HD95.
* ``_results.py``: :class:`SubsetResults`, a row per subset, sample, target and metric: means, comparisons, tables, CSV.
"""

from __future__ import annotations

from passion_plugin.evaluation._evaluate import Predict, evaluate_subsets, sliding_window_predict
from passion_plugin.evaluation._metrics import BRATS_PENALTY, BRATS_REGIONS, dice_scores, hd95_scores, region_masks
from passion_plugin.evaluation._results import (
    DIFFERENCE,
    Convention,
    Row,
    SubsetResults,
    Summary,
    caption,
    in_shown_unit,
    table_lines,
    title,
)

__all__ = [
    "BRATS_PENALTY",
    "BRATS_REGIONS",
    "DIFFERENCE",
    "Convention",
    "Predict",
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

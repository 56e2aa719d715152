"""Evaluation of a segmentation model on every subset of its modalities.

:func:`evaluate_subsets` runs the model once per subset and batch and returns a :class:`SubsetResults`:
tidy rows with Dice (and HD95 on request) per subset, sample and target, which print as tables, survive a
CSV file, can be compared pair by pair and plotted.
"""

from __future__ import annotations

from passion_plugin.evaluation.inference import sliding_window_predict
from passion_plugin.evaluation.loop import evaluate_subsets
from passion_plugin.evaluation.metrics import BRATS_REGIONS, dice_scores, hd95_scores, region_masks
from passion_plugin.evaluation.results import SubsetResults
from passion_plugin.evaluation.rows import Convention, Row, Summary

__all__ = [
    "BRATS_REGIONS",
    "Convention",
    "Row",
    "SubsetResults",
    "Summary",
    "dice_scores",
    "evaluate_subsets",
    "hd95_scores",
    "region_masks",
    "sliding_window_predict",
]

"""A zoo of small awkward multi-encoder segmentation networks, each bent at the one place its name says."""

from __future__ import annotations

from . import containers, encoders, fusion, heads, inputs, masks, training
from .entry import ZOO, ZooEntry, blank

__all__ = [
    "ZOO",
    "ZooEntry",
    "blank",
    "containers",
    "encoders",
    "fusion",
    "heads",
    "inputs",
    "masks",
    "training",
]

"""Everything public that takes settings, with arguments that are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import nn

from passion_plugin import attach
from passion_plugin.backbone import BackboneSpec
from passion_plugin.baselines import AGM, OGMGE, PMR, RedCore, SlowWeights, named_strategy, passion_variant
from passion_plugin.config import PassionConfig
from passion_plugin.data import (
    EvenSubsets,
    IncompleteDataset,
    PresenceTable,
    all_subsets,
    blank_missing,
    draw_presence,
    drop_modalities,
    parse_subset,
    subset_mask,
)
from passion_plugin.training import PassionEngine, PreferenceEstimator
from passion_plugin.wrapper import PassionWrapper

from .nets import Plan, build, right_spec

__all__ = ["ENTRANCES", "PLAN"]

PLAN = Plan(modalities=("flair", "t1ce", "t1"))
PRESENCE = np.array([[True, True, True], [True, False, True]])
MASK = torch.from_numpy(PRESENCE)
TABLE = PresenceTable(("p", "q"), PLAN.modalities, PRESENCE)


def wrapper(**options: Any) -> nn.Module:
    chosen = {"backbone": build(PLAN), "modalities": PLAN.modalities, "spec": right_spec(PLAN, "replay"), **options}
    return PassionWrapper(**({} if "presence" in options else {"missing_rates": (0.1, 0.2, 0.3)}) | chosen)


def attached(**options: Any) -> PassionEngine:
    chosen = {"modalities": PLAN.modalities, "missing_rates": (0.1, 0.2, 0.3), "spec": right_spec(PLAN, "replay")}
    return attach(build(PLAN), **{**chosen, **options})


def spec(**options: Any) -> BackboneSpec:
    right = right_spec(PLAN, "replay")
    return right.replaced(**options)


def slow_weights(**options: Any) -> SlowWeights:
    return SlowWeights(nn.Linear(1, 1), **options)


ENTRANCES: dict[str, tuple[Callable[..., Any], tuple[str, ...], dict[str, Any]]] = {
    "PassionConfig": (PassionConfig, tuple(field.name for field in fields(PassionConfig)), {}),
    "BackboneSpec": (spec, tuple(field.name for field in fields(BackboneSpec)), {}),
    "PassionWrapper": (
        wrapper,
        ("backbone", "modalities", "missing_rates", "presence", "spec", "config", "strategy", "example_input"),
        {},
    ),
    "PassionEngine.attach": (attached, ("modalities", "missing_rates", "spec", "config", "strategy"), {}),
    "PreferenceEstimator": (
        PreferenceEstimator,
        ("modalities", "presence_counts", "mode", "eta", "eta_growth", "eta_every", "beta_min", "beta_max"),
        {"modalities": PLAN.modalities},
    ),
    "OGMGE": (OGMGE, ("alpha",), {}),
    "AGM": (AGM, ("alpha",), {}),
    "PMR": (PMR, ("alpha", "momentum", "entropy_weight", "entropy_epochs"), {}),
    "RedCore": (RedCore, ("weight", "eta", "eta_growth", "eta_every", "beta_min", "beta_max"), {}),
    "SlowWeights": (slow_weights, ("rate", "every"), {}),
    "named_strategy": (named_strategy, ("name",), {"name": "agm"}),
    "passion_variant": (passion_variant, ("name",), {"name": "passion"}),
    "PresenceTable": (
        PresenceTable,
        ("sample_ids", "modalities", "presence", "nominal_rates", "seed"),
        {"sample_ids": ("p", "q"), "modalities": PLAN.modalities, "presence": PRESENCE},
    ),
    "PresenceTable.from_array": (
        PresenceTable.from_array,
        ("presence", "modalities", "sample_ids"),
        {"presence": PRESENCE, "modalities": PLAN.modalities},
    ),
    "PresenceTable.select": (TABLE.select, ("sample_ids",), {"sample_ids": ["p", "q"]}),
    "PresenceTable.index": (TABLE.index, ("sample_id",), {"sample_id": "p"}),
    "draw_presence": (
        draw_presence,
        ("samples", "rates", "seed", "modalities"),
        {"samples": 3, "rates": {"a": 0.1, "b": 0.2}, "seed": 0},
    ),
    "IncompleteDataset": (
        IncompleteDataset,
        ("dataset", "table", "fill"),
        {"dataset": [torch.zeros(3, 2), torch.zeros(3, 2)], "table": TABLE},
    ),
    "EvenSubsets": (EvenSubsets, ("table", "seed", "length"), {"table": TABLE}),
    "blank_missing": (
        blank_missing,
        ("images", "presence", "fill"),
        {"images": torch.zeros(2, 3, 4), "presence": MASK},
    ),
    "drop_modalities": (drop_modalities, ("presence", "generator", "uniform_over"), {"presence": MASK}),
    "all_subsets": (all_subsets, ("modalities",), {"modalities": PLAN.modalities}),
    "parse_subset": (parse_subset, ("subset", "modalities"), {"subset": "t1", "modalities": PLAN.modalities}),
    "subset_mask": (subset_mask, ("subset", "modalities"), {"subset": "t1", "modalities": PLAN.modalities}),
}
"""By name: the function, which of its arguments may get nonsense, and right ones for those it needs."""

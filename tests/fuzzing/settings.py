"""Configurations and strategies that are right by themselves."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from passion_plugin.baselines import strategy_names
from passion_plugin.config import PassionConfig

from .nets import Plan

__all__ = ["how_to_balance", "plain_balance"]

NEEDS_ENCODERS = {"ogm-ge", "agm", "pmr"}
NEEDS_SOFTMAX = {"pmr", "passion-official"}


@st.composite
def how_to_balance(draw: st.DrawFn, plan: Plan) -> dict[str, Any]:
    """Draw ``config=`` and ``strategy=`` of a wrapper, most of them possible for the network.

    Args:
        draw: given by hypothesis.
        plan: of the network.
    """
    flag, pick = st.booleans(), st.sampled_from
    rarely = pick([*[False] * 7, True])
    softmax = plan.outputs == "softmax" or draw(rarely)
    private = not plan.shared or draw(rarely)
    lacking = (set() if softmax else NEEDS_SOFTMAX) | (set() if private else NEEDS_ENCODERS)
    strategy = draw(pick([None, None, *(name for name in strategy_names() if name not in lacking)]))
    chosen: dict[str, Any] = {
        "memory": draw(pick(["default", "low"])),
        "skip_missing_encoders": draw(rarely) or draw(pick(["auto", False])),
        "share_random_state": draw(flag),
    }
    if strategy is None:
        weights = pick([0.5, 0.0, 1.0, 100.0])
        chosen |= {
            "mode": draw(pick(["default", "official"] if softmax else ["default"])),
            "temperature": draw(st.floats(0.05, 100)),
            "pixel_weight": draw(weights),
            "prototype_weight": draw(weights),
            "unimodal_weight": draw(weights),
            "rarity_weights": draw(flag),
            "eta": draw(pick([0.01, 0.0, 10.0])),
            "beta_min": draw(pick([0.1, 1.0, 1e-3])),
            "beta_max": draw(pick([4.0, 1.0])),
            "gate": draw(flag),
            "warmup_epochs": draw(pick([0, 1])),
            "modulation": draw(pick(["distillation", "none", "encoder"] if private else ["distillation", "none"])),
        }
        chosen["subset_students"] = chosen["mode"] == "default" and len(plan.modalities) > 2 and draw(rarely)
    return {"strategy": strategy, "config": PassionConfig(**chosen)}


@st.composite
def plain_balance(draw: st.DrawFn) -> dict[str, Any]:
    """Draw ``config=`` and ``strategy=`` that any network can be trained with."""
    config = PassionConfig(memory=draw(st.sampled_from(["default", "low"])), share_random_state=draw(st.booleans()))
    return {"strategy": draw(st.sampled_from([None, "plain", "passion-both"])), "config": config}

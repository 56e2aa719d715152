"""Configurations and strategies that are right by themselves."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from passion_plugin import PassionConfig
from passion_plugin.strategies import strategy_names

__all__ = ["configs", "how_to_balance"]


@st.composite
def configs(draw: st.DrawFn, *, shared_only: bool = False) -> PassionConfig:
    """Draw a configuration; what is drawn is not always possible for every network.

    Args:
        draw: given by hypothesis.
        shared_only: only what every strategy uses.
    """
    flag, pick = st.booleans(), st.sampled_from
    chosen: dict[str, Any] = {
        "memory": draw(pick(["default", "low"])),
        "stack_students": draw(pick([*[False] * 7, True])),
        "skip_missing_encoders": draw(pick(["auto", "auto", "auto", False, False, True])),
        "share_random_state": draw(flag),
    }
    if not shared_only:
        weights = st.sampled_from([0.5, 0.0, 1.0, 100.0])
        chosen |= {
            "mode": draw(pick(["default", "default", "official"])),
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
            "modulation": draw(pick(["distillation", "encoder", "none"])),
        }
    return PassionConfig(**chosen)


@st.composite
def how_to_balance(draw: st.DrawFn, *, plain: bool = False) -> dict[str, Any]:
    """Draw ``config=`` and ``strategy=`` of a wrapper.

    Args:
        draw: given by hypothesis.
        plain: only what any network can do.
    """
    if plain:
        config = PassionConfig(memory=draw(st.sampled_from(["default", "low"])), share_random_state=draw(st.booleans()))
        return {"strategy": draw(st.sampled_from([None, "plain", "passion-both"])), "config": config}
    strategy = draw(st.sampled_from([None, None, *strategy_names()]))
    return {"strategy": strategy, "config": draw(configs(shared_only=strategy is not None))}

"""Strategies by name, and the variants of PASSION with each part switched off."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from passion_plugin.config import HOW_PASSES_RUN, PassionConfig
from passion_plugin.errors import ConfigError, raise_problems, suggest
from passion_plugin.plain_values import is_one_of
from passion_plugin.strategies.agm import AGM
from passion_plugin.strategies.base import Plain, Strategy
from passion_plugin.strategies.ogm import OGMGE
from passion_plugin.strategies.passion import PassionRule
from passion_plugin.strategies.pmr import PMR
from passion_plugin.strategies.redcore import RedCore

__all__ = ["named_strategy", "passion_variant", "resolve", "strategy_names"]

_RULES: dict[str, type[Strategy]] = {rule.name: rule for rule in (Plain, OGMGE, AGM, PMR, RedCore)}

_NO_WEIGHTS: dict[str, Any] = {"modulation": "none"}
_NO_PREFERENCE: dict[str, Any] = {"gate": False, **_NO_WEIGHTS}
_VARIANTS: dict[str, dict[str, Any]] = {
    "passion": {},
    "passion-official": {"mode": "official"},
    "passion-students": {"pixel_weight": 0.0, "prototype_weight": 0.0, **_NO_PREFERENCE},
    "passion-pixel": {"prototype_weight": 0.0, **_NO_PREFERENCE},
    "passion-prototype": {"pixel_weight": 0.0, **_NO_PREFERENCE},
    "passion-both": _NO_PREFERENCE,
    "passion-gate": _NO_WEIGHTS,
}
_DATA_SIDE = {
    "drop": "passion_plugin.missing.drop_modalities(mask) in the training loop",
    "even": "passion_plugin.missing.EvenSubsets as the sampler of the loader",
}


def strategy_names() -> tuple[str, ...]:
    """Return every name that ``strategy=`` takes."""
    return (*_RULES, *_VARIANTS)


def named_strategy(name: str) -> Strategy | PassionConfig:
    """Return what a name stands for: a new rule with its defaults, or the configuration of a variant of PASSION.

    Raises:
        ConfigError: unknown name, with close matches.

    Example:
        >>> named_strategy("ogm-ge").alpha
        0.3
        >>> named_strategy("passion-pixel").prototype_weight
        0.0
    """
    if is_one_of(name, tuple(_DATA_SIDE)):
        raise ConfigError(
            f"strategy {name!r} is about the data and goes with any other: use {_DATA_SIDE[name]}, and "
            f"strategy='plain' for nothing else"
        )
    if not is_one_of(name, strategy_names()):
        raise ConfigError(f"unknown strategy {name!r}.{suggest(str(name), strategy_names())}")
    return _RULES[name]() if name in _RULES else passion_variant(name)


def passion_variant(name: str, config: PassionConfig | None = None) -> PassionConfig:
    """Return the configuration of PASSION with some parts switched off.

    Args:
        name: ``"passion"``, ``"passion-official"``, ``"passion-students"`` (no distillation: what the others are
            compared with), ``"passion-pixel"`` (pixel distillation only), ``"passion-prototype"`` (prototype
            distillation only, without its gate), ``"passion-both"`` (both, no gate, no beta), ``"passion-gate"``
            (both and the gate; beta added it is ``"passion"``). The uni-modal segmentation loss, part of the
            paper's task loss, stays in all of them.
        config: everything else.

    Raises:
        ConfigError: unknown name, or ``config`` sets what the variant decides.
    """
    if not is_one_of(name, tuple(_VARIANTS)):
        raise ConfigError(f"unknown variant {name!r}.{suggest(str(name), _VARIANTS)}")
    config, decided = config or PassionConfig(), _VARIANTS[name]
    problems = [
        f"config sets {key}={getattr(config, key)!r}, strategy {name!r} sets {key}={value!r}: leave one of them out"
        for key, value in decided.items()
        if getattr(config, key) not in (value, getattr(PassionConfig(), key))
    ]
    raise_problems(problems, what=f"strategy {name!r}")
    return replace(config, **decided)


def resolve(strategy: Any, config: Any) -> tuple[Strategy, Any]:
    """Return the rule and the configuration that ``strategy=`` and ``config=`` stand for together.

    Args:
        strategy: None for PASSION as configured, a name, or an object.
        config: a :class:`PassionConfig` or None; anything else is passed on for the caller to refuse.

    Returns:
        The rule and the configuration.

    Raises:
        ConfigError: unknown strategy, or a configuration that it would ignore.
    """
    given = config if config is not None else PassionConfig()
    if strategy is None or not isinstance(given, PassionConfig):
        return PassionRule(), given
    if isinstance(strategy, str):
        if strategy in _VARIANTS:
            return PassionRule(), passion_variant(strategy, given)
        strategy = named_strategy(strategy)
    if not isinstance(strategy, Strategy):
        hint = "; pass an object, not its class" if isinstance(strategy, type) else ""
        raise ConfigError(f"strategy must be a name or a Strategy, got {strategy!r}{hint}")
    if isinstance(strategy, PassionRule):
        return strategy, given
    ignored = [
        f"{field.name}={getattr(given, field.name)!r} is about PASSION, which does not run here: leave it out"
        for field in fields(given)
        if field.name not in HOW_PASSES_RUN and getattr(given, field.name) != field.default
    ]
    raise_problems(ignored, what=f"config= beside strategy {strategy.name!r}")
    return strategy, given

"""Strategies by name, for scripts; among them PASSION with parts switched off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from passion_plugin._validate import is_one_of
from passion_plugin.baselines._extra_losses import PMR, RedCore
from passion_plugin.baselines._gradient_modulation import AGM, OGMGE
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError, raise_problems, suggest
from passion_plugin.training import PassionRule, Plain, Strategy

_RULES: dict[str, type[Strategy]] = {rule.name: rule for rule in (Plain, OGMGE, AGM, PMR, RedCore)}

_NO_BETA: dict[str, Any] = {"modulation": "none"}
_NO_PREFERENCE: dict[str, Any] = {"gate": False, **_NO_BETA}

# The uni-modal segmentation loss, part of the paper's task loss, stays in all of them.
_VARIANTS: dict[str, dict[str, Any]] = {
    "passion": {},
    "passion-official": {"mode": "official"},
    "passion-students": {"pixel_weight": 0.0, "prototype_weight": 0.0, **_NO_PREFERENCE},
    "passion-pixel": {"prototype_weight": 0.0, **_NO_PREFERENCE},
    "passion-prototype": {"pixel_weight": 0.0, **_NO_PREFERENCE},
    "passion-both": _NO_PREFERENCE,
    "passion-gate": _NO_BETA,
}


def strategy_names() -> tuple[str, ...]:
    """Return every name that :func:`named_strategy` knows."""
    return (*_RULES, *_VARIANTS)


def named_strategy(name: str, config: PassionConfig | None = None) -> tuple[Strategy, PassionConfig]:
    """Return what a name stands for, to be passed as ``strategy=`` and ``config=``.

    Args:
        name: one of :func:`strategy_names`.
        config: everything that the name does not decide.

    Returns:
        A new strategy with its defaults, and the configuration; for a variant of PASSION with some parts switched off.

    Raises:
        ConfigError: unknown name, with close matches, or ``config`` sets what the variant decides.

    Example:
        >>> named_strategy("ogm-ge")[0].alpha
        0.3
        >>> named_strategy("passion-pixel")[1].prototype_weight
        0.0
    """
    if not is_one_of(name, strategy_names()):
        raise ConfigError(f"unknown strategy {name!r}.{suggest(str(name), strategy_names())}")
    config = config or PassionConfig()
    if name in _RULES:
        return _RULES[name](), config
    decided, default = _VARIANTS[name], PassionConfig()
    problems = [
        f"config sets {key}={getattr(config, key)!r}, strategy {name!r} sets {key}={value!r}: leave one of them out"
        for key, value in decided.items()
        if getattr(config, key) not in (value, getattr(default, key))
    ]
    raise_problems(problems, what=f"strategy {name!r}")
    return PassionRule(), replace(config, **decided)

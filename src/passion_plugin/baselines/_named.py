"""Strategies by name, and the variants of PASSION with each part switched off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from passion_plugin._validate import is_one_of
from passion_plugin.baselines._agm import AGM
from passion_plugin.baselines._ogm import OGMGE
from passion_plugin.baselines._pmr import PMR
from passion_plugin.baselines._redcore import RedCore
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError, raise_problems, suggest
from passion_plugin.training import PassionRule, Plain, Strategy

__all__ = ["named_strategy", "passion_variant", "strategy_names"]

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
    "drop": "passion_plugin.data.drop_modalities(mask) in the training loop",
    "even": "passion_plugin.data.EvenSubsets as the sampler of the loader",
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
    if is_one_of(name, tuple(_DATA_SIDE)):
        raise ConfigError(
            f"strategy {name!r} is about the data and goes with any other: use {_DATA_SIDE[name]}, and "
            f"strategy=Plain() for nothing else"
        )
    if not is_one_of(name, strategy_names()):
        raise ConfigError(f"unknown strategy {name!r}.{suggest(str(name), strategy_names())}")
    if name in _VARIANTS:
        return PassionRule(), passion_variant(name, config)
    return _RULES[name](), config or PassionConfig()


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

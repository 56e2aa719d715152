"""Strategies by name: how the data is drawn, which rule trains, with which hyper-parameters.

    rule[@drawing][:name=value,...]       passion   passion@even   plain@drop   passion:temperature=2,eta=0.02

Drawings: ``all`` shows what a patient has, ``drop`` a random part of it, ``even`` every combination of modalities
equally often. ``drop`` and ``even`` alone stand for ``plain@drop`` and ``plain@even``.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from passion_plugin import BackboneSpec, PassionConfig, PassionWrapper, PresenceTable
from passion_plugin.errors import ConfigError, raise_problems, suggest

__all__ = ["Recipe", "parse_recipe"]

DRAWINGS = ("all", "drop", "even")

RULES: Mapping[str, Mapping[str, Any] | None] = {
    "plain": None,
    "passion": {},
    "passion-official": {"mode": "official"},
    "passion-pixel": {"prototype_weight": 0.0, "modulation": "none"},
    "passion-gate": {"modulation": "none"},
}
"""Fields of PassionConfig that differ from the default; None: without PASSION."""

ALIASES = {"drop": "plain@drop", "even": "plain@even"}


@dataclass(frozen=True)
class Recipe:
    """What a name stands for.

    Attributes:
        name: as it was written.
        drawing: how patients and modalities are drawn.
        config: hyper-parameters; None trains plainly.
    """

    name: str
    drawing: str
    config: PassionConfig | None

    def wrap(self, presence: PresenceTable, spec: BackboneSpec | None) -> Callable[[nn.Module], PassionWrapper] | None:
        """How to wrap the backbone, for :func:`examples.training.train`; None trains it as it is."""
        if self.config is None:
            return None
        return lambda backbone: PassionWrapper(
            backbone, modalities=presence.modalities, presence=presence, spec=spec, config=self.config
        )


def parse_recipe(name: str) -> Recipe:
    """Read the name of a strategy.

    Raises:
        ConfigError: an unknown rule, drawing or hyper-parameter, with close matches, or a value out of range.
    """
    short, _, overrides = name.partition(":")
    rule, _, drawing = ALIASES.get(short, short).partition("@")
    drawing = drawing or "all"
    problems = []
    if rule not in RULES:
        problems.append(f"unknown rule {rule!r}.{suggest(rule, [*RULES, *ALIASES])}")
    if drawing not in DRAWINGS:
        problems.append(f"unknown drawing {drawing!r}.{suggest(drawing, DRAWINGS)}")
    changed: dict[str, Any] = {}
    known = [field.name for field in fields(PassionConfig)]
    for part in filter(None, overrides.split(",")):
        field, equals, value = part.partition("=")
        if not equals or field not in known:
            problems.append(f"{part!r} is no hyper-parameter=value.{suggest(field, known)}")
        changed[field] = _value(value)
    base = RULES.get(rule)
    if not problems and base is None and changed:
        problems.append(f"{rule!r} has no hyper-parameters")
    raise_problems(problems, what=f"strategy {name!r}")
    try:
        config = None if base is None else PassionConfig(**{**base, **changed})
    except ConfigError as error:
        raise ConfigError(f"strategy {name!r}: {error}") from error
    return Recipe(name, drawing, config)


def _value(text: str) -> Any:
    """A number or a bool where it is one, else the text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text

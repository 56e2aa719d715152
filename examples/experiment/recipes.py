"""Strategies by name: which rule trains, how the data is drawn, with which hyper-parameters.

    rule[@drawing[+slow]][:name=value,...]   passion   passion@even+slow   plain@drop   passion:temperature=2,eta=0.02

Rules are those of :mod:`passion_plugin.baselines`. Drawings: ``all`` shows what a patient has, ``drop`` a random
part of it, ``even`` every combination of modalities equally often. ``drop`` and ``even`` alone stand for
``plain@drop`` and ``plain@even``. ``+slow`` averages the weights over bursts of as many steps as there are
combinations (:class:`~passion_plugin.baselines.SlowWeights`). ``own_loss=True`` trains the students of PASSION
with the loss of the whole network, in place of weighted cross-entropy and Dice; ``pixel=balanced`` and the like are
the ideas of :mod:`examples.experiment.ideas`.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.experiment.ideas import IDEAS, PassionVariation
from examples.experiment.views import DRAWINGS
from passion_plugin.backbone import BackboneSpec
from passion_plugin.baselines import named_strategy, strategy_names
from passion_plugin.config import PassionConfig
from passion_plugin.data import PresenceTable
from passion_plugin.errors import ConfigError, raise_problems, suggest
from passion_plugin.training import PassionRule, UnimodalLoss
from passion_plugin.wrapper import PassionWrapper

__all__ = ["ALIASES", "Recipe", "parse_recipe"]

ALIASES = {"drop": "plain@drop", "even": "plain@even"}
_OWN_LOSS = "own_loss"


@dataclass(frozen=True)
class Recipe:
    """What a name stands for.

    Attributes:
        rule: name of the balancing rule; ``"plain"`` trains the backbone without a wrapper.
        drawing: how patients and modalities are drawn, a key of :data:`examples.experiment.views.DRAWINGS`.
        slow: whether weights are averaged over bursts of steps.
        parameters: hyper-parameters of the rule, all of them.
        overrides: those that were given.
    """

    rule: str
    drawing: str
    slow: bool
    parameters: dict[str, Any]
    overrides: dict[str, Any]

    def wrap(
        self, presence: PresenceTable, spec: BackboneSpec | None, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> Callable[[nn.Module], PassionWrapper] | None:
        """How to wrap the backbone, for :func:`examples.training.train`; None trains it as it is.

        Args:
            presence: of the training patients.
            spec: of the backbone; None: detected.
            loss: of the whole network, logits and labels to a scalar.
        """
        if self.rule == "plain":
            return None
        how = _make(self.rule, self.overrides, loss)
        return lambda backbone: PassionWrapper(
            backbone, modalities=presence.modalities, presence=presence, spec=spec, **how
        )


def parse_recipe(name: str) -> Recipe:
    """Read the name of a strategy.

    Raises:
        ConfigError: an unknown rule, drawing or hyper-parameter, with close matches, or a value out of range.
    """
    short, _, text = name.partition(":")
    short, _, averaging = short.partition("+")
    rule, _, drawing = ALIASES.get(short, short).partition("@")
    drawing, known = drawing or "all", [*strategy_names(), *ALIASES]
    problems = []
    if drawing not in DRAWINGS:
        problems.append(f"unknown drawing {drawing!r}.{suggest(drawing, DRAWINGS)}")
    if averaging not in ("", "slow"):
        problems.append(f"{averaging!r} after the + is not 'slow'")
    overrides: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    if rule not in strategy_names():
        problems.append(f"unknown rule {rule!r}.{suggest(rule, strategy_names() if '@' in short else known)}")
    else:
        parameters = _defaults(rule)
        for part in filter(None, text.split(",")):
            field, equals, value = part.partition("=")
            if not equals or field not in parameters:
                problems.append(f"{part!r} is no hyper-parameter=value of {rule}.{suggest(field, parameters)}")
            overrides[field] = _value(value)
    raise_problems(problems, what=f"strategy {name!r}")
    try:
        # Any loss will do: what is made here is only looked at.
        made = _make(rule, overrides, cross_entropy)
    except ConfigError as error:
        raise ConfigError(f"strategy {name!r}: {error}") from error
    parameters = {**parameters, **overrides}
    if "config" in made:
        extra = {key: value for key, value in overrides.items() if key in IDEAS}
        parameters = {**made["config"].as_dict(), _OWN_LOSS: parameters[_OWN_LOSS], **extra}
    return Recipe(rule, drawing, averaging == "slow", parameters, overrides)


def _defaults(rule: str) -> dict[str, Any]:
    """Hyper-parameters that a rule takes, with their defaults."""
    strategy, config = named_strategy(rule)
    if isinstance(strategy, PassionRule):
        return {**config.as_dict(), _OWN_LOSS: False, **IDEAS}
    # object.__init__ takes *args and **kwargs: a rule without hyper-parameters.
    found = inspect.signature(type(strategy)).parameters.values()
    return {each.name: each.default for each in found if each.default is not each.empty}


def _make(rule: str, overrides: dict[str, Any], loss: UnimodalLoss) -> dict[str, Any]:
    """What a wrapper is given: a rule with some hyper-parameters changed, and for PASSION its configuration too."""
    strategy, _ = named_strategy(rule)
    if not isinstance(strategy, PassionRule):
        return {"strategy": type(strategy)(**overrides)}
    own = overrides.get(_OWN_LOSS, False)
    if not isinstance(own, bool):
        raise ConfigError(f"{_OWN_LOSS} is True or False, got {own!r}")
    ideas = {key: value for key, value in overrides.items() if key in IDEAS}
    configured = {key: value for key, value in overrides.items() if key not in (_OWN_LOSS, *IDEAS)}
    _, config = named_strategy(rule, PassionConfig(**configured))
    if own and config.mode == "official":
        raise ConfigError(f"{_OWN_LOSS}=True goes with the default mode, not the official")
    students = loss if own else None
    if not ideas:
        return {"config": config, "strategy": PassionRule(students)}
    variation = PassionVariation(students, **ideas)
    variation.check_config(config)
    return {"config": config, "strategy": variation}


def _value(text: str) -> Any:
    """A number or a bool where it is one, else the text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text

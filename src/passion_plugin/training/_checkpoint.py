"""What a checkpoint holds of the engine besides its heads: modalities, settings and the state of the strategy."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from passion_plugin._validate import describe
from passion_plugin.errors import ConfigError, raise_problems, warn_user
from passion_plugin.training._strategy import Strategy

_VERSION = 1
_ENTRIES = ("modalities", "strategy", "settings", "strategy_state")


def extra_state(modalities: Sequence[str], strategy: Strategy) -> dict[str, Any]:
    """Return what ``state_dict()`` of the engine holds besides its modules.

    The state of the strategy is in it as the bytes of ``torch.save``: a distributed checkpoint takes dictionaries apart
    and restores only what the model it is loaded into has already, but a strategy may fill a dictionary in its first
    step.
    """
    buffer = io.BytesIO()
    torch.save(strategy.state_dict(), buffer)
    return {
        "version": _VERSION,
        "modalities": list(modalities),
        "strategy": strategy.name,
        "settings": strategy.settings(),
        "strategy_state": buffer.getvalue(),
    }


def load_extra_state(state: Any, modalities: Sequence[str], strategy: Strategy) -> None:
    """Restore what :func:`extra_state` returned, all of it or nothing.

    Names of modalities decide. Settings that differ are a warning: a checkpoint is also loaded to predict, or to go on
    with other weights. Settings that one side does not know are left alone. What another strategy has learned is left
    out with a warning.
    """
    raise_problems(_problems(state, modalities), what="add-on state")
    if state["strategy"] != strategy.name:
        warn_user(
            f"the add-on state was saved with strategy {state['strategy']!r}, this model has {strategy.name!r}: "
            f"what that strategy had learned is left out. To go on with it, make the model with that strategy"
        )
        return
    try:
        inner = torch.load(io.BytesIO(state["strategy_state"]), map_location="cpu", weights_only=True)
    except Exception as error:  # Broken bytes may fail anywhere.
        raise ConfigError(f"add-on state: strategy_state cannot be read ({type(error).__name__}: {error})") from error
    strategy.load_state_dict(inner)
    ours, theirs = strategy.settings(), state["settings"]
    differing = [
        f"{name} was {theirs[name]!r} and is {value!r}"
        for name, value in ours.items()
        if name in theirs and theirs[name] != value
    ]
    if differing:
        warn_user(
            f"the add-on state was saved with other settings: {'; '.join(differing)}. The model goes on with its own"
        )


def _problems(state: Any, modalities: Sequence[str]) -> list[str]:
    if not isinstance(state, Mapping) or any(name not in state for name in _ENTRIES):
        return [f"it is {describe(state)} without {list(_ENTRIES)}; pass what get_passion_state_dict() returned"]
    if state.get("version", 0) > _VERSION:
        return [f"version {state['version']} was written by a newer release; this one reads up to {_VERSION}"]
    problems = []
    if list(state["modalities"]) != list(modalities):
        problems.append(f"it was saved for {list(state['modalities'])}, this model has {list(modalities)}")
    if not isinstance(state["settings"], Mapping):
        problems.append(f"settings are {describe(state['settings'])}, need a dictionary")
    return problems

"""What a checkpoint keeps of the add-on: everything that is ours and nothing of the backbone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from passion_plugin.errors import ConfigError, raise_problems
from passion_plugin.state_checks import cpu_copies, entry_problems, key_problems, listed, shown
from passion_plugin.strategies.base import Strategy

__all__ = ["addon_state", "addon_state_problems", "beside_modules", "load_addon_state", "with_modules"]

# 2 added the settings. To be raised whenever an entry or a setting is added, so that older releases say what to do.
_FORMAT = 2
_WITHOUT_SETTINGS = 1
# Entries that are modules of the wrapper, which its state_dict() visits by itself.
_MODULES = ("preference", "heads")


def addon_state(
    modalities: Sequence[str], heads: nn.ModuleList, strategy: Strategy, *, copy_heads: bool = True
) -> dict[str, Any]:
    """Return names, settings, heads and what the strategy keeps; readable with ``torch.load(weights_only=True)``.

    Args:
        modalities: M names, in mask-column order.
        heads: students of a backbone that cannot let a single modality through; else empty.
        strategy: prepared for these modalities.
        copy_heads: False where the heads are not looked at: they stay what they are, on their device.

    Returns:
        Copies on the CPU, which training does not change any more.
    """
    names = {"format": _FORMAT, "modalities": list(modalities), "settings": strategy.settings()}
    tensors = dict(heads.state_dict())
    return {**names, **strategy.addon_entries(), "heads": cpu_copies(tensors) if copy_heads else tensors}


def addon_state_problems(state: Any, modalities: Sequence[str], heads: nn.ModuleList, strategy: Strategy) -> list[str]:
    """Say why a state does not fit, a sentence for each reason; nothing is changed.

    Args:
        state: anything.
        modalities: M names, in mask-column order.
        heads: of this model.
        strategy: of this model.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("format"), int):
        return ["not an add-on state, which addon_state_dict() returns and save_addon() writes"]
    version = state["format"]
    if version not in (_WITHOUT_SETTINGS, _FORMAT):
        return [
            f"format {shown(version)}, this version reads {_WITHOUT_SETTINGS} and {_FORMAT}; load it with the release "
            "that wrote it, or a later one"
        ]
    problems = []
    names, rule = state.get("modalities"), state.get("strategy", "passion")
    same_names, same_rule = names == list(modalities), rule == strategy.name
    if not same_names:
        found = listed(names) if isinstance(names, list) else shown(names)
        problems.append(f"it was saved for [{found}], this model has {list(modalities)}")
    if not same_rule:
        problems.append(f"it was saved with strategy {shown(rule)}, this model has {strategy.name!r}")
    else:
        wrong_entries = _entry_problems(state, addon_state(modalities, heads, strategy, copy_heads=False))
        problems += wrong_entries
        if version != _WITHOUT_SETTINGS and "settings" in state:
            problems += _settings_problems(state["settings"], strategy.settings())
        if same_names and not wrong_entries:
            problems += strategy.addon_problems(state)
    wrong = entry_problems(heads.state_dict(), state["heads"]) if "heads" in state else []
    return problems + [f"its heads do not fit those of this model: {problem}" for problem in wrong]


def load_addon_state(
    state: Mapping[str, Any], modalities: Sequence[str], heads: nn.ModuleList, strategy: Strategy
) -> None:
    """Restore what :func:`addon_state` returned, all of it or nothing.

    Args:
        state: that dict.
        modalities: M names, in mask-column order.
        heads: changed in place.
        strategy: changed in place.

    Raises:
        ConfigError: listing why it does not fit; nothing has been changed.
    """
    raise_problems(addon_state_problems(state, modalities, heads, strategy), what="add-on state")
    strategy.load_addon_entries(state)
    heads.load_state_dict(state["heads"])


def beside_modules(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the ``state_dict()`` of a wrapper has to hold beside its modules.

    Args:
        state: what :func:`addon_state` returned.

    Returns:
        All of it but the modules. What a rule other than PASSION keeps is packed as bytes: a distributed checkpoint
        takes mappings apart and restores only what the model it is loaded into has already, but a rule may fill a
        mapping in its first step.
    """
    rest = {key: value for key, value in state.items() if key not in _MODULES}
    if "strategy_state" in rest:
        buffer = io.BytesIO()
        torch.save(rest["strategy_state"], buffer)
        rest["strategy_state"] = buffer.getvalue()
    return rest


def with_modules(rest: Any, own: Mapping[str, Any]) -> Any:
    """Return an add-on state of what :func:`beside_modules` returned, unchecked, with the modules as they are.

    Args:
        rest: anything.
        own: the state of the model as it is.

    Raises:
        ConfigError: the bytes cannot be read.
    """
    if not isinstance(rest, Mapping):
        return rest
    state = {**rest, **{key: value for key, value in own.items() if key in _MODULES}}
    packed = state.get("strategy_state")
    if isinstance(packed, bytes):
        try:
            state["strategy_state"] = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
        # Broken bytes may fail anywhere.
        except Exception as error:
            raise ConfigError(f"add-on state: strategy_state cannot be read ({type(error).__name__})") from error
    return state


def _entry_problems(state: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    expected, found = list(ours), list(state)
    if state["format"] == _WITHOUT_SETTINGS:
        # Other rules once saved a preference that they did not use.
        expected.remove("settings")
        found = [key for key in expected if key in state]
    return [f"entries {problem}" for problem in key_problems(expected, found)]


def _settings_problems(theirs: Any, ours: Mapping[str, Any]) -> list[str]:
    if not isinstance(theirs, Mapping):
        return [f"settings are {shown(theirs)}, need a mapping"]
    differing = [
        f"{name}: found {shown(theirs[name])}, expected {shown(value)}"
        for name, value in ours.items()
        if name in theirs and not _same(theirs[name], value)
    ]
    problems = [f"settings {problem}" for problem in key_problems(ours, theirs)]
    if differing:
        problems.append(
            f"it was saved with other settings ({'; '.join(differing)}): build the model with those, or, to go on with "
            "the ones of this model, put its addon_state_dict()['settings'] into the state"
        )
    return problems


def _same(theirs: Any, ours: Any) -> bool:
    return theirs is ours or (isinstance(theirs, (bool, int, float, str)) and theirs == ours)

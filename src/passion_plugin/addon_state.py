"""What a checkpoint keeps of the add-on: everything that is ours and nothing of the backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from passion_plugin.errors import ConfigError, raise_problems
from passion_plugin.strategies.base import Strategy

__all__ = ["addon_state", "load_addon_state"]

_FORMAT = 1


def addon_state(modalities: Sequence[str], heads: nn.ModuleList, strategy: Strategy) -> dict[str, Any]:
    """Return names, heads and what the strategy keeps; readable with ``torch.load(weights_only=True)``.

    Args:
        modalities: M names, in mask-column order.
        heads: students of a backbone that cannot let a single modality through; else empty.
        strategy: prepared for these modalities.
    """
    names = {"format": _FORMAT, "modalities": list(modalities)}
    return {**names, **strategy.addon_entries(), "heads": heads.state_dict()}


def load_addon_state(
    state: Mapping[str, Any], modalities: Sequence[str], heads: nn.ModuleList, strategy: Strategy
) -> None:
    """Restore what :func:`addon_state` returned.

    Args:
        state: that dict.
        modalities: M names, in mask-column order.
        heads: changed in place.
        strategy: changed in place.

    Raises:
        ConfigError: it is of another format, of other modalities or another strategy, or incomplete.
    """
    needed = {"format", "modalities", "heads"}
    if not isinstance(state, Mapping) or needed - set(state):
        raise ConfigError(f"not an add-on state: it must hold {sorted(needed)}")
    problems = []
    if state["format"] != _FORMAT:
        problems.append(f"format {state['format']!r}, this version reads {_FORMAT}")
    if list(state["modalities"]) != list(modalities):
        problems.append(f"it was saved for {state['modalities']}, this model has {list(modalities)}")
    if set(state["heads"]) != set(heads.state_dict()):
        problems.append("its heads do not fit those of this model")
    theirs, ours = state.get("strategy"), strategy.addon_entries().get("strategy")
    if theirs != ours:
        problems.append(f"it was saved with strategy {theirs!r}, this model has {ours!r}")
    raise_problems(problems, what="add-on state")
    strategy.load_addon_entries(state)
    heads.load_state_dict(state["heads"])

"""Copies of a state, and what is wrong with one that was read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from passion_plugin._validate import describe, is_int, is_number


def cpu_copies(state: Any) -> Any:
    """Return a state with a copy of each tensor on the CPU, which training does not change any more."""
    return tree_map(lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf, state)


def state_problems(expected: Mapping[str, Any], found: Any) -> list[str]:
    """Compare a state that was read with the one that would be written now.

    Entries must be the same, numbers numbers, tensors of the same shape. An entry that is None or an empty tensor now
    says nothing yet and is not compared, nor is what a dictionary holds, which may fill during training.

    Args:
        expected: the state as it would be written now.
        found: what was read.

    Returns:
        A sentence for each problem.

    Example:
        >>> import torch
        >>> state_problems({"epoch": 0, "sums": torch.zeros(3)}, {"epoch": 1.5, "sums": torch.zeros(4), "more": 1})
        ["unknown entries: ['more']", 'epoch is 1.5, need a count', 'sums has shape (4,), need (3,)']
    """
    if not isinstance(found, Mapping):
        return [f"it is {describe(found)}, need a dictionary with {sorted(expected)}"]
    missing, unknown = ([key for key in a if key not in b] for a, b in ((expected, found), (found, expected)))
    problems = [f"{what} entries: {keys}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys]
    return problems + [
        problem for key, value in expected.items() if key in found and (problem := _problem(key, value, found[key]))
    ]


def _problem(key: str, expected: Any, found: Any) -> str:
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.is_floating_point() != expected.is_floating_point():
            return f"{key} is {describe(found)}, need {describe(expected)}"
        if expected.numel() and found.shape != expected.shape:
            return f"{key} has shape {tuple(found.shape)}, need {tuple(expected.shape)}"
    elif isinstance(expected, Mapping):
        return "" if isinstance(found, Mapping) else f"{key} is {describe(found)}, need a dictionary"
    elif is_int(expected, least=0):
        # A strategy of the user's own may start with a number and go on with a tensor.
        return "" if isinstance(found, Tensor) or is_int(found, least=0) else f"{key} is {found!r}, need a count"
    elif isinstance(expected, float):
        return "" if isinstance(found, Tensor) or is_number(found) else f"{key} is {found!r}, need a number"
    elif isinstance(expected, (bool, str, list)) and type(found) is not type(expected):
        return f"{key} is {found!r}, need {describe(expected)}"
    return ""

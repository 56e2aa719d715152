"""Copies of a state, and what is wrong with one that was read beside the one that would be written.

What was read may be anything, from a file of an older release to one made to do harm. It is only looked into where
the own state says what to expect, and never printed as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["cpu_copies", "entry_problems", "key_problems", "listed", "shown"]

_LONGEST = 60
_MOST = 6
_LARGEST_COUNT = 1 << 53


def cpu_copies(state: Any) -> Any:
    """Return a state with a copy of each tensor on the CPU, which training does not change any more."""
    return tree_map(lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf, state)


def entry_problems(ours: Mapping[str, Any], theirs: Any) -> list[str]:
    """Compare entry by entry: none is lacking or unknown, each is of the same kind, tensors have the same shape.

    An entry of ``ours`` that is None or an empty tensor says nothing yet and is not compared. A mapping in ``ours`` may
    fill during training: it may lack entries, and what is not there yet may be a tensor or a number.

    Args:
        ours: the state as it would be written now.
        theirs: what was read.

    Returns:
        A sentence for each problem.

    Example:
        >>> import torch
        >>> entry_problems({"epoch": 0, "sums": torch.zeros(3)}, {"epoch": 1.5, "sums": torch.zeros(4), "more": 1})
        ["unknown: 'more'", 'epoch is 1.5, need a count', 'sums has shape (4,), need (3,)']
    """
    if not isinstance(theirs, Mapping):
        return [f"found {shown(theirs)}, need the entries {listed(ours)}"]
    shared = [key for key in ours if key in theirs]
    return key_problems(ours, theirs) + [
        problem for key in shared for problem in _value_problems(key, ours[key], theirs[key])
    ]


def key_problems(ours: Iterable[str], theirs: Iterable[Any]) -> list[str]:
    """Say which of the expected keys are lacking, and which of those found are unknown."""
    expected, found = list(ours), list(theirs)
    lacking = [key for key in expected if key not in found]
    unknown = [key for key in found if key not in expected]
    return [f"{what}: {listed(keys)}" for what, keys in (("lacking", lacking), ("unknown", unknown)) if keys]


def shown(value: Any) -> str:
    """Return a number, text or None as Python writes it, cut where it is long, and of all else the type."""
    if value is None or isinstance(value, (bool, float, str)) or (isinstance(value, int) and abs(value) < 1 << 64):
        text = repr(value[: _LONGEST + 1]) if isinstance(value, str) else repr(value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    return f"a {type(value).__name__}"


def listed(keys: Iterable[Any]) -> str:
    """Return the first few keys, and how many more there are."""
    texts = [shown(key) for key in keys]
    more = len(texts) - _MOST
    return ", ".join(texts[:_MOST]) + (f" and {more} more" if more > 0 else "")


def _value_problems(key: str, ours: Any, theirs: Any) -> list[str]:
    if isinstance(ours, Mapping):
        if not isinstance(theirs, Mapping):
            return [f"{key} is {shown(theirs)}, need a mapping"]
        found = [_filled_problems(f"{key}[{shown(name)}]", ours.get(name), value) for name, value in theirs.items()]
        return [problem for problems in found for problem in problems]
    if isinstance(ours, Tensor):
        return _tensor_problems(key, ours, theirs)
    if isinstance(ours, bool) or not isinstance(ours, (int, float)):
        wrong = ours is not None and type(theirs) is not type(ours)
        return [f"{key} is {shown(theirs)}, need a {type(ours).__name__}"] if wrong else []
    # A rule of somebody's own may start with a number and go on with a tensor.
    if isinstance(theirs, Tensor) and theirs.ndim == 0:
        return []
    if isinstance(ours, float):
        number = isinstance(theirs, (int, float)) and not isinstance(theirs, bool)
        return [] if number else [f"{key} is {shown(theirs)}, need a number"]
    count = type(theirs) is int and 0 <= theirs < _LARGEST_COUNT
    return [] if count else [f"{key} is {shown(theirs)}, need a count"]


def _filled_problems(key: str, ours: Any, theirs: Any) -> list[str]:
    if ours is not None:
        return _value_problems(key, ours, theirs)
    return [] if isinstance(theirs, (Tensor, int, float)) else [f"{key} is {shown(theirs)}, need a tensor or a number"]


def _tensor_problems(key: str, ours: Tensor, theirs: Any) -> list[str]:
    if not isinstance(theirs, Tensor):
        return [f"{key} is {shown(theirs)}, need a tensor"]
    if ours.numel() and theirs.shape != ours.shape:
        return [f"{key} has shape {tuple(theirs.shape)}, need {tuple(ours.shape)}"]
    # Not the same dtype: a state may come from a device or a model of another precision.
    alike = theirs.dtype == ours.dtype or (theirs.is_floating_point() and ours.is_floating_point())
    if not alike or theirs.layout != ours.layout or theirs.is_meta or theirs.is_quantized:
        return [f"{key} is a tensor of {theirs.dtype} and {theirs.layout}, need {ours.dtype} and {ours.layout}"]
    return []

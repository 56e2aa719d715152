"""Questions about plain settings that may be of any type: every answer is yes or no, and none of them raises."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

__all__ = ["is_number", "is_one_of", "is_whole", "members"]


def is_one_of(value: Any, choices: Sequence[str]) -> bool:
    """Whether ``value`` is one of some words."""
    return isinstance(value, str) and value in choices


def is_number(
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> bool:
    """Whether ``value`` is a finite real number in a range; True and False are none.

    Example:
        >>> is_number(0.5, above=0, most=1), is_number(0, above=0), is_number("1"), is_number(float("nan"))
        (True, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        number = float(value)
    except OverflowError:
        return False
    return math.isfinite(number) and above < number < below and least <= number <= most


def is_whole(value: Any, *, least: int) -> bool:
    """Whether ``value`` is an integer of at least ``least``; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def members(value: Any) -> tuple[Any, ...] | None:
    """Return what a list, a tuple or another collection holds; None for anything else, a string included.

    Example:
        >>> members(["t1", "t2"]), members("t1"), members(3)
        (('t1', 't2'), None, None)
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return None
    try:
        return tuple(value)
    except TypeError:  # a tensor or an array without axes
        return None

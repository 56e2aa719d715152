"""Assertions about rules over modalities: tables (B, M) or inputs (B, M, *spatial), column = modality."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from passion_plugin.testing._calls import Function, assert_same, gradients, outputs

__all__ = [
    "assert_invariant_to_absent_content",
    "assert_modality_permutation_equivariant",
    "assert_modality_permutation_invariant",
]

_POISONS = (math.nan, math.inf, -math.inf, 1e30)


def assert_modality_permutation_equivariant(
    rule: Function, *tables: Tensor, rtol: float = 1e-9, atol: float = 1e-12
) -> None:
    """A result per modality follows its modality when the columns change places.

    Args:
        rule: of the tables; its outputs have the modalities on their last axis.
        *tables: (M,) or (B, M), modalities on the last axis.
        rtol: relative tolerance.
        atol: absolute tolerance.

    Raises:
        AssertionError: the rule knows a modality by its position.
    """
    before = outputs(rule(*tables))
    for order in _orders(tables[0].shape[-1]):
        after = rule(*(table[..., order] for table in tables))
        moved = tuple(value[..., order] for value in before)
        what = f"results do not follow their modalities into the order {order.tolist()}"
        assert_same(after, moved, rtol=rtol, atol=atol, what=what)


def assert_modality_permutation_invariant(
    rule: Function, *tables: Tensor, rtol: float = 1e-9, atol: float = 1e-12
) -> None:
    """A result over all modalities does not change when the columns change places.

    Args:
        rule: of the tables; its outputs have no axis of modalities.
        *tables: (M,) or (B, M), modalities on the last axis.
        rtol: relative tolerance.
        atol: absolute tolerance.

    Raises:
        AssertionError: the rule knows a modality by its position.
    """
    before = rule(*tables)
    for order in _orders(tables[0].shape[-1]):
        after = rule(*(table[..., order] for table in tables))
        what = f"the result changes when the modalities are in the order {order.tolist()}"
        assert_same(after, before, rtol=rtol, atol=atol, what=what)


def assert_invariant_to_absent_content(rule: Function, presence: Tensor, *tables: Tensor) -> None:
    """What stands where a modality is absent changes nothing, be it NaN, and gets a gradient of exactly 0.

    Args:
        rule: of the tables; it knows ``presence`` by itself.
        presence: bool (B, M) with at least one False.
        *tables: floating (B, M) or (B, M, *spatial).

    Raises:
        AssertionError: content of an absent modality leaks.
        ValueError: nothing is absent, so nothing could be checked.
    """
    if bool(presence.all()):
        raise ValueError("assert_invariant_to_absent_content: no modality is absent, nothing to check")
    absent = [~presence.view(presence.shape + (1,) * (table.ndim - 2)).expand_as(table) for table in tables]
    clean = tuple(table.masked_fill(gap, 0.0) for table, gap in zip(tables, absent, strict=True))
    before, slopes = rule(*clean), gradients(rule, clean)
    for poison in _POISONS:
        poisoned = tuple(table.masked_fill(gap, poison) for table, gap in zip(tables, absent, strict=True))
        what = f"{poison} in an absent modality"
        assert_same(rule(*poisoned), before, rtol=0, atol=0, what=f"{what} changes the result")
        for slope, expected, gap in zip(gradients(rule, poisoned), slopes, absent, strict=True):
            if slope is None:
                continue
            if not bool((slope[gap] == 0).all()):
                raise AssertionError(f"{what} gets a gradient that is not 0")
            assert_same(slope, expected, rtol=0, atol=0, what=f"{what} changes the gradient")


def _orders(modalities: int) -> Iterator[Tensor]:
    """Every rotation and the reversal, the identity left out."""
    columns = torch.arange(modalities)
    for shift in range(1, modalities):
        yield columns.roll(shift)
    yield columns.flip(0)

"""How the assertions call a loss and compare what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["Function", "assert_same", "floating", "gradients", "outputs"]

Function: TypeAlias = Callable[..., Any]


def outputs(result: Any) -> tuple[Tensor, ...]:
    """What a loss or reference returned, as a tuple of tensors; the first is the one that is trained on."""
    values = result if isinstance(result, tuple) else (result,)
    return tuple(value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value)) for value in values)


def floating(value: Any) -> bool:
    """Whether a gradient can be asked of an argument."""
    return isinstance(value, Tensor) and value.is_floating_point()


def gradients(function: Function, arguments: tuple[Any, ...], weight: Tensor | None = None) -> list[Tensor | None]:
    """Gradient of ``sum(weight * function(*arguments))`` of every floating argument, None for the others.

    Args:
        function: the loss.
        arguments: its arguments; not changed.
        weight: as the first output; ones where None.

    Returns:
        One entry for each argument; zeros where the argument is not used.
    """
    leaves = [value.detach().clone().requires_grad_() if floating(value) else value for value in arguments]
    value = outputs(function(*leaves))[0]
    wanted = [leaf for leaf in leaves if floating(leaf)]
    if not value.requires_grad:
        found = iter([torch.zeros_like(leaf) for leaf in wanted])
    else:
        scalar = value.sum() if weight is None else (value * weight).sum()
        found = iter(torch.autograd.grad(scalar, wanted, allow_unused=True, materialize_grads=True))
    return [next(found) if floating(leaf) else None for leaf in leaves]


def assert_same(actual: Any, expected: Any, *, rtol: float, atol: float, what: str) -> None:
    """Compare values and shapes in float64 and say what was expected to be the same."""
    left, right = outputs(actual), outputs(expected)
    if len(left) != len(right):
        raise AssertionError(f"{what}: {len(left)} outputs instead of {len(right)}")
    for number, (one, other) in enumerate(zip(left, right, strict=True)):
        name = what if len(left) == 1 else f"{what} (output {number})"
        if one.shape != other.shape:
            raise AssertionError(f"{name}: shape {tuple(one.shape)} instead of {tuple(other.shape)}")
        try:
            torch.testing.assert_close(one.detach().double(), other.detach().double(), rtol=rtol, atol=atol)
        except AssertionError as error:
            raise AssertionError(f"{name}.\n{error}") from None

"""Zeros that pass as functions of other tensors, to which they send a gradient of zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Shape", "zero_of", "zeros_of"]


@dataclass(frozen=True)
class Shape:
    """What it takes to make a tensor of zeros."""

    size: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Shape:
        """Return the shape of a tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def zeros(self) -> Tensor:
        """Return zeros."""
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)


def zeros_of(shapes: Sequence[Shape], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return zeros of some shapes whose gradient with respect to ``tensors`` is zero rather than None."""
    return _Zeros.apply(shapes, *tensors)


def zero_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the scalar 0 with a gradient of zero, which 0 * sum would not have where something is infinite.

    Example:
        >>> import math
        >>> weight = torch.tensor([1.0, math.inf], requires_grad=True)
        >>> zero_of([weight]).backward()
        >>> weight.grad
        tensor([0., 0.])
    """
    first = tensors[0]
    return zeros_of([Shape(torch.Size(), first.dtype, first.device)], tensors)[0]


class _Zeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shapes: Sequence[Shape], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.tensors = [Shape.of(tensor) for tensor in tensors]
        outputs = tuple(shape.zeros() for shape in shapes)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        zeros = [
            shape.zeros() if needed else None
            for shape, needed in zip(ctx.tensors, ctx.needs_input_grad[1:], strict=True)
        ]
        return (None, *zeros)

"""Triton kernels of the losses, for CUDA tensors, and what all of them are launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Run a Triton kernel on the device of its first argument, a tensor; an empty grid runs nothing."""
    if 0 not in grid:
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **settings)


def with_strides(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor (B, C, V) as kernels take it: with the strides of its axes. (B, V) has stride 0 for C, bool is uint8."""
    stride_b, *stride_c, stride_v = tensor.stride()
    pointer = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    return pointer, stride_b, *(stride_c or [0]), stride_v

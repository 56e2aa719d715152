"""What the losses share: precision, layout of labels, derivatives, chunks of voxels, and the choice of a backend."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from passion_plugin.errors import ConfigError

MIN_PROBABILITY = 0.005
"""Official mode clamps probabilities to [0.005, 1], as the published code does."""

COSINE_EPS = 1e-5
DICE_EPS = 1e-7

_CHUNK_ELEMENTS = 1 << 18


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float32 at least, float64 if any tensor is.

    Sums over 80^3 voxels overflow in float16 and lose every digit in bfloat16.
    """
    return functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors], torch.float32)


def no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off for the device of ``tensor``, so that matrix products keep their dtype."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def flatten_voxels(maps: Tensor) -> Tensor:
    """(B, C, *spatial) to (B, C, V), a view where the strides allow it."""
    return rearrange(maps, "b c ... -> b c (...)")


def flatten_both(maps: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Maps to (B, C, V) and labels to (B, V), or to (B, K, V) where they are masks: have as many axes as the maps."""
    flat = flatten_voxels(labels) if labels.ndim == maps.ndim else rearrange(labels, "b ... -> b (...)")
    return flatten_voxels(maps), flat


def class_masks(labels: Tensor, num_classes: int, ndim: int) -> Tensor:
    """Which voxels belong to class or region k: bool (B, K, V), a quarter of the float32 logits.

    Labels are class numbers (B, *spatial), or masks (B, K, *spatial) if they have the ``ndim`` axes of the maps.

    Example:
        >>> class_masks(torch.tensor([[[0, 1]]]), 2, ndim=4).int()
        tensor([[[1, 0],
                 [0, 1]]], dtype=torch.int32)
    """
    if labels.ndim == ndim:
        return flatten_voxels(labels) != 0
    classes = rearrange(torch.arange(num_classes, device=labels.device), "k -> k 1")
    return rearrange(labels, "b ... -> b 1 (...)") == classes


def is_counted(labels: Tensor, ignore_index: int) -> Tensor:
    """Which labels are not ``ignore_index``; as int64, because a uint8 tensor compared with -1 would find 255."""
    return labels.long() != ignore_index


def empty_gradient(maps: Tensor) -> Tensor:
    """Memory for the gradient of maps (B, C, *spatial), laid out as they are."""
    return torch.empty_like(flatten_voxels(maps)).view(maps.shape)


def exp_(log: Tensor) -> Tensor:
    """``exp`` in place, as a power of 2: PyTorch on the CPU takes a quarter of the time for it."""
    return log.mul_(1 / math.log(2)).exp2_()


def register_gradient(
    op: Any, gradient_op: Any, definition: Callable[..., Any], *, tensors: int, losses: int = 1, kept: int = 1
) -> None:
    """Give a custom operator its derivative by its first argument, for which it keeps its inputs and small outputs.

    Args:
        op: takes ``tensors`` tensors, then settings, the last of which is the backend.
        gradient_op: takes the upstream gradients, the tensors, the kept outputs and the settings.
        definition: the same losses in PyTorch, differentiated where a second derivative may follow.
        tensors: number of tensors that ``op`` takes.
        losses: number of outputs, the first ones, that have a gradient.
        kept: index of the first output to keep.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.settings = inputs[tensors:]
        ctx.mark_non_differentiable(*outputs[losses:])
        ctx.save_for_backward(*inputs[:tensors], *outputs[kept:])

    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, inputs = None, ctx.saved_tensors[:tensors]
        if ctx.needs_input_grad[0] and torch.is_grad_enabled():  # create_graph=True
            with no_autocast(inputs[0]):
                values = definition(*inputs, *ctx.settings[:-1])
                values = values[:losses] if isinstance(values, tuple) else (values,)
                (gradient,) = torch.autograd.grad(values, inputs[0], upstream[:losses], create_graph=True)
        elif ctx.needs_input_grad[0]:
            gradient = gradient_op(*upstream[:losses], *ctx.saved_tensors, *ctx.settings)
        return gradient, *[None] * (tensors - 1 + len(ctx.settings))

    op.register_autograd(backward, setup_context=setup_context)
    gradient_op.register_fake(lambda *arguments: empty_gradient(arguments[losses]))


def voxel_chunks(voxels: int, channels: int, times: int = 1) -> Iterator[slice]:
    """Cut ``voxels`` into slices for which temporaries of ``channels`` numbers a voxel stay in the CPU's cache.

    Operations of many small steps take pieces ``times`` as large: starting a step then costs more than a cache miss.
    """
    size = max(1024, times * _CHUNK_ELEMENTS // max(1, channels))
    for start in range(0, voxels, size):
        yield slice(start, min(start + size, voxels))


def use_triton(backend: str, *tensors: Tensor) -> bool:
    """Decide between the Triton kernels and the eager code for tensors on one device.

    ``"auto"`` takes Triton, where installed, for CUDA tensors in half or single precision.

    Raises:
        ConfigError: ``"triton"`` is asked for and cannot be had. Its interpreter also runs on the CPU.
    """
    if backend == "eager":
        return False
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if not _triton_installed():
        problem = "triton is not installed: pip install 'passion-plugin[triton]'"
    elif any(tensor.dtype == torch.float64 for tensor in tensors):
        problem = "the kernels compute in single precision and the tensor is float64"
    elif not tensors[0].is_cuda and not interpreted:
        problem = f"the tensor is on {tensors[0].device}"
    else:
        return True
    if backend == "triton":
        raise ConfigError(f"backend='triton', but {problem}. Use backend='auto'")
    return False


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None

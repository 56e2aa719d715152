"""What all losses share: in which precision they compute, and how labels become masks."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from passion_plugin._types import Backend
from passion_plugin.errors import ConfigError

__all__ = [
    "Backend",
    "class_masks",
    "count_launch",
    "launches",
    "outside_autocast",
    "use_triton",
    "voxel_chunks",
    "wide_dtype",
]


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float32 at least, float64 if any tensor is.

    Sums over 80^3 voxels overflow in float16 and lose every digit in bfloat16.

    Example:
        >>> wide_dtype(torch.zeros(1, dtype=torch.bfloat16))
        torch.float32
    """
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def outside_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off for the device of ``tensor``, so that matrix products stay in the dtype given."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def class_masks(labels: Tensor, num_classes: int, ndim: int) -> Tensor:
    """``Y[b, k, v]``: which voxels belong to class or region k.

    Args:
        labels: class numbers (B, *spatial), or masks (B, K, *spatial) as told by ``ndim``.
        num_classes: K.
        ndim: number of axes of the logits or features.

    Returns:
        bool (B, K, V), a quarter of the float32 logits.

    Example:
        >>> class_masks(torch.tensor([[[0, 1]]]), 2, ndim=4).int()
        tensor([[[1, 0],
                 [0, 1]]], dtype=torch.int32)
    """
    if labels.ndim == ndim:
        return labels.flatten(2) != 0
    classes = torch.arange(num_classes, device=labels.device).view(1, -1, 1)
    return labels.flatten(1).unsqueeze(1) == classes


_CHUNK_ELEMENTS = 1 << 18

_launches: Counter[str] = Counter()


def use_triton(backend: str, tensor: Tensor) -> bool:
    """Decide between the Triton kernels and the eager body.

    Args:
        backend: ``"auto"``: Triton for CUDA tensors in half or single precision where triton is installed, else
            eager. ``"eager"``: never Triton. ``"triton"``: Triton or an error.
        tensor: one of the inputs; its device and dtype count.

    Raises:
        ConfigError: ``"triton"`` cannot be had: triton is not installed, or the tensor is not on a CUDA device
            (and Triton's interpreter is off), or it is in double precision.
    """
    if backend == "eager" or (backend == "auto" and (tensor.dtype == torch.float64 or not tensor.is_cuda)):
        return False
    if backend == "auto":
        return _installed()
    problem = (
        "triton is not installed: pip install 'passion-plugin[triton]'"
        if not _installed()
        else "the kernels compute in single precision and the tensor is float64"
        if tensor.dtype == torch.float64
        else f"the tensor is on {tensor.device}"
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1"
        else None
    )
    if problem:
        raise ConfigError(f"backend='triton', but {problem}. Use backend='auto'")
    return True


def count_launch(name: str) -> None:
    """Note that a Triton kernel was launched."""
    _launches[name] += 1


def launches() -> dict[str, int]:
    """Return how often each Triton kernel was launched in this process, to show that the fused path ran."""
    return dict(_launches)


def voxel_chunks(voxels: int, channels: int, times: int = 1) -> Iterator[slice]:
    """Cut ``voxels`` into slices for which temporaries of ``channels`` numbers a voxel stay in the CPU's cache.

    Operations of many small steps take pieces that are ``times`` as large: starting a step then costs more than a miss.
    """
    size = max(1024, times * _CHUNK_ELEMENTS // max(1, channels))
    for start in range(0, voxels, size):
        yield slice(start, min(start + size, voxels))


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None

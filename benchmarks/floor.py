"""The hardware's limit: how fast a loss could be if only its traffic or its arithmetic counted."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from benchmarks.measure import best

__all__ = ["Work", "floor"]


@dataclass(frozen=True)
class Work:
    """What forward and backward cannot do without.

    Attributes:
        bytes: moved to and from memory. A tensor counts once for each time that it has to be gone through:
            as often as the next number depends on a sum over all voxels.
        flops: additions and multiplications.
        exponentials: evaluated.
    """

    bytes: int
    flops: int = 0
    exponentials: int = 0


def floor(work: Work, working_set: int, device: torch.device) -> tuple[float, str]:
    """Return the least time in seconds and what limits it.

    Args:
        work: to be done.
        working_set: bytes of the tensors involved. The bandwidth is measured on as many, because what fits in
            a cache moves faster than memory does.
        device: where.
    """
    limits = {
        "bandwidth": work.bytes / _bandwidth(device, working_set),
        "arithmetic": work.flops / _flops(device),
        "exponentials": work.exponentials / _exponentials(device),
    }
    slowest = max(limits, key=lambda name: limits[name])
    return limits[slowest], slowest


@functools.cache
def _bandwidth(device: torch.device, working_set: int) -> float:
    """Bytes per second of ``c = a + b``, of which two thirds are read and one third is written."""
    count = max(1, working_set // 12)
    a, b, c = (torch.ones(count, device=device) for _ in range(3))
    return 12 * count / best(lambda: torch.add(a, b, out=c), device)


@functools.cache
def _flops(device: torch.device) -> float:
    """Operations per second of a float32 matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.ones(2, size, size, device=device)
    return 2 * size**3 / best(lambda: a @ b, device)


@functools.cache
def _exponentials(device: torch.device) -> float:
    """Exponentials per second on numbers that stay in a cache."""
    count = 1 << 24 if device.type == "cuda" else 1 << 17
    a = torch.zeros(count, device=device)
    out = torch.empty_like(a)
    return count / best(lambda: torch.exp(a, out=out), device)

"""Keeping and putting back the state of the random number generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from passion_plugin.overrides import undone

__all__ = ["kept_random_state", "random_state", "set_random_state"]


def random_state() -> tuple[Tensor, list[Tensor]]:
    """Return the state of the CPU generator and of those of all CUDA devices in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


def set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    """Put back what :func:`random_state` returned."""
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def kept_random_state(keep: bool) -> Iterator[None]:
    """Leave the generators as they are now when the context ends, after an exception too; or do nothing."""
    if not keep:
        yield
        return
    with undone(partial(set_random_state, random_state())):
        yield

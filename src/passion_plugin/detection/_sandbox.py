"""Running somebody else's network to learn about it, and leaving no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from passion_plugin.backbone import CONTAINERS, is_uninitialized, preserved_rng_state, restore_containers


def reseed(seed: int = 0) -> None:
    """Set every generator that a network may draw from to the same state.

    Unlike ``torch.manual_seed`` this does nothing to a CUDA that has not been started yet: a seed queued for
    it would outlive the sandbox.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def lazy_parameters(backbone: nn.Module) -> list[str]:
    """Return the names of parameters and buffers that get their shape in the first forward pass."""
    named = [*backbone.named_parameters(), *backbone.named_buffers()]
    return [name for name, tensor in named if is_lazy(tensor)]


@contextmanager
def sandbox(backbone: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient, autocast or compilation; afterwards everything is as it was.

    Put back, also after an exception: training flags, parameters, buffers, plain attributes of every module
    (networks keep features, masks and counters on themselves), the contents of lists and dictionaries found
    there, and the random state of torch, NumPy and Python. Lazy modules that get their shapes inside keep them.
    """
    state = _Snapshot(backbone)
    before = random.getstate(), np.random.get_state()
    try:
        with preserved_rng_state(), ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for kind in {"cpu", *(parameter.device.type for parameter in backbone.parameters())} - {"meta"}:
                if torch.amp.is_autocast_available(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            if torch.cuda.is_initialized():
                # Faster algorithms that round differently from one call to the next would look like effects.
                stack.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
            if hasattr(torch.compiler, "set_stance"):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            backbone.eval()
            yield
    finally:
        state.restore()
        random.setstate(before[0])
        np.random.set_state(before[1])


@contextmanager
def preserved_modes(backbone: nn.Module) -> Iterator[None]:
    """Evaluation mode, with training flags and random state put back: for the first run of lazy modules.

    The generators are not seeded: the initial weights depend on the user's random state, as they would in
    the first training step.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        with preserved_rng_state():
            backbone.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Snapshot:
    """Contents of all attribute dictionaries, containers and tensors that hang on a module."""

    def __init__(self, backbone: nn.Module) -> None:
        self.containers: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[Tensor, Tensor]] = []
        self.lazy: list[tuple[nn.Module, bool]] = []
        seen: set[int] = set()
        waiting: list[Any] = [backbone]
        while waiting:
            value = waiting.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, nn.Module) and is_uninitialized(value):
                # Becomes another class with other hooks in its first run, which must not be half undone.
                self.lazy.append((value, value.training))
                waiting.append(value._modules)
            elif isinstance(value, nn.Module):
                waiting.append(value.__dict__)
            elif isinstance(value, Tensor):
                if not is_lazy(value) and not value.is_inference() and value.device.type != "meta":
                    self.tensors.append((value, value.detach().clone()))
            elif type(value) in CONTAINERS:
                self.containers.append((value, value.copy()))
                waiting += value.values() if isinstance(value, dict) else value
            elif isinstance(value, tuple):
                waiting += value

    def restore(self) -> None:
        for module, mode in self.lazy:
            module.training = mode
        restore_containers(self.containers)
        with torch.no_grad():
            for tensor, kept in self.tensors:
                # Written only where something changed: a write would invalidate graphs that the user holds.
                if not same_values(tensor, kept):
                    tensor.copy_(kept)


def same_values(tensor: Tensor, kept: Tensor) -> bool:
    """Whether two tensors hold the same; NaN is the same as NaN."""
    if tensor.shape != kept.shape or tensor.dtype != kept.dtype or tensor.device != kept.device:
        return False
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(torch.allclose(tensor, kept, rtol=0, atol=0, equal_nan=True))
    return torch.equal(tensor, kept)

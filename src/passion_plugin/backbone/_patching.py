"""Temporarily change a module (its forward, attributes, buffers) or the random state, and restore it on exit.

Hooks would not do for capturing outputs: those added after ``torch.compile`` never fire, the replicas of
``DataParallel`` share one dictionary of hooks, and other libraries clear it.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

__all__ = [
    "CONTAINERS",
    "Handler",
    "get_rng_state",
    "is_uninitialized",
    "patched_attributes",
    "patched_forward",
    "preserved_attributes",
    "preserved_buffers",
    "preserved_rng_state",
    "restore_containers",
    "set_rng_state",
    "untraced",
]

Handler = Callable[..., Any]
"""``(original_forward, *args, **kwargs) -> output``, what runs in place of a module's forward."""

# For handlers: they change with every pass, so the compiler would recompile until it gives up. It sees what they call
# instead. torch.compiler.disable would import the compiler with this module, which takes seconds.
untraced = torch._disable_dynamo(recursive=False)  # type: ignore[attr-defined]

CONTAINERS = frozenset({dict, OrderedDict, defaultdict, deque, list, set})
# Parameters, buffers, sub-modules and hooks.
_OF_TORCH = frozenset(vars(nn.Module()))


@contextmanager
def patched_forward(handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Temporarily replace ``module.forward`` of single instances; restore it on exit.

    Args:
        handlers: what to run in place of the forward of each module.
    """
    before: dict[nn.Module, Any] = {}
    try:
        for module, handler in handlers.items():
            before[module] = module.__dict__.get("forward")
            # Written past __setattr__, which a backbone may have customised.
            module.__dict__["forward"] = functools.partial(_handle, handler, module.forward)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@contextmanager
def patched_attributes(backbone: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Temporarily set attributes of a module and its parts; restore them on exit.

    Args:
        backbone: the module.
        values: new values by dotted name.
    """
    before: list[tuple[nn.Module, str, bool, Any]] = []
    try:
        for name, value in values.items():
            owner, _, attribute = name.rpartition(".")
            module = backbone.get_submodule(owner)
            # A plain attribute of the class is covered by one of the instance, and uncovered afterwards; anything
            # else (instance attribute, sub-module, buffer, property) has to be set back.
            covers = attribute not in module.__dict__ and attribute in type(module).__dict__
            covers = covers and not hasattr(type(module).__dict__[attribute], "__set__")
            before.append((module, attribute, covers, getattr(module, attribute)))
            setattr(module, attribute, value)
        yield
    finally:
        for module, attribute, covers, value in reversed(before):
            if covers:
                module.__dict__.pop(attribute, None)
            else:
                setattr(module, attribute, value)


@contextmanager
def preserved_buffers(backbone: nn.Module) -> Iterator[None]:
    """Let a module work on copies of its buffers; put the originals back on exit.

    Running statistics then follow the fused pass only, and so do counters and the vectors of spectral norm. Setting
    the momentum of normalisation layers to zero would not do: 0 × NaN poisons the statistics.
    """
    before = [(module._buffers, dict(module._buffers)) for module in backbone.modules() if module._buffers]
    try:
        for buffers, originals in before:
            buffers.update({name: None if value is None else value.clone() for name, value in originals.items()})
        yield
    finally:
        for buffers, originals in before:
            buffers.clear()
            buffers.update(originals)


@contextmanager
def preserved_attributes(backbone: nn.Module) -> Iterator[None]:
    """Restore on exit what the modules keep on themselves, and what is in dictionaries, lists and sets among that.

    A KL term, stored features or a counter are then those of the pass before. Not restored are parameters,
    sub-modules and hooks, which sharding moves about in a pass, and modules that are still lazy. Tensors are not
    copied: what is changed in place belongs in a buffer.
    """
    kept: dict[int, tuple[Any, Any]] = {}
    waiting: list[Any] = []
    for module in backbone.modules():
        if isinstance(module, LazyModuleMixin) and is_uninitialized(module):
            continue
        attributes = vars(module)
        kept[id(attributes)] = attributes, attributes.copy()
        waiting += [value for name, value in attributes.items() if name not in _OF_TORCH and type(value) in CONTAINERS]
    while waiting:
        container = waiting.pop()
        if id(container) not in kept:
            kept[id(container)] = container, container.copy()
            values = container.values() if isinstance(container, dict) else container
            waiting += [value for value in values if type(value) in CONTAINERS]
    try:
        yield
    finally:
        restore_containers(kept.values())


def restore_containers(pairs: Iterable[tuple[Any, Any]]) -> None:
    """Give each container the items of its copy again.

    Args:
        pairs: a dictionary, list, deque or set, and its shallow copy.
    """
    for container, kept in pairs:
        if not _same_items(container, kept):
            container.clear()
            container.update(kept) if isinstance(container, (dict, set)) else container.extend(kept)


def is_uninitialized(module: nn.Module) -> bool:
    """Whether a module has parameters or buffers of its own that get their shape in the first forward."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(is_lazy(tensor) for tensor in tensors if tensor is not None)


def get_rng_state() -> tuple[Tensor, list[Tensor]]:
    """Return the state of the CPU generator and of those of all CUDA devices in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


def set_rng_state(state: tuple[Tensor, list[Tensor]]) -> None:
    """Restore what :func:`get_rng_state` returned."""
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def preserved_rng_state(keep: bool = True) -> Iterator[None]:
    """Restore the random state on exit; with ``keep=False`` do nothing."""
    if not keep:
        yield
        return
    state = get_rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


@untraced
def _handle(handler: Handler, forward: Handler, *args: Any, **kwargs: Any) -> Any:
    return handler(forward, *args, **kwargs)


def _same_items(container: Any, kept: Any) -> bool:
    if len(container) != len(kept):
        return False
    if isinstance(container, set):
        return {id(item) for item in container} == {id(item) for item in kept}
    same = all(map(is_, container, kept))
    return same and (not isinstance(container, dict) or all(map(is_, container.values(), kept.values())))

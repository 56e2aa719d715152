"""Temporarily change a module (its forward, attributes, buffers) or the random state, and restore it on exit.

Hooks would not do for capturing outputs: those added after ``torch.compile`` never fire, the replicas of
``DataParallel`` share one dictionary of hooks, and other libraries clear it.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

Handler = Callable[..., Any]
"""``(original_forward, *args, **kwargs) -> output``, what runs in place of a module's forward."""

# For handlers: they change with every pass, so the compiler would recompile until it gives up. It sees what they call
# instead. torch.compiler.disable would import the compiler with this module, which takes seconds.
untraced = torch._disable_dynamo(recursive=False)  # type: ignore[attr-defined]

CONTAINERS = frozenset({dict, OrderedDict, defaultdict, deque, list, set})
# Parameters, buffers, sub-modules and hooks.
_OF_TORCH = frozenset(vars(nn.Module()))

# The names of what a layer of torch holds. On the meta device, where making one draws no random numbers.
with torch.device("meta"):
    _NAMES: dict[type[nn.Module], frozenset[str]] = {
        type(layer): frozenset(vars(layer))
        for layer in (
            *(kind(1, 1, 1) for kind in (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
            *(kind(1) for kind in (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm)),
            *(kind(1, 1) for kind in (nn.Linear, nn.GroupNorm)),
            *(kind() for kind in (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softmax)),
            *(kind() for kind in (nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Sequential, nn.ModuleList)),
        )
    }


@contextmanager
def patched_forward(handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """Temporarily run handlers in place of ``module.forward`` of single instances."""
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
    """Temporarily set attributes of a module and its parts, by dotted name."""
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


class ModuleState:
    """What the modules of a network keep on themselves, to be restored after a pass.

    Buffers: a pass works on copies, so that running statistics follow the fused pass only, and so do counters and the
    vectors of spectral norm. Setting the momentum of normalisation layers to zero would not do: 0 × NaN poisons the
    statistics.

    Attributes: a KL term, stored features or a counter, and what is in dictionaries, lists and sets among them.
    Parameters, sub-modules and hooks are left alone, since sharding moves them in a pass, and so are modules that are
    still lazy. From layers of torch, only what somebody added is removed. Tensors are not copied: what is changed in
    place belongs in a buffer.

    Listing the modules takes longer than the rest: make one for each training step and use it for all its students.
    """

    def __init__(self, backbone: nn.Module, *, attributes: bool = True) -> None:
        modules = list(backbone.modules())
        # Batch normalisation of torch writes to its buffers only where it tracks statistics: switching that off is
        # cheaper than copies, and changes no output in training mode.
        self._tracking = [vars(m) for m in modules if _is_batch_norm(m) and m.training and m.track_running_stats]
        self._buffers = [m._buffers for m in modules if m._buffers and not _is_batch_norm(m)]
        own = [m for m in modules if not (isinstance(m, LazyModuleMixin) and is_uninitialized(m))] if attributes else []
        # Copying what the layers of torch hold would take most of the time, and they hold what their class gives them.
        names = [(vars(m), _NAMES.get(type(m), ())) for m in own]
        self._layers = [(held, known) for held, known in names if len(held) == len(known)]
        held = [held for held, known in names if len(held) != len(known)]
        self._held = [*held, *_containers_in(held)]

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore buffers and attributes on exit."""
        buffers = [(buffers, dict(buffers)) for buffers in self._buffers]
        kept = [held.copy() for held in self._held]
        try:
            for current, originals in buffers:
                current.update({name: None if value is None else value.clone() for name, value in originals.items()})
            for attributes in self._tracking:
                attributes["track_running_stats"] = False
            yield
        finally:
            restore_containers(zip(self._held, kept, strict=True))
            for held, known in self._layers:
                if len(held) != len(known):
                    for name in held.keys() - known:
                        del held[name]
            for attributes in self._tracking:
                attributes["track_running_stats"] = True
            for current, originals in buffers:
                current.clear()
                current.update(originals)


def preserved_buffers(backbone: nn.Module) -> AbstractContextManager[None]:
    """Let a module work on copies of its buffers; put the originals back on exit."""
    return ModuleState(backbone, attributes=False).preserved()


def restore_containers(pairs: Iterable[tuple[Any, Any]]) -> None:
    """Give each dictionary, list, deque or set the items of its shallow copy again."""
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
    state = get_rng_state() if keep else None
    try:
        yield
    finally:
        if state is not None:
            set_rng_state(state)


def _is_batch_norm(module: nn.Module) -> bool:
    return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _containers_in(attributes: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Return every dictionary, list, deque and set that hangs on attributes."""
    found: dict[int, Any] = {}
    waiting = [
        value
        for held in attributes
        for name, value in held.items()
        if type(value) in CONTAINERS and name not in _OF_TORCH
    ]
    while waiting:
        container = waiting.pop()
        if id(container) not in found:
            found[id(container)] = container
            values = container.values() if isinstance(container, dict) else container
            waiting += [value for value in values if type(value) in CONTAINERS]
    return list(found.values())


@untraced
def _handle(handler: Handler, forward: Handler, *args: Any, **kwargs: Any) -> Any:
    return handler(forward, *args, **kwargs)


def _same_items(container: Any, kept: Any) -> bool:
    if len(container) != len(kept):
        return False
    if isinstance(container, dict):
        # The same objects in the same order: keys need no comparison, which would take longer than the rest.
        return all(map(is_, container.values(), kept.values()))
    if isinstance(container, set):
        return {id(item) for item in container} == {id(item) for item in kept}
    return all(map(is_, container, kept))

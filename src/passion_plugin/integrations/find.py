"""The engine inside a model, whatever a trainer has put around it."""

from __future__ import annotations

from typing import Any

from torch import nn

from passion_plugin.engine import Passion, has_engine
from passion_plugin.errors import UsageError
from passion_plugin.wrapper import PassionWrapper

__all__ = ["find_engine"]


def find_engine(model: Any) -> Passion:
    """Return the one engine in a model.

    Args:
        model: a :class:`Passion`, a :class:`PassionWrapper`, or a module that holds a wrapper or a network with an
            attached engine: a LightningModule, what Fabric or Accelerate return, a compiled module.

    Returns:
        The engine.

    Raises:
        UsageError: there is none, or there are several.

    Example:
        >>> find_engine(nn.Linear(1, 1))
        Traceback (most recent call last):
        passion_plugin.errors.UsageError: there is no PassionWrapper in this Linear, ...
    """
    if isinstance(model, Passion):
        return model
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    found = {name: _engine(module) for name, module in modules if has_engine(module)}
    if len({id(engine) for engine in found.values()}) == 1:
        return next(iter(found.values()))
    if found:
        names = ", ".join(repr(name) for name in found)
        raise UsageError(
            f"there are {len(found)} engines in this {type(model).__name__}: {names}; pass the one you mean"
        )
    raise UsageError(
        f"there is no PassionWrapper in this {type(model).__name__}, and no engine attached: wrap the network before "
        "the trainer gets it, or pass the wrapper or the Passion object itself"
    )


def _engine(module: nn.Module) -> Passion:
    engine: Passion = module.passion if isinstance(module, PassionWrapper) else module.__dict__["forward"].__self__
    return engine

"""The engine inside a model, whatever a trainer has put around it."""

from __future__ import annotations

from typing import Any

from torch import nn

from passion_plugin.claims import engine_of
from passion_plugin.engine import Passion
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
    found: dict[int, tuple[str, Passion]] = {}
    for name, module in modules:
        engine = module.passion if isinstance(module, PassionWrapper) else engine_of(module)
        if engine is not None:
            found.setdefault(id(engine), (name, engine))
    if len(found) == 1:
        ((_, only),) = found.values()
        return only
    if found:
        names = ", ".join(repr(name) for name, _ in found.values())
        raise UsageError(
            f"there are {len(found)} engines in this {type(model).__name__}: {names}; pass the one you mean"
        )
    raise UsageError(
        f"there is no PassionWrapper in this {type(model).__name__}, and no engine attached: wrap the network before "
        "the trainer gets it, or pass the wrapper or the Passion object itself"
    )

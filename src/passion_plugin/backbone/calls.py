"""One call of a backbone: its arguments, read and rewritten without knowing what they all mean."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Argument", "BackboneCall", "locate_argument", "vector_hint"]


@dataclass(frozen=True)
class Argument:
    """Where an argument sits: by position, by name, or either (as a signature allows)."""

    position: int | None
    name: str | None

    def __str__(self) -> str:
        return f"argument {self.name!r}" if self.name is not None else f"positional argument {self.position}"


def locate_argument(backbone: nn.Module, key: int | str) -> Argument:
    """Return both ways in which the forward of ``backbone`` can be given the argument ``key``."""
    # What torch.compile puts around a module takes anything.
    backbone = getattr(backbone, "_orig_mod", backbone)
    forward = backbone.forward
    owner = getattr(forward, "__self__", backbone)
    if not isinstance(owner, nn.Module):
        # Bound to something that is no module: an attached engine, whose signature says nothing.
        forward = getattr(owner, "previous_forward", None) or type(backbone).forward.__get__(backbone)
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(key, int):
        return Argument(key, plain[key] if 0 <= key < len(plain) else None)
    return Argument(plain.index(key) if key in plain else None, key)


@dataclass(frozen=True)
class BackboneCall:
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def get(self, argument: Argument, default: Any = None) -> Any:
        """Return the value passed for ``argument``, or ``default``."""
        if argument.name is not None and argument.name in self.kwargs:
            return self.kwargs[argument.name]
        if argument.position is not None and argument.position < len(self.args):
            return self.args[argument.position]
        return default

    def replaced(self, argument: Argument, value: Any) -> BackboneCall:
        """Return a copy with another value for ``argument``, passed the way the caller passed it."""
        position = argument.position
        by_name = argument.name is not None and argument.name in self.kwargs
        if not by_name and position is not None and position < len(self.args):
            return BackboneCall((*self.args[:position], value, *self.args[position + 1 :]), self.kwargs)
        if argument.name is None:
            raise LookupError(f"{argument} was not passed and has no name to pass it by")
        return BackboneCall(self.args, {**self.kwargs, argument.name: value})

    def rows(self, index: Tensor, batch: int, whole: Sequence[Argument] = ()) -> BackboneCall:
        """Return a copy in which every batch-sized tensor is reduced to the rows ``index``.

        A tensor counts as batch-sized when it has at least two dimensions and ``batch`` rows. Vectors stay
        as they are: a (K,) tensor of class weights must not be cut when K happens to equal the batch size. See
        :func:`vector_hint`.

        Args:
            index: int64 (n,), rows to keep.
            batch: the batch size.
            whole: arguments to leave alone.
        """

        def select(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == batch:
                return value.index_select(0, index.to(value.device))
            return value

        kept = {argument: self.get(argument) for argument in whole}
        call = BackboneCall(tree_map(select, self.args), tree_map(select, dict(self.kwargs)))
        for argument, value in kept.items():
            call = call.replaced(argument, value) if value is not None else call
        return call


def vector_hint(backbone: nn.Module, call: BackboneCall, batch: int, whole: Sequence[Argument] = ()) -> str:
    """Say which vectors with an entry for each sample :meth:`BackboneCall.rows` may have left too long, if any.

    Args:
        backbone: the module that was called.
        call: with all the rows.
        batch: the batch size.
        whole: arguments that were left alone on purpose.
    """
    given: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    keys = [key for key, value in given if any(getattr(leaf, "shape", ()) == (batch,) for leaf in tree_leaves(value))]
    suspects = [argument for key in keys if (argument := locate_argument(backbone, key)) not in whole]
    if not suspects:
        return ""
    return (
        f". A vector in {' and in '.join(map(str, suspects))} has {batch} entries and was not reduced to these "
        f"samples: it could hold class weights. If it has one entry for each sample, pass it as a column "
        f"({suspects[0].name or 'vector'}[:, None])"
    )

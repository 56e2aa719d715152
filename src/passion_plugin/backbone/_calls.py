"""The arguments of one call of a backbone, and the images in it, modality by modality."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from passion_plugin._validate import describe, unreadable
from passion_plugin.errors import InputError, raise_problems, suggest


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
    if hasattr(owner, "previous_forward"):
        # An attached engine, whose signature says nothing.
        forward = owner.previous_forward or type(backbone).forward.__get__(backbone)
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
        """Return a copy in which every batch-sized tensor is reduced to the rows ``index``, except in ``whole``.

        A tensor counts as batch-sized when it has at least two dimensions and ``batch`` rows. Vectors stay
        as they are: a (K,) tensor of class weights must not be cut when K happens to equal the batch size. See
        :func:`vector_hint`.
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
    """Say which vectors of a call with all its rows :meth:`BackboneCall.rows` may have left too long, if any."""
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


def check_images(x: Any, modalities: Sequence[str]) -> None:
    """Check that every modality has a tensor whose values can be looked at, all with the same batch size."""
    if isinstance(x, Tensor) and unreadable(x):
        raise InputError(f"the input {unreadable(x)}")
    parts = split(x, modalities)
    problems = []
    for name, part in zip(modalities, parts, strict=True):
        if not isinstance(part, Tensor) or part.ndim < 2:
            problems.append(f"that of {name!r} is {describe(part)}, need a tensor (batch, channels, *spatial)")
        elif reason := unreadable(part):
            problems.append(f"that of {name!r} {reason}")
    sizes = [] if problems else [len(part) for part in parts]
    if len(set(sizes)) > 1:
        problems.append(f"the batch sizes of {tuple(modalities)} differ: {sizes}")
    raise_problems(problems, what="the input", error=InputError)


def split(x: Any, modalities: Sequence[str]) -> list[Tensor]:
    """Return the tensors (B, C_m, *spatial) of each modality, in the order of ``modalities``.

    Args:
        x: a tensor (B, M·C, *spatial) with the modalities one after the other along the channels, a list or
            tuple of M tensors, or a mapping from modality name to tensor.
        modalities: M names.
    """
    count = len(modalities)
    if isinstance(x, Tensor):
        if x.ndim < 3 or x.shape[1] % count:
            raise InputError(
                f"the input must have shape (batch, {count} × channels, *spatial) for modalities "
                f"{tuple(modalities)}, got {tuple(x.shape)}. Modalities with different numbers of channels need a "
                f"mapping by name, or BackboneSpec.fill_missing"
            )
        return list(x.chunk(count, dim=1))
    if isinstance(x, Mapping):
        absent = [name for name in modalities if name not in x]
        if absent:
            hints = "".join(suggest(name, map(str, x)) for name in absent[:1])
            raise InputError(f"the input mapping has no entry for {absent}.{hints}")
        return [x[name] for name in modalities]
    if isinstance(x, (list, tuple)) and len(x) == count and all(isinstance(part, Tensor) for part in x):
        return list(x)
    raise InputError(
        f"the input must be a tensor, a list of {count} tensors or a mapping by modality name, got "
        f"{type(x).__name__}. For anything else set BackboneSpec.fill_missing and BackboneSpec.forward_fn"
    )


def channel_share(x: Any, modalities: Sequence[str]) -> int:
    """Return how many channels of one tensor each modality is dealt; 0 for any other container."""
    return x.shape[1] // len(modalities) if isinstance(x, Tensor) and x.ndim >= 3 else 0


def join(parts: Sequence[Tensor], like: Any, modalities: Sequence[str]) -> Any:
    """Put the modalities back into a container of the same kind as ``like``; the inverse of :func:`split`."""
    if isinstance(like, Tensor):
        return torch.cat(list(parts), dim=1)
    if isinstance(like, Mapping):
        return {**like, **dict(zip(modalities, parts, strict=True))}
    return type(like)(parts)


def blank(x: Any, keep: Tensor, modalities: Sequence[str]) -> Any:
    """Return an input with every modality outside ``keep`` (bool (B, M)) set to zero; NaN in it disappears too."""
    if bool(keep.all()):
        return x
    parts = []
    for column, part in enumerate(split(x, modalities)):
        here = keep[:, column].to(part.device).view(-1, *[1] * (part.ndim - 1))
        parts.append(torch.where(here, part, torch.zeros((), dtype=part.dtype, device=part.device)))
    return join(parts, x, modalities)


def first_image(x: Any, modalities: Sequence[str]) -> Tensor | None:
    """Return the first tensor of an input; of a mapping that of a modality, where it has any: others may be there too.

    None where there is no tensor, such as in a container of the user's own.
    """
    if isinstance(x, Mapping):
        x = [x[name] for name in modalities if name in x] or list(x.values())
    return next((leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)), None)


def batch_size(x: Any, modalities: Sequence[str]) -> int:
    """Return the batch size of an input in any of the containers of :func:`split`."""
    first = first_image(x, modalities)
    if first is None or first.ndim == 0:
        raise InputError(f"cannot read a batch size off an input of type {type(x).__name__}")
    return first.shape[0]

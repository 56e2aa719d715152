"""The images of a batch, whatever container the backbone wants them in, modality by modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from passion_plugin.errors import InputError, raise_problems, suggest
from passion_plugin.validate import describe, unreadable

__all__ = ["batch_size", "blank", "channel_share", "check_images", "first_image", "join", "split"]


def check_images(x: Any, modalities: Sequence[str]) -> None:
    """Check that every modality has a tensor whose values can be looked at, all with the same batch size.

    Args:
        x: as for :func:`split`.
        modalities: names.

    Raises:
        InputError: listing every modality that has not.
    """
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
        modalities: names.

    Raises:
        InputError: when ``x`` does not hold one image for each modality.
    """
    count = len(modalities)
    if isinstance(x, Tensor):
        if x.ndim < 3 or x.shape[1] % count:
            raise InputError(
                f"the input must have shape (batch, {count} × channels, *spatial) for modalities "
                f"{tuple(modalities)}, got {tuple(x.shape)}. Modalities with different numbers of channels need a "
                f"mapping by name, or BackboneSpec.absent"
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
        f"{type(x).__name__}. For anything else set BackboneSpec.absent and BackboneSpec.call"
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
    """Set every modality that is not kept to zero, sample by sample; NaN in it disappears too.

    Args:
        x: the input, as for :func:`split`. Never written to.
        keep: bool (B, M).
        modalities: names.

    Returns:
        A container like ``x``; ``x`` itself when everything is kept.
    """
    if bool(keep.all()):
        return x
    parts = []
    for column, part in enumerate(split(x, modalities)):
        here = keep[:, column].to(part.device).view(-1, *[1] * (part.ndim - 1))
        parts.append(torch.where(here, part, torch.zeros((), dtype=part.dtype, device=part.device)))
    return join(parts, x, modalities)


def first_image(x: Any, modalities: Sequence[str]) -> Tensor | None:
    """Return the first tensor of an input; of a mapping that of a modality, where it has any: others may be there too.

    Args:
        x: as for :func:`split`, or a container of the user's own, in which nothing is found.
        modalities: names.
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

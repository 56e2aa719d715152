"""Subsets of modalities: their order, their names, their masks, and random ones for training."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from passion_plugin._validate import as_tuple, describe, is_one_of, modality_problems, require_choice
from passion_plugin.errors import ConfigError, InputError, raise_problems, suggest

UniformOver = Literal["subsets", "sizes"]

_MOST_MODALITIES = 16  # 65,535 subsets

_MOST_BITS = 62  # of a random number in int64


def all_subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Return all 2^M - 1 non-empty subsets, in the order that every table of this library uses.

    Smaller subsets first; within a size in the order of the M ``modalities`` (lexicographic by position).

    Raises:
        ConfigError: bad or repeated names, or more than 16 of them.

    Example:
        >>> all_subsets(("flair", "t1ce", "t2"))[2:5]
        [('t2',), ('flair', 't1ce'), ('flair', 't2')]
    """
    problems = modality_problems(modalities)
    if not problems and len(modalities) > _MOST_MODALITIES:
        problems.append(f"{len(modalities)} modalities have {2 ** len(modalities) - 1} subsets; list those you need")
    raise_problems(problems, what="all_subsets")
    return [subset for size in range(1, len(modalities) + 1) for subset in itertools.combinations(modalities, size)]


def subset_name(subset: Iterable[str]) -> str:
    """Return the name of a subset: its members joined by ``+``.

    Example:
        >>> subset_name(("flair", "t1ce"))
        'flair+t1ce'
    """
    return "+".join([subset] if isinstance(subset, str) else subset)


def parse_subset(subset: str | Iterable[str], modalities: Sequence[str]) -> tuple[str, ...]:
    """Return a subset as a tuple in the order of ``modalities``, whatever order it was given in.

    Args:
        subset: a name such as ``"flair+t1ce"``, or the member names.
        modalities: M names, in mask-column order. They may hold a ``+`` themselves.

    Returns:
        The members, without repetition, in mask-column order.

    Raises:
        ConfigError: an unknown or repeated member (with close matches), or no member.

    Example:
        >>> parse_subset("t1ce + flair", ("flair", "t1ce", "t1", "t2"))
        ('flair', 't1ce')
        >>> parse_subset("T1+C+T2", ("T1", "T1+C", "T2"))
        ('T1+C', 'T2')
    """
    raise_problems(modality_problems(modalities), what=f"subset {subset!r}")
    modalities = tuple(modalities)
    members = _members(subset, modalities) if isinstance(subset, str) else as_tuple(subset) or ()
    unknown = [name for name in members if not is_one_of(name, modalities)]
    problems = [f"unknown modality {name!r}.{suggest(str(name), modalities)}" for name in unknown]
    if not members:
        problems.append("it is empty; name at least one modality")
    repeated = [name for name, count in Counter(map(str, members)).items() if count > 1]
    if repeated:
        problems.append(f"{', '.join(map(repr, repeated))} is named more than once")
    raise_problems(problems, what=f"subset {subset!r}")
    return tuple(name for name in modalities if name in members)


def _members(subset: str, modalities: Sequence[str]) -> tuple[str, ...]:
    """Split a name at those ``+`` that join modalities; where that cannot be done, at every ``+``."""
    pieces = _pieces(subset)
    words = {_pieces(name): name for name in modalities}
    # The names that lead to each position. There is one way at most, see `modality_problems`.
    found: dict[int, tuple[str, ...]] = {0: ()}
    for end in range(1, len(pieces) + 1):
        for start in range(end):
            if start in found and pieces[start:end] in words:
                found[end] = (*found[start], words[pieces[start:end]])
    return found.get(len(pieces), pieces)


def _pieces(name: str) -> tuple[str, ...]:
    return tuple(piece.strip() for piece in name.split("+"))


def subset_mask(subset: str | Iterable[str], modalities: Sequence[str]) -> Tensor:
    """Return the mask of a subset, (M,) bool, True where the modality belongs to it.

    Args and errors are those of :func:`parse_subset`.

    Example:
        >>> subset_mask("t1ce+t2", ("flair", "t1ce", "t1", "t2")).tolist()
        [False, True, False, True]
    """
    names = parse_subset(subset, modalities)
    return torch.tensor([name in names for name in modalities])


def drop_modalities(
    presence: Tensor,
    *,
    generator: torch.Generator | None = None,
    uniform_over: UniformOver = "subsets",
) -> Tensor:
    """Keep a random non-empty subset of what each sample has, drawn anew at every call.

    On incomplete data this is the IDT-drop setting; on complete data (``presence`` all True) it is PDT.

    Args:
        presence: (B, M) bool, True = present, at least one per row.
        generator: source of randomness, on any device; the default one of the device otherwise.
        uniform_over: ``"subsets"``: each non-empty subset of the n available modalities has probability
            1 / (2^n - 1). ``"sizes"``: first the number of modalities, uniform in 1..n, then a subset of that
            size; single modalities and complete samples are seen more often.

    Returns:
        (B, M) bool on the device of ``presence``; never True where ``presence`` is False.

    Raises:
        InputError: wrong shape or dtype, or a row without any modality (looked at on the CPU only).
        ConfigError: unknown ``uniform_over``.

    Example:
        >>> presence = torch.tensor([[True, True, False], [False, True, False]])
        >>> drop_modalities(presence, generator=torch.Generator().manual_seed(2))
        tensor([[ True,  True, False],
                [False,  True, False]])
    """
    require_choice("uniform_over", uniform_over, get_args(UniformOver))
    if not isinstance(presence, Tensor) or presence.dtype != torch.bool or presence.ndim != 2:
        raise InputError(f"drop_modalities: presence is {describe(presence)}; pass torch.bool of shape (B, M)")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ConfigError(f"drop_modalities: generator is {describe(generator)}; pass a torch.Generator or None")
    if presence.device.type == "cpu" and (rows := (~presence.any(1)).nonzero().flatten().tolist()):
        raise InputError(f"drop_modalities: no modality at all in rows {rows}; drop such samples from the data")
    source = presence.device if generator is None else generator.device
    batch, size = presence.shape
    # Integers are exact and exist on every device.
    draw = torch.randint(2**_MOST_BITS, (batch, 1), generator=generator, device=source).to(presence.device)
    available = presence.sum(1, keepdim=True).clamp(min=1)
    if uniform_over == "sizes":
        order = torch.rand(batch, size, generator=generator, device=source).to(presence.device)
        ranks = order.masked_fill(~presence, 2).argsort(1).argsort(1)
        return presence & (ranks <= draw % available)
    # Bit k of the code says whether the k-th available modality is kept; a code of 0 would keep none.
    code = 1 + draw % ((1 << available.clamp(max=_MOST_BITS)) - 1)
    position = (presence.long().cumsum(1) - 1).clamp(min=0)
    kept = ((code >> position.clamp(max=_MOST_BITS)) & 1).bool()
    if size > _MOST_BITS:  # a coin for each of the others; to keep none of the first 62 has a chance of 2^-62
        coins = torch.randint(2, (batch, size), generator=generator, device=source).to(presence.device).bool()
        kept |= coins & (position >= _MOST_BITS)
    return presence & kept

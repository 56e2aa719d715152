"""Pieces of the relative preference that keep no state: input checks, projection of beta, report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from passion_plugin.errors import ConfigError, InputError, raise_problems, suggest
from passion_plugin.plain_values import members

__all__ = ["Preference", "presence_counts_of", "project_beta", "usable_distances"]


@dataclass(frozen=True, eq=False)
class Preference:
    """What one epoch said about the modalities. All tensors are float64, on the CPU, of shape (M,).

    Attributes:
        modalities: names, in mask-column order.
        epoch: number of the epoch that ended, from 0.
        beta: weights for the next epoch.
        relative_preference: 1 - distance / mean distance; negative where a modality lags behind, 0 where
            nothing was measured.
        distance: mean prototype distance of the epoch; NaN where nothing was measured.
        counts: number of distances that went into the mean. All zero: the epoch was empty, beta unchanged.
        eta: step size that was used.
        skipped: number of distances, or scores of other rules, that were left out because they were NaN or infinite;
            None where that was not counted. A training resumed within the epoch counts from there on.
    """

    modalities: tuple[str, ...]
    epoch: int
    beta: Tensor
    relative_preference: Tensor
    distance: Tensor
    counts: Tensor
    eta: float = math.nan
    skipped: Tensor | None = None

    @property
    def empty(self) -> bool:
        """True when the epoch held no usable distance at all."""
        return not bool(self.counts.any())

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Return plain numbers by modality name, for loggers.

        Returns:
            ``{name: {"beta": ..., "relative_preference": ..., "distance": ..., "count": ...}}``.
        """
        columns = (self.beta, self.relative_preference, self.distance, self.counts)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        keys = ("beta", "relative_preference", "distance", "count")
        return {name: dict(zip(keys, row, strict=True)) for name, row in zip(self.modalities, rows, strict=True)}

    def __str__(self) -> str:
        """Return a table with one line per modality."""
        width = max(len("modality"), *(len(name) for name in self.modalities))
        title = f"epoch {self.epoch}" + (" (empty: beta unchanged)" if self.empty else "")
        lines = [title, f"{'modality':<{width}}  {'beta':>7}  {'RP':>8}  {'distance':>9}  {'samples':>7}"]
        lines += [
            f"{name:<{width}}  {row['beta']:7.4f}  {row['relative_preference']:+8.4f}  "
            f"{row['distance']:9.6f}  {row['count']:7.0f}"
            for name, row in self.as_dict().items()
        ]
        return "\n".join(lines)


def project_beta(beta: Tensor, *, norm: float, minimum: float) -> Tensor:
    r"""Rescale weights to a given Euclidean norm without letting any fall below a minimum.

    .. math::
        \beta'_m = \max(s\, \beta_m,\ \beta_{min}), \qquad
        s > 0 \text{ such that } \lVert \beta' \rVert_2 = norm

    The norm of the right-hand side grows with ``s``, so there is one solution: components that plain
    rescaling would push below the minimum are fixed at it and the others are rescaled to what is left, again
    until none is below. Applied twice it changes nothing more. (The published code only rescales, and may
    end below.)

    Args:
        beta: (M,) float64, all positive.
        norm: wanted norm, at least ``sqrt(M) * minimum``.
        minimum: smallest component, positive.

    Returns:
        (M,) new tensor.

    Raises:
        ConfigError: ``norm`` is too small for M components of at least ``minimum``, or beta is not positive.

    Example:
        >>> projected = project_beta(torch.tensor([0.1, 3.0, 4.0]), norm=3**0.5, minimum=0.1)
        >>> [round(value, 4) for value in projected.tolist()]
        [0.1, 1.0375, 1.3833]
    """
    size = len(beta)
    if not bool((beta > 0).all()) or norm**2 < size * minimum**2 * (1 - 1e-12):
        raise ConfigError(
            f"project_beta: beta={beta.tolist()}, norm={norm}, minimum={minimum}: need positive beta and a "
            f"norm of at least sqrt({size}) * minimum"
        )
    fixed = torch.zeros_like(beta, dtype=torch.bool)
    scaled = beta
    for _ in range(size):
        left = max(norm**2 - minimum**2 * int(fixed.sum()), 0.0)
        scaled = beta * math.sqrt(left / float(beta[~fixed].square().sum()))
        below = ~fixed & (scaled < minimum)
        if not below.any() or (fixed | below).all():
            break
        fixed = fixed | below
    return torch.where(fixed, minimum, scaled.clamp(min=minimum))


def usable_distances(distance: Tensor, presence: Tensor, modalities: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Check one batch of distances and blank what is absent or not finite.

    Args:
        distance: (B, M) floating point.
        presence: (B, M) bool, True = present.
        modalities: the M names.

    Returns:
        ``(distance, presence, usable)``, (B, M), on the device of ``distance``: at least float32 with zeros
        where unusable; bool as given; bool, present and finite.

    Raises:
        InputError: wrong shape or dtype; a sample without any modality, where ``presence`` is on the CPU.
    """
    size = len(modalities)
    problems = []
    if distance.ndim != 2 or distance.shape[1] != size or not distance.is_floating_point():
        problems.append(
            f"distance is {_describe(distance)}; pass a floating-point tensor of shape (B, {size}), one "
            f"column for each of {modalities}"
        )
    if presence.dtype != torch.bool or presence.ndim != 2 or presence.shape[1] != size:
        problems.append(
            f"presence is {_describe(presence)}; pass a torch.bool tensor of shape (B, {size}), True = "
            "present" + ("" if presence.dtype == torch.bool else " (presence.bool() converts a 0/1 mask)")
        )
    elif not problems and presence.shape != distance.shape:
        problems.append(
            f"presence is {_describe(presence)} but distance is {_describe(distance)}; pass both for the same samples"
        )
    # Looking at values on an accelerator would wait for it; an empty row is harmless there, it never counts.
    elif presence.device.type == "cpu" and not torch.compiler.is_compiling():
        empty = (~presence.any(1)).nonzero().flatten().tolist()
        if empty:
            problems.append(
                f"presence has no modality at all in row {', '.join(map(str, empty))}; a sample needs at "
                "least one, drop such samples from the data"
            )
    raise_problems(problems, what="relative preference", error=InputError)
    if distance.dtype in (torch.float16, torch.bfloat16):
        distance = distance.float()
    # Not waiting is safe towards an accelerator only; towards the CPU the values would not be there yet.
    presence = presence.to(distance.device, non_blocking=distance.device.type != "cpu")
    usable = presence & torch.isfinite(distance)
    return torch.where(usable, distance, 0), presence, usable


def presence_counts_of(
    counts: Mapping[str, float] | Iterable[float], modalities: tuple[str, ...], problems: list[str]
) -> Tensor | None:
    """Return numbers of training samples as (M,) float64; what is wrong is appended to ``problems``."""
    if isinstance(counts, Mapping):
        unknown = [name for name in counts if name not in modalities]
        lacking = [name for name in modalities if name not in counts]
        problems += [f"presence_counts: unknown {name!r}.{suggest(name, modalities)}" for name in unknown]
        problems += [f"presence_counts: no number for modality {name!r}" for name in lacking]
        if unknown or lacking:
            return None
        counts = [counts[name] for name in modalities]
    numbers: Sequence[Any] = members(counts) or [counts]
    try:
        values = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        problems.append(f"presence_counts={counts!r}: need a number for each of {modalities}")
        return None
    if values.shape != (len(modalities),):
        problems.append(f"presence_counts has {len(values)} numbers; need one for each of {modalities}")
    elif not bool((torch.isfinite(values) & (values > 0)).all()):
        problems.append(
            f"presence_counts={values.tolist()}: need positive numbers; leave out a modality that nobody has"
        )
    return values


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

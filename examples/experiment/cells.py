"""The cells of an experiment: one training each, in an order of which every beginning is balanced."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from passion_plugin.errors import ConfigError, suggest

__all__ = ["Cell", "assignments", "grid", "parse_rates", "shard"]


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        backbone: name of the network.
        assignment: nominal missing rates, such as ``"ct=0.2,pet=0.8,t1=0.5"``.
        fold: test fold.
        seed: of initial weights, of batches and of what is missing.
        batch_size: patches or slices per step.
        strategy: name of a recipe.
    """

    backbone: str
    assignment: str
    fold: int
    seed: int
    batch_size: int
    strategy: str

    @property
    def block(self) -> tuple[str, str, int, int, int]:
        """All but the strategy: cells of one block are compared with each other."""
        return self.backbone, self.assignment, self.fold, self.seed, self.batch_size

    @property
    def rates(self) -> dict[str, float]:
        """Nominal missing rate by modality."""
        return {name: float(rate) for name, _, rate in (part.partition("=") for part in self.assignment.split(","))}

    @property
    def key(self) -> str:
        """A name for files; the digest tells apart what looks alike after the replacement of odd characters."""
        text = "_".join(map(str, (*self.block, self.strategy)))
        digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:8]
        return f"{re.sub(r'[^a-zA-Z0-9=@.-]+', '_', text)[:100]}_{digest}"


def parse_rates(text: str, modalities: Sequence[str]) -> dict[str, float]:
    """Read missing rates, ``".2,.8,.5"`` in the order of ``modalities`` or ``"ct=.2,pet=.8,t1=.5"``.

    Raises:
        ConfigError: they are no numbers or not those of ``modalities``.
    """
    parts = text.split(",")
    named = [tuple(part.strip() for part in part.partition("=")) for part in parts]
    wanted = f"give one number for each of {', '.join(modalities)}"
    if not all(equals for _, equals, _ in named):
        named = [(name, "=", part) for name, part in zip(modalities, parts, strict=False)]
        if len(parts) != len(modalities) or "=" in text:
            raise ConfigError(f"rates {text!r}: {wanted}, in this order or all with their names")
    names = [name for name, _, _ in named]
    for name in names:
        if name not in modalities:
            raise ConfigError(f"rates {text!r}: unknown modality {name!r}.{suggest(name, modalities)}")
    if sorted(names) != sorted(modalities):
        raise ConfigError(f"rates {text!r}: {wanted}, each once")
    try:
        rates = {name: float(rate) for name, _, rate in named}
    except ValueError as error:
        raise ConfigError(f"rates {text!r}: {error}; {wanted}") from error
    return {name: rates[name] for name in modalities}


def assignments(rates: Sequence[Mapping[str, float]], *, permuted: bool) -> list[str]:
    """Rates as text, as they are or in every order of the modalities, each once."""
    found = [
        dict(zip(each, values, strict=True))
        for each in rates
        for values in (itertools.permutations(each.values()) if permuted else [tuple(each.values())])
    ]
    return list(dict.fromkeys(",".join(f"{name}={rate:g}" for name, rate in each.items()) for each in found))


def grid(
    *,
    backbones: Sequence[str],
    assignments: Sequence[str],
    folds: Sequence[int],
    seeds: Sequence[int],
    batch_sizes: Sequence[int],
    strategies: Sequence[str],
) -> list[Cell]:
    """All cells. Strategies change fastest, so that what is finished is paired; then backbones and assignments."""
    return [
        Cell(backbone, assignment, fold, seed, batch_size, strategy)
        for seed in seeds
        for fold in folds
        for assignment in assignments
        for backbone in backbones
        for batch_size in batch_sizes
        for strategy in strategies
    ]


def shard(cells: Sequence[Cell], part: int, parts: int) -> list[Cell]:
    """The cells of every ``parts``-th draw of what is missing, beginning with number ``part`` (from 1).

    Each part has all networks and strategies, so that parts take about as long as each other.
    """
    draws = [(cell.seed, cell.fold, cell.assignment) for cell in cells]
    numbers = {draw: number for number, draw in enumerate(dict.fromkeys(draws))}
    return [cell for cell, draw in zip(cells, draws, strict=True) if numbers[draw] % parts == part - 1]

"""How frequent each modality is in the training set, from a presence table or from missing rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from passion_plugin._validate import as_tuple, is_number, modality_problems
from passion_plugin.errors import ConfigError, raise_problems, suggest


@dataclass(frozen=True)
class ModalityFrequencies:
    r"""Frequencies of the modalities and the rarity weights :math:`w_m = N / N_m = 1 / (1 - MR_m)`.

    Attributes:
        weights: w, (M,).
        counts: :math:`N_m`, samples that have each modality; None when only rates are known.
        samples: N; None when only rates are known.

    Example:
        >>> ModalityFrequencies.of(("t1", "t2"), missing_rates={"t1": 0.2, "t2": 0.5}).weights
        (1.25, 2.0)
    """

    weights: tuple[float, ...]
    counts: tuple[int, ...] | None
    samples: int | None

    @classmethod
    def of(cls, modalities: Sequence[str], presence: Any = None, missing_rates: Any = None) -> ModalityFrequencies:
        """Build from exactly one of the two descriptions of the training set.

        Args:
            modalities: M names.
            presence: a :class:`~passion_plugin.data.PresenceTable`, or a bool array or tensor (N, M) with a
                column for each name, True = present.
            missing_rates: rate in [0, 1) by name, or M rates in the order of ``modalities``.

        Raises:
            ConfigError: bad names, both or neither given, or listing everything that is wrong with the one given.
        """
        raise_problems(modality_problems(modalities), what="ModalityFrequencies")
        if (presence is None) == (missing_rates is None):
            raise ConfigError(
                "say how rare the modalities are with either presence= (a table or a bool array (N, M) of the "
                "training set) or missing_rates= ({'t1': 0.2, …}); "
                f"{'neither' if presence is None else 'both'} was given"
            )
        if presence is not None:
            return cls._of_table(modalities, presence)
        rates, problems = values_by_modality(missing_rates, modalities)
        problems += [f"rate {rate!r} is not in [0, 1)" for rate in rates if not is_number(rate, least=0, below=1)]
        raise_problems(problems, what="missing_rates")
        return cls(tuple(1 / (1 - float(rate)) for rate in rates), None, None)

    @classmethod
    def _of_table(cls, modalities: Sequence[str], presence: Any) -> ModalityFrequencies:
        names = tuple(getattr(presence, "modalities", modalities))
        values = getattr(presence, "presence", presence)
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        if sorted(names) != sorted(modalities):
            raise ConfigError(f"the presence table is for {names}, the wrapper for {tuple(modalities)}")
        if array.ndim != 2 or array.shape[1] != len(names) or array.dtype != np.bool_ or not len(array):
            raise ConfigError(
                f"presence must be a bool array (N, {len(names)}) with True = present, got shape {array.shape} "
                f"and dtype {array.dtype}"
            )
        array = array[:, [names.index(name) for name in modalities]]
        counts = array.sum(0)
        problems = [
            f"modality {name!r} is never present: leave it out of modalities="
            for name, count in zip(modalities, counts, strict=True)
            if not count
        ]
        empty = np.flatnonzero(~array.any(1)).tolist()
        if empty:
            problems.append(f"{len(empty)} sample(s) have no modality at all, such as {empty[:5]}: leave them out")
        raise_problems(problems, what="presence")
        return cls(tuple(float(len(array) / n) for n in counts), tuple(int(n) for n in counts), len(array))


def values_by_modality(values: Any, modalities: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Return one value for each modality, of a mapping by name or of a sequence in their order, and what is wrong.

    Example:
        >>> values_by_modality({"t2": 0.5, "t1": 0.2}, ("t1", "t2"))
        ([0.2, 0.5], [])
    """
    wanted = f"one for each of {tuple(modalities)}, by name or in order"
    if isinstance(values, Mapping):
        unknown = [name for name in values if name not in modalities]
        missing = [name for name in modalities if name not in values]
        problems = [f"unknown modality {name!r}.{suggest(str(name), modalities)}" for name in unknown]
        problems += [f"none for modality {name!r}" for name in missing]
        return [values[name] for name in modalities if name in values], problems
    listed = as_tuple(values.tolist() if isinstance(values, Tensor) else values)
    if listed is None:
        return [], [f"got {values!r}, need {wanted}"]
    return list(listed), [] if len(listed) == len(modalities) else [f"got {len(listed)}, need {wanted}"]

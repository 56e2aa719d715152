"""Drawing of presence tables with given missing rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passion_plugin._validate import as_tuple, is_int, is_number
from passion_plugin.data._presence import PresenceTable, default_ids
from passion_plugin.data._subsets import modality_problems
from passion_plugin.errors import ConfigError, raise_problems, suggest

__all__ = ["draw_presence"]

_MOST_SAMPLES = 10_000_000


def draw_presence(
    samples: int | Iterable[str],
    rates: Mapping[str, float],
    *,
    seed: int,
    modalities: Sequence[str] | None = None,
) -> PresenceTable:
    r"""Draw who misses what, with exact missing rates and at least one modality for every sample.

    Modality m is missing in exactly :math:`\mathrm{round}(r_m N)` samples, drawn independently of the other
    modalities. Samples that end up with nothing are then repaired by exchange: a modality is taken from a
    random sample that has at least two and given to the empty one, which leaves the numbers as they are.
    (Redrawing empty samples, as is usual, makes the real rates lower than the nominal ones.) Where rounding
    would leave no sample with a modality, or fewer entries than samples, the numbers give way by as
    little as possible; real rates are within 1 / N of the nominal ones, and ``describe()`` reports both.

    Args:
        samples: ids of the samples, or their number.
        rates: nominal missing rate by modality, each in [0, 1). The order of the names is the order of the
            mask columns unless ``modalities`` says otherwise.
        seed: seed of ``numpy.random.default_rng``; same arguments, same table.
        modalities: order of the mask columns.

    Returns:
        The table, with ``nominal_rates`` and ``seed`` set.

    Raises:
        ConfigError: a rate outside [0, 1), names that do not match, or rates that sum to more than M - 1:
            then some sample has nothing, whatever is drawn.

    Example:
        >>> table = draw_presence(10, {"flair": 0.2, "t1ce": 0.4, "t1": 0.6, "t2": 0.8}, seed=0)
        >>> table.counts
        {'flair': 8, 't1ce': 6, 't1': 4, 't2': 2}
        >>> bool(table.presence.any(axis=1).all())
        True
    """
    if not isinstance(rates, Mapping) or not rates:
        raise ConfigError(f"draw_presence: rates={rates!r}; pass a rate for each modality, {{'t1': 0.2, …}}")
    # Collected before they are checked: an iterator gives its items once.
    columns: Any = as_tuple(rates if modalities is None else modalities)
    problems = modality_problems(modalities if columns is None else columns)  # type: ignore[arg-type]
    columns = columns or ()
    problems += [
        f"rates: unknown modality {name!r}.{suggest(str(name), columns)}" for name in rates if name not in columns
    ]
    problems += [f"rates: no rate for modality {name!r}" for name in columns if name not in list(rates)]
    problems += [
        f"rates[{name!r}]={rate!r}: need a number in [0, 1)"
        + ("; leave out a modality that nobody has" if is_number(rate, least=1, most=1) else "")
        for name, rate in rates.items()
        if not is_number(rate, least=0, below=1)
    ]
    if isinstance(samples, str):
        problems.append(f"samples={samples!r} is one string; pass a list of ids or their number")
    if is_int(samples, least=_MOST_SAMPLES + 1):
        problems.append(f"samples={samples!r}: more than {_MOST_SAMPLES}; pass their ids")
        samples = 1
    ids = default_ids(int(samples)) if is_int(samples, least=0) else as_tuple(samples) or ()  # type: ignore[arg-type]
    if not ids and not isinstance(samples, str):
        problems.append(f"samples={samples!r}: need at least one sample")
    if not is_int(seed, least=0):
        problems.append(f"seed={seed!r}: pass a whole number, 0 or more, so that the draw can be repeated")
    if not problems and math.fsum(rates.values()) > len(columns) - 1 + 1e-9:
        problems.append(
            f"the rates sum to {math.fsum(rates.values()):g}, but at most {len(columns) - 1} (M - 1) is "
            "possible if every sample keeps at least one modality; lower some rate"
        )
    raise_problems(problems, what="draw_presence")
    rates = {name: float(rates[name]) for name in columns}
    generator = np.random.default_rng(seed)
    presence = np.ones((len(ids), len(columns)), dtype=np.bool_)
    for column, missing in enumerate(_missing_counts([rates[name] for name in columns], len(ids))):
        presence[generator.permutation(len(ids))[:missing], column] = False
    _repair(presence, generator)
    return PresenceTable(ids, columns, presence, rates, int(seed))


def _missing_counts(rates: Sequence[float], count: int) -> list[int]:
    """Return how many samples miss each modality: rounded, but never all, and feasible together."""
    exact = [rate * count for rate in rates]
    missing = [min(math.floor(value + 0.5), count - 1) for value in exact]
    # Feasible: present entries >= samples. Rounding up can break it by a few; undo the largest round-ups.
    while sum(missing) > (len(rates) - 1) * count:
        most = max(range(len(rates)), key=lambda column: missing[column] - exact[column])
        missing[most] -= 1
    return missing


def _repair(presence: NDArray[np.bool_], generator: np.random.Generator) -> None:
    """Give every empty row one entry of a row that has several, in place; column sums stay."""
    for empty in generator.permutation(np.flatnonzero(~presence.any(axis=1))):
        # There is a donor: at least as many entries as rows, and this row has none.
        donors = np.argwhere(presence & (presence.sum(axis=1, keepdims=True) > 1))
        donor, column = donors[generator.integers(len(donors))]
        presence[donor, column] = False
        presence[empty, column] = True

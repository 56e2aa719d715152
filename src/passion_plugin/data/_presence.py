"""Presence tables: which sample has which modality, from a file or drawn with given missing rates."""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from passion_plugin._validate import as_tuple, is_int, is_number, modality_problems
from passion_plugin.data._csv import read_rows
from passion_plugin.errors import ConfigError, raise_problems, shortlist, suggest

_TITLE = "passion-plugin presence table 1"

_MOST_SAMPLES = 10_000_000  # whose ids are made up: more would be a mistake, and fill the memory


@dataclass(frozen=True, eq=False)
class PresenceTable:
    """Which of N samples has which of M modalities; checked on construction, read-only afterwards.

    Attributes:
        sample_ids: N distinct names, in data-set order.
        modalities: M distinct names, in mask-column order.
        presence: (N, M) numpy bool, True = present. Every row and every column has at least one True.
        nominal_rates: missing rate that was asked for, by modality, if the table was drawn; else None.
        seed: seed the table was drawn with; else None.

    Raises:
        ConfigError: listing all problems: wrong shape or dtype, repeated or empty ids, samples without any
            modality, modalities that no sample has.

    Example:
        >>> table = PresenceTable(("p1", "p2"), ("flair", "t1ce"), np.array([[True, True], [True, False]]))
        >>> table.missing_rates
        {'flair': 0.0, 't1ce': 0.5}
        >>> table["p2"]
        array([ True, False])
    """

    sample_ids: tuple[str, ...]
    modalities: tuple[str, ...]
    presence: NDArray[np.bool_]
    nominal_rates: Mapping[str, float] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check everything, then freeze a private copy."""
        # Collected before they are checked: an iterator gives its items once.
        ids, modalities = as_tuple(self.sample_ids), as_tuple(self.modalities)
        problems = modality_problems(self.modalities if modalities is None else modalities)
        problems += [f"sample_ids={self.sample_ids!r}; pass a list of names"] if ids is None else _id_problems(ids)
        presence = np.array(self.presence)
        if ids is None or modalities is None:
            raise_problems(problems, what="PresenceTable")
            return
        if presence.dtype != np.bool_ or presence.shape != (len(ids), len(modalities)):
            problems.append(
                f"presence is {presence.dtype} of shape {presence.shape}; pass bool, True = present, of shape "
                f"({len(ids)}, {len(modalities)}): one row for each sample, one column for each modality"
            )
        elif ids:
            nothing = [ids[row] for row in np.flatnonzero(~presence.any(axis=1))]
            never = [modalities[column] for column in np.flatnonzero(~presence.any(axis=0))]
            if nothing:
                count = len(nothing)
                problems.append(f"{count} samples have no modality at all ({shortlist(nothing)}); leave them out")
            if never:
                problems.append(f"no sample has modality {shortlist(never)}; leave it out of the modalities")
        rates = self.nominal_rates
        if rates is not None and (
            not isinstance(rates, Mapping)
            or set(map(str, rates)) != set(map(str, modalities))
            or not all(is_number(rate, least=0, most=1) for rate in rates.values())
        ):
            problems.append(f"nominal_rates is {rates!r}; need a rate in 0..1 for each of {modalities}")
        if self.seed is not None and not is_int(self.seed, least=0):
            problems.append(f"seed is {self.seed!r}; need a whole number, 0 or more")
        raise_problems(problems, what="PresenceTable")
        presence.setflags(write=False)
        plain = None if rates is None else {name: float(rates[name]) for name in modalities}
        checked = {"sample_ids": ids, "modalities": modalities, "presence": presence, "nominal_rates": plain}
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_array(
        cls, presence: ArrayLike, modalities: Sequence[str], sample_ids: Iterable[str] | None = None
    ) -> PresenceTable:
        """Build a table from a bool or 0/1 array.

        Args:
            presence: (N, M) bool or 0/1 numbers; a CPU tensor will do.
            modalities: M names, in column order.
            sample_ids: N names; ``"0"``, ``"1"``, … by default.

        Returns:
            The table.

        Raises:
            ConfigError: as the class, or an entry other than 0 and 1.
        """
        array = np.asarray(presence)
        if array.ndim != 2:
            raise ConfigError(f"PresenceTable.from_array: presence has shape {array.shape}, need two axes (N, M)")
        if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
            raise ConfigError("PresenceTable.from_array: entries other than 0 and 1; pass bool, True = present")
        ids = tuple(map(str, range(len(array)))) if sample_ids is None else sample_ids
        return cls(ids, modalities, array.astype(np.bool_))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sample_ids)

    def __contains__(self, sample_id: object) -> bool:
        return isinstance(sample_id, str) and sample_id in self._rows

    def __getitem__(self, sample_id: str) -> NDArray[np.bool_]:
        """Return the (M,) bool row of a sample, by its id. By position: ``table.presence[index]``."""
        return self.presence[self.index(sample_id)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PresenceTable):
            return NotImplemented
        names = ("sample_ids", "modalities", "nominal_rates", "seed")
        same = all(getattr(self, name) == getattr(other, name) for name in names)
        return same and np.array_equal(self.presence, other.presence)

    __hash__ = None  # type: ignore[assignment]

    @property
    def counts(self) -> dict[str, int]:
        """Number of samples that have each modality, N_m."""
        return dict(zip(self.modalities, self.presence.sum(axis=0).tolist(), strict=True))

    @property
    def missing_rates(self) -> dict[str, float]:
        """Real missing rate of each modality, 1 - N_m / N."""
        return {name: 1 - count / len(self) for name, count in self.counts.items()}

    def index(self, sample_id: str) -> int:
        """Return the row number of a sample.

        Raises:
            ConfigError: no such sample; the message has close matches.
        """
        if sample_id not in self:
            raise ConfigError(
                f"PresenceTable: no sample {shortlist([sample_id])}.{suggest(str(sample_id), self.sample_ids)}"
            )
        return self._rows[sample_id]

    def select(self, sample_ids: Iterable[str]) -> PresenceTable:
        """Return the table of some samples, in the order given (a fold, a data set in another order).

        Raises:
            ConfigError: an unknown id, or what the class refuses, such as a modality nobody is left with.
        """
        ids = as_tuple(sample_ids)
        if ids is None:
            raise ConfigError(f"PresenceTable.select: sample_ids={sample_ids!r}; pass a list of ids")
        rows = [self.index(sample_id) for sample_id in ids]
        return PresenceTable(ids, self.modalities, self.presence[rows], self.nominal_rates, self.seed)

    def describe(self) -> str:
        """Return a readable table: nominal and real missing rate and number of samples, by modality."""
        width = max(len("modality"), *(len(name) for name in self.modalities))
        seed = "" if self.seed is None else f", seed {self.seed}"
        lines = [
            f"{len(self)} samples, {len(self.modalities)} modalities{seed}",
            f"{'modality':<{width}}  nominal   real  present",
        ]
        for name, count in self.counts.items():
            nominal = "-" if self.nominal_rates is None else f"{self.nominal_rates[name]:.3f}"
            lines.append(f"{name:<{width}}  {nominal:>7}  {self.missing_rates[name]:.3f}  {count:>7}")
        available = self.presence.sum(axis=1)
        lines.append(
            f"complete: {int((available == len(self.modalities)).sum())}, "
            f"with a single modality: {int((available == 1).sum())}"
        )
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a CSV file: comment lines with ``#``, header ``sample_id,<modalities>``, rows of 0 and 1."""
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(f"# {_TITLE}\n")
            if self.nominal_rates is not None:
                rates = ",".join(f"{name}={rate!r}" for name, rate in self.nominal_rates.items())
                file.write(f"# nominal_rates: {rates}\n")
            if self.seed is not None:
                file.write(f"# seed: {self.seed}\n")
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("sample_id", *self.modalities))
            writer.writerows((name, *row) for name, row in zip(self.sample_ids, self.presence.astype(int), strict=True))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PresenceTable:
        """Read what :meth:`save` wrote, or a CSV file written by hand with the same header and 0/1 entries.

        Raises:
            ConfigError: listing all problems with line numbers.
        """
        comments, rows, problems = read_rows(path)
        header = rows[0][1] if rows else []
        if len(header) < 2 or header[0] != "sample_id":
            problems.append(f"the header is {shortlist(header)}; need sample_id,<modality>,<modality>,…")
            raise_problems(problems, what=os.fspath(path))
        modalities = [name.strip() for name in header[1:]]
        ids, values = [], []
        for line, (sample_id, *cells) in rows[1:]:
            if len(cells) != len(modalities) or any(cell.strip() not in ("0", "1") for cell in cells):
                problems.append(f"line {line}: {shortlist(cells)}; need {len(modalities)} entries, each 0 or 1")
            ids.append(sample_id)
            values.append([cell.strip() == "1" for cell in cells])
        rates, seed = _parse_comments(comments, problems)
        raise_problems(problems, what=os.fspath(path))
        try:
            return cls(ids, modalities, np.array(values, dtype=np.bool_), rates, seed)  # type: ignore[arg-type]
        except ConfigError as error:
            raise ConfigError(f"{os.fspath(path)}: {error}") from None

    @cached_property
    def _rows(self) -> dict[str, int]:
        """Row numbers by id."""
        return {sample_id: row for row, sample_id in enumerate(self.sample_ids)}


def _id_problems(ids: tuple[Any, ...]) -> list[str]:
    problems = [] if ids else ["there is no sample"]
    odd = [name for name in ids if not isinstance(name, str) or not name.strip() or not name.isprintable()]
    if odd:
        problems.append(f"sample ids must be non-empty printable strings; found {shortlist(odd)}")
    repeated = sorted(name for name, count in Counter(map(str, ids)).items() if count > 1)
    if repeated:
        problems.append(f"sample ids that occur more than once: {shortlist(repeated)}")
    return problems


def _parse_comments(
    comments: Sequence[tuple[int, str]], problems: list[str]
) -> tuple[dict[str, float] | None, int | None]:
    """Read nominal rates and seed from the comment lines; all other comments are the user's own."""
    rates: dict[str, float] | None = None
    seed: int | None = None
    for line, comment in comments:
        key, _, value = (part.strip() for part in comment.partition(":"))
        try:
            if key == "seed":
                seed = int(value)
            elif key == "nominal_rates":
                pairs = [pair.rpartition("=")[::2] for pair in value.split(",")]
                rates = {name.strip(): float(number) for name, number in pairs}
        except ValueError as error:
            problems.append(f"line {line}: {key}: {error}")
    return rates, seed


def draw_presence(
    samples: int | Iterable[str],
    rates: Mapping[str, float],
    *,
    seed: int,
    modalities: Sequence[str] | None = None,
) -> PresenceTable:
    r"""Draw who misses what, with exact missing rates and at least one modality for every sample.

    Modality m is missing in exactly :math:`\mathrm{round}(r_m N)` samples, drawn independently of the other modalities.
    A sample that ends up with nothing gets a modality of a random sample that has at least two, which leaves the
    numbers as they are. (Redrawing empty samples would make the real rates lower than the nominal ones.) Where rounding
    would leave no sample with a modality, or fewer entries than samples, the numbers give way by as little as possible;
    real rates are within 1 / N of the nominal ones, and ``describe()`` reports both.

    Args:
        samples: ids of the samples, or their number.
        rates: nominal missing rate by modality, each in [0, 1).
        seed: seed of ``numpy.random.default_rng``; same arguments, same table.
        modalities: order of the mask columns; that of ``rates`` by default.

    Returns:
        The table, with ``nominal_rates`` and ``seed`` set.

    Raises:
        ConfigError: a rate outside [0, 1), names that do not match, or rates that sum to more than M - 1, with which
            some sample would have nothing.

    Example:
        >>> table = draw_presence(10, {"flair": 0.2, "t1ce": 0.4, "t1": 0.6, "t2": 0.8}, seed=0)
        >>> table.counts
        {'flair': 8, 't1ce': 6, 't1': 4, 't2': 2}
    """
    if not isinstance(rates, Mapping) or not rates:
        raise ConfigError(f"draw_presence: rates={rates!r}; pass a rate for each modality, {{'t1': 0.2, …}}")
    # Collected before they are checked: an iterator gives its items once.
    names = as_tuple(rates if modalities is None else modalities) or ()
    problems = modality_problems(names or modalities)
    problems += [f"rates: unknown modality {name!r}.{suggest(str(name), names)}" for name in rates if name not in names]
    problems += [f"rates: no rate for modality {name!r}" for name in names if name not in list(rates)]
    for name, rate in rates.items():
        if not is_number(rate, least=0, below=1):
            hint = "; leave out a modality that nobody has" if is_number(rate, least=1, most=1) else ""
            problems.append(f"rates[{name!r}]={rate!r}: need a number in [0, 1){hint}")
    if is_int(samples, least=_MOST_SAMPLES + 1):
        problems.append(f"samples={samples!r}: more than {_MOST_SAMPLES}; pass their ids")
        samples = 1
    listed = range(int(samples)) if is_int(samples, least=0) else samples  # type: ignore[arg-type]
    ids = tuple(map(str, listed)) if isinstance(listed, range) else as_tuple(listed) or ()
    if not ids:
        problems.append(f"samples={samples!r}: pass a list of ids or their number, at least one")
    if not is_int(seed, least=0):
        problems.append(f"seed={seed!r}: pass a whole number, 0 or more, so that the draw can be repeated")
    if not problems and math.fsum(rates.values()) > len(names) - 1 + 1e-9:
        problems.append(
            f"the rates sum to {math.fsum(rates.values()):g}, but at most {len(names) - 1} (M - 1) is "
            "possible if every sample keeps at least one modality; lower some rate"
        )
    raise_problems(problems, what="draw_presence")
    rates = {name: float(rates[name]) for name in names}
    generator = np.random.default_rng(seed)
    presence = np.ones((len(ids), len(names)), dtype=np.bool_)
    for column, missing in enumerate(_missing_counts(list(rates.values()), len(ids))):
        presence[generator.permutation(len(ids))[:missing], column] = False
    _repair(presence, generator)
    return PresenceTable(ids, names, presence, rates, int(seed))


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

"""Presence tables: which sample has which modality."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from passion_plugin._validate import as_tuple, is_int, is_number
from passion_plugin.data._reading import read_rows, shorten, shortlist
from passion_plugin.data._subsets import modality_problems
from passion_plugin.errors import ConfigError, raise_problems, suggest

__all__ = ["PresenceTable", "default_ids"]

_TITLE = "passion-plugin presence table 1"

_SEEDS = 10**20

_LONGEST_ID = 1000

# What a spreadsheet takes for a formula that calls something.
_FORMULA = re.compile(r"\s*[=+@-].*[(|!]")


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
        problems += _id_problems(self.sample_ids if ids is None else ids)
        if ids is None or modalities is None:
            raise_problems(problems, what="PresenceTable")
            return
        presence = np.array(self.presence)
        if presence.dtype != np.bool_:
            problems.append(f"presence is {presence.dtype}; pass bool, True = present")
        elif presence.shape != (len(ids), len(modalities)):
            problems.append(
                f"presence has shape {presence.shape}, need ({len(ids)}, {len(modalities)}): one row for "
                "each sample, one column for each modality"
            )
        else:
            nothing = [ids[row] for row in np.flatnonzero(~presence.any(axis=1))]
            never = [modalities[column] for column in np.flatnonzero(~presence.any(axis=0))]
            if nothing:
                problems.append(
                    f"{len(nothing)} samples have no modality at all ({shortlist(nothing)}); leave them out"
                )
            if never and ids:
                problems.append(f"no sample has modality {shortlist(never)}; leave it out of the modalities")
        rates = self.nominal_rates
        if rates is not None and (
            not isinstance(rates, Mapping)
            or set(map(str, rates)) != set(map(str, modalities))
            or not all(is_number(rate, least=0, most=1) for rate in rates.values())
        ):
            problems.append(f"nominal_rates is {rates!r}; need a rate in 0..1 for each of {modalities}")
        if self.seed is not None and not (is_int(self.seed, least=0) and self.seed < _SEEDS):
            problems.append(f"seed is {shorten(self.seed)}; need a whole number from 0, with at most 20 digits")
        raise_problems(problems, what="PresenceTable")
        presence.setflags(write=False)
        object.__setattr__(self, "sample_ids", ids)
        object.__setattr__(self, "modalities", modalities)
        object.__setattr__(self, "presence", presence)
        if rates is not None:
            object.__setattr__(self, "nominal_rates", {name: float(rates[name]) for name in modalities})

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
        ids = default_ids(len(array)) if sample_ids is None else sample_ids
        return cls(ids, modalities, array.astype(np.bool_))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sample_ids)

    def __contains__(self, sample_id: object) -> bool:
        return isinstance(sample_id, str) and sample_id in self._rows()

    def __getitem__(self, sample_id: str) -> NDArray[np.bool_]:
        """Return the (M,) bool row of a sample, by its id. By position: ``table.presence[index]``."""
        return self.presence[self.index(sample_id)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PresenceTable):
            return NotImplemented
        mine, theirs = (
            (table.sample_ids, table.modalities, table.nominal_rates, table.seed) for table in (self, other)
        )
        return mine == theirs and np.array_equal(self.presence, other.presence)

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
        row = self._rows().get(sample_id) if isinstance(sample_id, str) else None
        if row is None:
            raise ConfigError(
                f"PresenceTable: no sample {shorten(sample_id)}.{suggest(str(sample_id), self.sample_ids)}"
            )
        return row

    def select(self, sample_ids: Iterable[str]) -> PresenceTable:
        """Return the table of some samples, in the order given (a fold, a data set in another order).

        Raises:
            ConfigError: an unknown id, or what the class refuses, such as a modality nobody is left with.
        """
        ids = as_tuple(sample_ids)
        if ids is None:
            raise ConfigError(f"PresenceTable.select: sample_ids={shorten(sample_ids)}; pass a list of ids")
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
        text = io.StringIO()
        text.write(f"# {_TITLE}\n")
        if self.nominal_rates is not None:
            rates = ",".join(f"{name}={rate!r}" for name, rate in self.nominal_rates.items())
            text.write(f"# nominal_rates: {rates}\n")
        if self.seed is not None:
            text.write(f"# seed: {self.seed}\n")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("sample_id", *self.modalities))
        writer.writerows((name, *row) for name, row in zip(self.sample_ids, self.presence.astype(int), strict=True))
        Path(path).write_text(text.getvalue(), encoding="utf-8", newline="")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PresenceTable:
        """Read what :meth:`save` wrote, or a CSV file written by hand with the same header and 0/1 entries.

        Raises:
            ConfigError: listing all problems with line numbers.
        """
        comments, rows, problems = read_rows(path)
        what = f"presence table {os.fspath(path)}"
        header = rows[0][1] if rows else []
        if len(header) < 2 or header[0] != "sample_id":
            problems.append(f"the header is {shorten(header)}; need sample_id,<modality>,<modality>,…")
            raise_problems(problems, what=what)
        modalities = tuple(name.strip() for name in header[1:])
        ids, values = [], []
        for line, (sample_id, *cells) in rows[1:]:
            if len(cells) != len(modalities) or any(cell.strip() not in ("0", "1") for cell in cells):
                problems.append(f"line {line}: {shorten(cells)}; need {len(modalities)} entries, each 0 or 1")
            ids.append(sample_id)
            values.append([cell.strip() == "1" for cell in cells])
        rates, seed = _parse_comments(comments, modalities, problems)
        problems += modality_problems(modalities) + _id_problems(ids)
        raise_problems(problems, what=what)
        try:
            return cls(tuple(ids), modalities, np.array(values, dtype=np.bool_), rates, seed)
        except ConfigError as error:
            raise ConfigError(f"{what}: {error}") from None

    def _rows(self) -> dict[str, int]:
        """Map ids to rows; built at the first use and kept."""
        rows: dict[str, int] | None = self.__dict__.get("_row_of_id")
        if rows is None:
            rows = {sample_id: row for row, sample_id in enumerate(self.sample_ids)}
            object.__setattr__(self, "_row_of_id", rows)
        return rows


def default_ids(count: int) -> tuple[str, ...]:
    """Return ``("0", "1", …)``: ids for samples that have none."""
    return tuple(map(str, range(count)))


def _id_problems(sample_ids: Any) -> list[str]:
    ids = as_tuple(sample_ids)
    if ids is None:
        return [f"sample_ids={shorten(sample_ids)}; pass a list of names"]
    problems = [] if ids else ["there is no sample"]
    odd = [name for name in ids if not isinstance(name, str) or not name.strip() or not name.isprintable()]
    if odd:
        problems.append(f"sample ids must be non-empty printable strings; found {shortlist(odd)}")
    long = [name for name in ids if isinstance(name, str) and len(name) > _LONGEST_ID]
    if long:
        problems.append(f"sample ids of more than {_LONGEST_ID} characters: {shortlist(long)}")
    formulas = [name for name in ids if isinstance(name, str) and _FORMULA.match(name)]
    if formulas:
        problems.append(f"sample ids that a spreadsheet would run as a formula: {shortlist(formulas)}; rename them")
    repeated = sorted(name for name, count in Counter(map(str, ids)).items() if count > 1)
    if repeated:
        problems.append(f"sample ids that occur more than once: {shortlist(repeated)}")
    return problems


def _parse_comments(
    comments: Sequence[tuple[int, str]], modalities: Sequence[str], problems: list[str]
) -> tuple[dict[str, float] | None, int | None]:
    """Read nominal rates and seed from the comment lines; all other comments are the user's own."""
    rates: dict[str, float] | None = None
    seed = None
    for line, comment in comments:
        key, _, value = (part.strip() for part in comment.partition(":"))
        if key == "seed":
            if re.fullmatch(r"\d{1,20}", value, re.ASCII):
                seed = int(value)
            else:
                problems.append(f"line {line}: seed {shorten(value)}; need a whole number")
        elif key == "nominal_rates":
            pairs = [pair.partition("=")[::2] for pair in value.split(",")]
            rates = {name.strip(): _rate(number) for name, number in pairs}
            if set(rates) != set(modalities) or any(math.isnan(rate) for rate in rates.values()):
                problems.append(
                    f"line {line}: nominal rates {shorten(value)}; need name=rate for each of "
                    f"{tuple(modalities)}, separated by commas, rates in 0..1"
                )
    return rates, seed


def _rate(text: str) -> float:
    if not re.fullmatch(r"[0-9.eE+-]{1,30}", text.strip()):
        return math.nan
    try:
        rate = float(text)
    except ValueError:
        return math.nan
    return rate if 0 <= rate <= 1 else math.nan

"""The split files that were published with the paper (BraTS 2018 / 2020, four modalities)."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence

import numpy as np

from passion_plugin._validate import modality_problems
from passion_plugin.data._csv import read_rows
from passion_plugin.data._presence import PresenceTable
from passion_plugin.errors import ConfigError, raise_problems, shortlist

_HEADER = ["data_name", "mask_id", "mask", "pos_mask_ids"]

# Columns that are present, for mask ids 0 to 14 of the published files.
_PRESENT = ("3", "1", "2", "0", "13", "12", "02", "23", "03", "01", "012", "023", "013", "123", "0123")

_MASKS = tuple(tuple(str(column) in present for column in range(4)) for present in _PRESENT)

# NumPy 2 prints its own booleans as np.True_, and the published generator writes whatever is printed.
_BOOL = r"(?:True|False|np\.True_|np\.False_)"

_MASK_CELL = re.compile(rf"\[{_BOOL}(?:, ?{_BOOL}){{3}}\]")


def read_split_csv(path: str | os.PathLike[str], modalities: Sequence[str]) -> PresenceTable:
    """Read a split file of the published code. Cells are matched against a pattern, never evaluated.

    Columns: ``data_name``; ``mask_id``, one of 15 numbers; ``mask``, four booleans; ``pos_mask_ids``, the numbers of
    all non-empty subsets of the mask. The three descriptions of a mask must agree.

    The files hold no names of modalities, so you must give them, in the order of the four booleans. For the published
    BraTS files that is ``("flair", "t1ce", "t1", "t2")``. Their file names list the missing rates in another order,
    (T1, T1c, FLAIR, T2): ``mr2468`` is 0.6 for FLAIR, 0.4 for T1c, 0.2 for T1 and 0.8 for T2.

    Args:
        path: the file.
        modalities: four names, in the order of the booleans in ``mask``.

    Returns:
        The table, samples in the order of the file.

    Raises:
        ConfigError: listing all problems with line numbers.
    """
    _check_four(modalities, "read_split_csv")
    _, rows, problems = read_rows(path)
    header = rows[0][1] if rows else []
    if header != _HEADER:
        problems.append(f"the header is {shortlist(header)}; need {','.join(_HEADER)}")
        raise_problems(problems, what=os.fspath(path))
    ids, masks = [], []
    for line, cells in rows[1:]:
        try:
            masks.append(_mask_of(cells))
        except ValueError as error:
            problems.append(f"line {line}: {error}")
        ids.append(cells[0])
    raise_problems(problems, what=os.fspath(path))
    try:
        return PresenceTable(tuple(ids), tuple(modalities), np.array(masks, dtype=np.bool_).reshape(-1, 4))
    except ConfigError as error:
        raise ConfigError(f"{os.fspath(path)}: {error}") from None


def write_split_csv(table: PresenceTable, path: str | os.PathLike[str]) -> None:
    """Write a split file that the published code reads; the same bytes that it would have written itself.

    Args:
        table: four modalities, whose columns must already be in the order of the published code's tensors
            (for its BraTS data FLAIR, T1c, T1, T2). Their names are not stored.
        path: the file.

    Raises:
        ConfigError: the table does not have four modalities; the format knows no other number.
    """
    _check_four(table.modalities, "write_split_csv")
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_HEADER)
        for name, row in zip(table.sample_ids, table.presence.tolist(), strict=True):
            writer.writerow([name, _MASKS.index(tuple(row)), row, _reachable(row)])


def _reachable(mask: Sequence[bool]) -> list[int]:
    """Return the ids of all masks that are subsets of this one."""
    return [
        number
        for number, other in enumerate(_MASKS)
        if all(have or not want for have, want in zip(mask, other, strict=True))
    ]


def _mask_of(cells: Sequence[str]) -> tuple[bool, ...]:
    """Return the mask of a row; raise ValueError with what is wrong."""
    if len(cells) != 4:
        raise ValueError(f"{len(cells)} cells, need 4")
    _, mask_id, mask, reachable = cells
    if not _MASK_CELL.fullmatch(mask):
        raise ValueError(f"mask is {shortlist([mask])}; need four booleans such as [True, False, False, True]")
    values = tuple("True" in part for part in mask.split(","))
    if not any(values):
        raise ValueError(f"mask is {mask}: the sample has nothing; leave it out")
    number, expected = _MASKS.index(values), _reachable(values)
    if mask_id != str(number):
        raise ValueError(f"mask_id is {shortlist([mask_id])}, but that of {mask} is {number}")
    if reachable.replace(" ", "") != str(expected).replace(" ", ""):
        raise ValueError(f"pos_mask_ids is {shortlist([reachable])}, but the subsets of {mask} are {expected}")
    return values


def _check_four(modalities: Sequence[str], what: str) -> None:
    problems = modality_problems(modalities)
    if not problems and len(modalities) != 4:
        problems = [f"{len(modalities)} modalities, but this format has exactly four; use PresenceTable.save / .load"]
    raise_problems(problems, what=what)

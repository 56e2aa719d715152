"""The split files that were published with the paper (BraTS 2018 / 2020, four modalities)."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from passion_plugin.data._presence import PresenceTable
from passion_plugin.data._reading import read_rows, shorten
from passion_plugin.data._subsets import modality_problems
from passion_plugin.errors import ConfigError, raise_problems

__all__ = ["read_split_csv", "write_split_csv"]

_HEADER = ["data_name", "mask_id", "mask", "pos_mask_ids"]

# Columns that are present, for mask ids 0 to 14 of the published files.
_PRESENT_BY_ID = (
    *("3", "1", "2", "0"),
    *("13", "12", "02", "23", "03", "01"),
    *("012", "023", "013", "123"),
    "0123",
)

_MASKS = tuple(tuple(str(column) in present for column in range(4)) for present in _PRESENT_BY_ID)

_ID_OF_MASK = {mask: number for number, mask in enumerate(_MASKS)}

# NumPy 2 prints its own booleans as np.True_, and the published generator writes whatever is printed.
_BOOL = r"(?:True|False|np\.True_|np\.False_)"

_MASK_CELL = re.compile(rf"\[{_BOOL}(?:, ?{_BOOL})*\]")

_IDS_CELL = re.compile(r"\[[0-9]{1,2}(?:, ?[0-9]{1,2})*\]")

_LONGEST_CELL = 200


def read_split_csv(path: str | os.PathLike[str], modalities: Sequence[str]) -> PresenceTable:
    """Read a split file of the published code. Cells are matched against a pattern, never evaluated.

    Columns: ``data_name``; ``mask_id``, one of 15 numbers; ``mask``, four booleans; ``pos_mask_ids``, the
    numbers of all masks that can be reached by dropping more (all non-empty subsets). The three descriptions
    of a mask must agree.

    The files hold no names of modalities, so you must give them, in the order of the four booleans. For the
    published BraTS files that is ``("flair", "t1ce", "t1", "t2")``. Beware: their file names list the missing
    rates in another order, (T1, T1c, FLAIR, T2): ``mr2468`` is 0.6 for FLAIR, 0.4 for T1c, 0.2 for T1 and 0.8
    for T2.

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
    what = f"split file {os.fspath(path)}"
    if not rows or rows[0][1] != _HEADER:
        problems.append(f"the header is {shorten(rows[0][1] if rows else '')}; need {','.join(_HEADER)}")
        raise_problems(problems, what=what)
    ids, masks = [], []
    for line, cells in rows[1:]:
        found = [] if len(cells) == 4 else [f"{len(cells)} cells, need 4"]
        if not found:
            found = _row_problems(*cells[1:])
        if found:
            problems += [f"line {line}: {problem}" for problem in found]
        else:
            ids.append(cells[0])
            masks.append(_MASKS[int(cells[1])])
    raise_problems(problems, what=what)
    try:
        return PresenceTable(tuple(ids), tuple(modalities), np.array(masks, dtype=np.bool_).reshape(-1, 4))
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None


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
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_HEADER)
    for name, row in zip(table.sample_ids, table.presence.tolist(), strict=True):
        mask = tuple(row)
        writer.writerow([name, _ID_OF_MASK[mask], list(mask), _reachable(mask)])
    Path(path).write_text(text.getvalue(), encoding="utf-8", newline="")


def _reachable(mask: Sequence[bool]) -> list[int]:
    """Return the ids of all masks that are subsets of this one."""
    return [
        number
        for number, other in enumerate(_MASKS)
        if all(have or not want for have, want in zip(mask, other, strict=True))
    ]


def _row_problems(mask_id: str, mask: str, reachable: str) -> list[str]:
    problems = []
    if not re.fullmatch(r"[0-9]|1[0-4]", mask_id):
        problems.append(f"mask_id is {shorten(mask_id)}; need a number from 0 to 14")
    if len(mask) > _LONGEST_CELL or not _MASK_CELL.fullmatch(mask) or mask.count(",") != 3:
        problems.append(f"mask is {shorten(mask)}; need four booleans such as [True, False, False, True]")
    if len(reachable) > _LONGEST_CELL or not _IDS_CELL.fullmatch(reachable):
        problems.append(f"pos_mask_ids is {shorten(reachable)}; need a list of numbers such as [0, 2, 7]")
    if problems:
        return problems
    values = tuple("True" in part for part in mask.split(","))
    if not any(values):
        return [f"mask is {mask}: the sample has nothing; leave it out"]
    if _MASKS[int(mask_id)] != values:
        problems.append(f"mask_id {mask_id} means {list(_MASKS[int(mask_id)])}, but mask is {mask}")
    expected = _reachable(values)
    if sorted(map(int, reachable[1:-1].split(","))) != expected:
        problems.append(f"pos_mask_ids is {reachable}, but the subsets of {mask} are {expected}")
    return problems


def _check_four(modalities: Sequence[str], what: str) -> None:
    problems = modality_problems(modalities)
    if not isinstance(modalities, str) and len(modalities) != 4:
        problems.append(
            f"{len(modalities)} modalities, but this format has exactly four; use PresenceTable.save / .load"
        )
    raise_problems(problems, what=what)

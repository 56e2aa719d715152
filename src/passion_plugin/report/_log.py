"""The folder of a run: written while a model trains, read for its page.

Every file is optional, but one of the first three has to be there:

* ``metrics.jsonl``: one JSON object per line, ``metrics()`` of a step or epoch; :class:`RunLog` writes it;
* ``results.csv``, or ``results-NAME.csv`` for each of several models, written by ``SubsetResults.to_csv``;
* ``overlays/*.png``: pictures, such as those of :func:`passion_plugin.report.plot_overlay`;
* ``run.json``: one JSON object with whatever should be told about the run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passion_plugin.errors import ConfigError, InputError, raise_problems, warn_user
from passion_plugin.evaluation import SubsetResults
from passion_plugin.training import is_of_an_epoch


class RunLog:
    """Append numbers to ``metrics.jsonl`` in the folder of a run; call it as ``log(model.passion.metrics(), step)``.

    Every call opens the file, appends one line and closes it, so that a training that dies loses nothing that it has
    logged. A resumed training appends to the same file; readers take the last record of an epoch (see
    :func:`passion_plugin.training.epoch_records`). In distributed training, log on one rank.

    Args:
        folder: of the run; made if it does not exist.

    Warns:
        PassionWarning: the last line of the file is incomplete, as a killed training leaves it. It is removed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.read_bytes() if self.path.is_file() else b""
        last = written.rpartition(b"\n")[2]
        if last and _parsed(last)[1]:
            warn_user(f"{self.path}: the last line is incomplete and was removed: {last[:80]!r}")
            os.truncate(self.path, len(written) - len(last))
        elif last:
            self._append("")

    def __call__(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Append one record.

        Args:
            values: numbers, or tensors and arrays of one number, by name. NaN and infinity are written as ``null``:
                JSON has no numbers for them.
            step: number of the step, written as ``"step"``.

        Raises:
            InputError: a value is no number; nothing is written.
        """
        record: dict[str, Any] = {} if step is None else {"step": int(step)}
        for name, value in values.items():
            try:
                number = float(value)
            except (TypeError, ValueError, RuntimeError):
                raise InputError(f"RunLog: {name!r} is {value!r:.80}; pass a number") from None
            record[name] = number if math.isfinite(number) else None
        self._append(json.dumps(record))

    def _append(self, line: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@dataclass(frozen=True)
class Run:
    """What was found in the folder of a run.

    Attributes:
        name: of the folder.
        records: of ``metrics.jsonl``, as they were logged.
        results: by name; that of ``results.csv`` is ``"results"``.
        overlays: PNG files by name.
        facts: of ``run.json``.
        notes: what is missing or was left out, a sentence each.
    """

    name: str
    records: list[dict[str, Any]]
    results: dict[str, SubsetResults]
    overlays: dict[str, bytes]
    facts: dict[str, Any]
    notes: list[str]


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read the folder of a run, finished or not.

    A last line of ``metrics.jsonl`` that is incomplete, as a killed training leaves it, is left out and noted.

    Args:
        folder: with the files that the docstring of this module lists.

    Raises:
        ConfigError: it is no folder, there is nothing to report in it, or files in it cannot be read: all of them, with
            the numbers of the lines.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; pass that of a run")
    problems: list[str] = []
    notes: list[str] = []
    records = _records(path / "metrics.jsonl", problems, notes)
    results = {}
    for file in sorted(path.glob("results*.csv")):
        try:
            results[file.stem.removeprefix("results-")] = SubsetResults.from_csv(file)
        except (ConfigError, OSError) as error:
            problems.append(str(error) if file.name in str(error) else f"{file.name}: {error}")
    if not results:
        notes.append("There is no results.csv: the model was not evaluated.")
    overlays = {file.stem: file.read_bytes() for file in sorted(path.glob("overlays/*.png"))}
    problems += [f"overlays/{name}.png: not a PNG file" for name in overlays if overlays[name][1:4] != b"PNG"]
    facts, problem = _parsed((path / "run.json").read_bytes()) if (path / "run.json").is_file() else ({}, "")
    problems += [f"run.json: {problem}"] if problem else []
    if not (records or results or overlays or problems):
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        problems.append(
            "nothing to report: need metrics.jsonl with a record in it, results.csv, results-NAME.csv or "
            f"overlays/*.png; found {found}"
        )
    raise_problems(problems, what=str(path), error=ConfigError)
    return Run(path.resolve().name, records, results, overlays, facts, notes)


def _records(path: Path, problems: list[str], notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        notes.append("There is no metrics.jsonl: nothing is known about the epochs.")
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        record, problem = _parsed(line) if line.strip() else ({}, "")
        if problem and number == len(lines):
            notes.append(f"metrics.jsonl, line {number}: incomplete, left out.")
            continue
        for key, value in record.items():
            # Only these are drawn; what else is logged may be of any kind.
            if (key == "epoch" or is_of_an_epoch(key)) and not isinstance(value, int | float | None):
                problem = f"{key!r} is {value!r:.40}, not a number"
        problems += [f"metrics.jsonl, line {number}: {problem}"] if problem else []
        records += [record] if record else []
    return records


def _parsed(text: bytes) -> tuple[dict[str, Any], str]:
    """Return a JSON object, or what is wrong with it."""
    start = text[:40].decode(errors="replace")
    try:
        record = json.loads(text.decode("utf-8-sig"))
    except ValueError as error:
        return {}, f"not JSON ({error}): {start}"
    return (record, "") if isinstance(record, dict) else ({}, f"not an object: {start}")

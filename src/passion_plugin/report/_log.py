"""The folder that a training leaves, and that ``python -m passion_plugin report`` turns into a page.

Every file is optional, but one of the first three has to be there:

* ``metrics.jsonl``: one JSON object per line, ``metrics()`` of a step or epoch; :class:`RunLog` writes it;
* ``results.csv``, or ``results-NAME.csv`` for each of several models: what ``SubsetResults.to_csv`` writes;
* ``overlays/*.png``: pictures, such as those of :func:`passion_plugin.plot.plot_overlay`;
* ``run.json``: one JSON object with whatever should be told about the run.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passion_plugin.errors import ConfigError, InputError, PassionError, PassionWarning, raise_problems
from passion_plugin.evaluation import SubsetResults
from passion_plugin.training import is_of_an_epoch

__all__ = ["Run", "RunLog", "read_run"]

METRICS, FACTS, OVERLAYS = "metrics.jsonl", "run.json", "overlays"

_DEEPEST = 50


class RunLog:
    r"""Appends numbers to ``metrics.jsonl`` in the folder of a run; made for ``log(model.passion.metrics(), step)``.

    Every call opens the file, appends one line and closes it, so that a training that dies loses nothing that it has
    logged. A second log on the same folder appends: readers take the later record where an epoch comes again (see
    :func:`passion_plugin.logged.epoch_records`). In distributed training, log on one rank.

    Args:
        folder: of the run; made if it does not exist.

    Warns:
        PassionWarning: the last line of the file was never finished. It is cut off, so that the next one can be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = RunLog(folder)
        ...     log({"epoch": 0.0, "beta/t1": 1.1}, step=40)
        ...     log.path.read_text()
        '{"step": 40, "epoch": 0.0, "beta/t1": 1.1}\n'
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / METRICS
        self.path.parent.mkdir(parents=True, exist_ok=True)
        written = self.path.read_bytes() if self.path.is_file() else b""
        whole, newline, last = written.rpartition(b"\n")
        if last and _json_object(last)[1]:
            warnings.warn(
                f"{self.path}: the last line was never finished and is cut off: {last[:80]!r}",
                PassionWarning,
                stacklevel=2,
            )
            os.truncate(self.path, len(whole + newline))
        elif last:
            self._append("")

    def __call__(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Append one record.

        Args:
            values: numbers, or tensors and arrays of one number, by name. What is not finite is written as ``null``:
                JSON has no other way to say it.
            step: number of the step, written as ``"step"``.

        Raises:
            InputError: a value is no number, or there is a step twice.
        """
        problems = []
        record: dict[str, Any] = {} if step is None else {"step": int(step)}
        if step is not None and "step" in values:
            problems.append(f"step={step} is passed, and values have a 'step' too; leave one of them out")
        for name, value in values.items():
            try:
                number = float(value.item() if hasattr(value, "item") else value + 0)
            except (TypeError, ValueError, RuntimeError, OverflowError):
                number = math.nan
                problems.append(f"{name!r} is {value!r:.80}; pass a number")
            record[str(name)] = number if math.isfinite(number) else None
        raise_problems(problems, what="RunLog", error=InputError)
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
        notes: what is not there or was left out, a sentence each.
    """

    name: str
    records: list[dict[str, Any]]
    results: dict[str, SubsetResults]
    overlays: dict[str, bytes]
    facts: dict[str, Any]
    notes: list[str]


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read the folder of a run, finished or not.

    A last line of ``metrics.jsonl`` that was never finished, as a killed training leaves it, is left out and noted.

    Args:
        folder: laid out as the docstring of this module says.

    Raises:
        ConfigError: it is no folder, there is nothing to report in it, or files in it cannot be read: all of them, with
            the numbers of the lines.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ConfigError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; pass that of a run")
    problems: list[str] = []
    notes: list[str] = []
    records = _records(path / METRICS, problems, notes)
    results = _results(path, problems, notes)
    overlays = _overlays(path / OVERLAYS, problems)
    facts = _facts(path / FACTS, problems)
    if not (records or results or overlays or problems):
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10])
        problems.append(
            f"nothing to report: need {METRICS} with a record in it, results.csv, results-NAME.csv or "
            f"{OVERLAYS}/*.png; " + (f"found {found}" if found else "the folder is empty")
        )
    raise_problems(problems, what=str(path), error=ConfigError)
    return Run(path.resolve().name, records, results, overlays, facts, notes)


def _records(path: Path, problems: list[str], notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        notes.append(f"There is no {METRICS}: nothing is known about the epochs.")
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record, problem = _json_object(line, parse_int=float)
        if problem and number == len(lines):
            notes.append(f"{METRICS}, line {number}: never finished, left out.")
            continue
        # What else is logged may be of any kind.
        read = {key: value for key, value in record.items() if key == "epoch" or is_of_an_epoch(key)}
        odd = [key for key, value in read.items() if not isinstance(value, float | None)]
        if odd and not problem:
            problem = f"{odd[0]!r} is {record[odd[0]]!r:.40}, not a number"
        if problem:
            problems.append(f"{METRICS}, line {number}: {problem}")
        records.append(record)
    return records


def _json_object(text: bytes, parse_int: Callable[[str], float] = int) -> tuple[dict[str, Any], str]:
    """Return an object, or what is wrong with it."""
    start = text[:40].decode(errors="replace")
    try:
        record = json.loads(text.decode("utf-8-sig"), parse_int=parse_int)
        if b"\\u" in text:
            json.dumps(record, ensure_ascii=False).encode()  # Half a character, which nothing can show, raises.
    except (ValueError, RecursionError) as error:
        return {}, f"no JSON ({error}): {start}"
    if not _is_shallow(record, _DEEPEST):
        return {}, f"more than {_DEEPEST} levels deep: {start}"
    return (record, "") if isinstance(record, dict) else ({}, f"not an object: {start}")


def _is_shallow(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(_is_shallow(part, levels - 1) for part in inner)


def _results(folder: Path, problems: list[str], notes: list[str]) -> dict[str, SubsetResults]:
    results = {}
    for path in sorted(folder.glob("results*.csv")):
        if path.stem != "results" and not path.stem.startswith("results-"):
            notes.append(f"{path.name} is called neither results.csv nor results-NAME.csv and was left out.")
            continue
        try:
            results[path.stem.removeprefix("results-")] = SubsetResults.from_csv(path)
        except (PassionError, OSError) as error:
            problems.append(str(error) if path.name in str(error) else f"{path.name}: {error}")
    if not results:
        notes.append("There is no results.csv: the model was not evaluated.")
    return results


def _overlays(folder: Path, problems: list[str]) -> dict[str, bytes]:
    # What is no file, such as a pipe, may never end.
    files = sorted(folder.glob("*.png"))
    overlays = {path.stem: path.read_bytes() if path.is_file() else b"" for path in files}
    problems += [
        f"{OVERLAYS}/{name}.png: no PNG file" for name, data in overlays.items() if not data.startswith(b"\x89PNG")
    ]
    return overlays


def _facts(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    facts, problem = _json_object(path.read_bytes())
    if problem:
        problems.append(f"{FACTS}: {problem}")
    return facts

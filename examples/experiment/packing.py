"""Finished cells as CSV files, small enough to be committed.

| file | a row for each |
|---|---|
| ``runs.csv`` | training: what was missing, seconds, steps, versions, status |
| ``strategies.csv`` | strategy: rule, drawing and all hyper-parameters |
| ``cells.csv`` | training and subset of modalities: mean over the test patients of every target and metric |
| ``patients.csv.gz`` | training, subset, patient and target |
| ``history.csv.gz`` | training and epoch: beta and relative preference of every modality |

All but ``cells.csv``, which is derived, are read back.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from examples.experiment.cells import Cell

__all__ = ["pack", "unpack"]

Record = dict[str, Any]

_KEY = ("backbone", "assignment", "fold", "seed", "batch_size", "strategy")
_STRATEGY = ("rule", "drawing", "parameters")


def pack(records: Sequence[Record], modalities: Sequence[str]) -> dict[str, bytes]:
    """Return the content of every file.

    Args:
        records: finished cells, see :meth:`examples.experiment.store.Store.records`.
        modalities: names, in mask order.
    """
    runs, strategies, cells, patients, history = [], {}, [], [], []
    for record in records:
        key = {name: record["cell"][name] for name in _KEY}
        runs.append(key | {name: value for name, value in record["run"].items() if name not in _STRATEGY})
        if "rule" in record["run"]:
            strategies[key["strategy"]] = [record["run"][name] for name in _STRATEGY]
        metrics = list(dict.fromkeys(metric for _, _, _, metric, _, _ in record["scores"]))
        # In one order of columns, whether scores come by metric, as evaluated, or by target, as unpacked.
        targets = dict.fromkeys(target for _, _, target, _, _, _ in record["scores"])
        columns = [f"{metric} {target}" for metric in metrics for target in targets]
        rows: dict[tuple[str, str, str], Record] = {}
        groups: dict[str, dict[str, list[float]]] = {}
        for subset, patient, target, metric, value, status in record["scores"]:
            row = rows.setdefault((subset, patient, target), dict.fromkeys((*metrics, "status"), ""))
            row |= {metric: value, "status": status}
            means = groups.setdefault(subset, {})
            means.setdefault(f"{metric} {target}", []).extend([] if value is None else [value])
        for (subset, patient, target), row in rows.items():
            patients.append(key | {"subset": subset, "patient": patient, "target": target} | row)
        for subset, means in groups.items():
            averaged = {name: f"{statistics.fmean(means[name]):.4g}" for name in columns if means.get(name)}
            cells.append(key | {"missing": record["run"]["missing"], "subset": subset} | averaged)
        for epoch, *values in record["history"]:
            names = [f"{what} {name}" for what in ("beta", "preference") for name in modalities]
            history.append(key | {"epoch": epoch} | dict(zip(names, values, strict=True)))
    described = [
        {"strategy": name, "rule": rule, "drawing": drawing, "parameters": json.dumps(parameters)}
        for name, (rule, drawing, parameters) in strategies.items()
    ]
    return {
        "runs.csv": _text(runs),
        "strategies.csv": _text(described),
        "cells.csv": _text(cells),
        # Without a time stamp, so that the same results give the same bytes.
        "patients.csv.gz": gzip.compress(_text(patients), mtime=0),
        "history.csv.gz": gzip.compress(_text(history), mtime=0),
    }


def unpack(folder: Path) -> dict[str, Record]:
    """Read the files of a folder back into records by key; none where there are no files."""
    strategies = {
        row["strategy"]: {"rule": row["rule"], "drawing": row["drawing"], "parameters": json.loads(row["parameters"])}
        for row in _rows(folder / "strategies.csv")
    }
    records: dict[str, Record] = {}
    by_key: dict[tuple[str, ...], Record] = {}
    for row in _rows(folder / "runs.csv"):
        cell = {name: row.pop(name) if name in _TEXT else int(row.pop(name)) for name in _KEY}
        described = strategies.get(cell["strategy"], {}) if row["status"] == "ok" else {}
        facts = {name: value if name in _TEXT else _number(value) for name, value in row.items() if value != ""}
        record = {"cell": cell, "run": facts | described, "history": [], "scores": []}
        by_key[tuple(map(str, cell.values()))] = records[Cell(**cell).key] = record
    for row in _rows(folder / "patients.csv.gz"):
        scores = by_key[tuple(row.pop(name) for name in _KEY)]["scores"]
        names = [row.pop(name) for name in ("subset", "patient", "target")]
        status = row.pop("status")
        scores += [[*names, metric, float(value) if value else None, status] for metric, value in row.items()]
    for row in _rows(folder / "history.csv.gz"):
        history = by_key[tuple(row.pop(name) for name in _KEY)]["history"]
        history.append([int(row.pop("epoch")), *map(float, row.values())])
    return records


_TEXT = frozenset(
    ("backbone", "assignment", "strategy", "missing", "patients", "status", "device", "package", "torch", "python")
)
"""Columns that are text even if they look like a number."""


def _text(rows: Sequence[Record]) -> bytes:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def _rows(path: Path) -> Iterable[dict[str, str]]:
    if not path.is_file():
        return []
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    return csv.DictReader(io.StringIO(text, newline=""))


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)

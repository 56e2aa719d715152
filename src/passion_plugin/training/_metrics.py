"""Numbers for loggers: one flat dictionary, whatever strategy runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from passion_plugin.training._preference import EpochReport

EPOCH_QUANTITIES = ("beta", "relative_preference", "epoch_distance")
"""What :func:`epoch_metrics` gives for each modality."""


def flatten(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Join the keys of two levels, and leave out what is not a number because it does not exist.

    Example:
        >>> flatten({"pixel": {"flair": 0.5, "t1": math.nan}})
        {'pixel/flair': 0.5}
    """
    return {
        f"{quantity}/{modality}": number
        for quantity, by_modality in values.items()
        for modality, number in by_modality.items()
        if not math.isnan(number)
    }


def by_modality(metrics: Mapping[str, Any], quantity: str) -> dict[str, float]:
    """Return one quantity of a flat dict by modality, without what is no finite number.

    Example:
        >>> by_modality({"epoch": 3.0, "beta/flair": 0.5, "beta/t1": None}, "beta")
        {'flair': 0.5}
    """
    start = f"{quantity}/"
    found = {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def is_of_an_epoch(key: str) -> bool:
    """Whether a key of a flat dict is one of :data:`EPOCH_QUANTITIES` of a modality."""
    return key.partition("/")[0] in EPOCH_QUANTITIES


def epoch_metrics(report: EpochReport) -> dict[str, float]:
    """Return what is logged of an epoch that ended: ``epoch`` and, by modality, :data:`EPOCH_QUANTITIES`.

    The relative preference and the distance of a modality that was not measured are left out. ``skipped/…`` is there
    where comparisons were left out because they were not finite.
    """
    rows = report.as_dict()
    measured = {name: row for name, row in rows.items() if not math.isnan(row["distance"])}
    by_name = {
        "beta": {name: row["beta"] for name, row in rows.items()},
        "relative_preference": {name: row["relative_preference"] for name, row in measured.items()},
        "epoch_distance": {name: row["distance"] for name, row in measured.items()},
    }
    if report.skipped is not None:
        counts = zip(report.modalities, report.skipped.tolist(), strict=True)
        by_name["skipped"] = {name: count for name, count in counts if count}
    return {"epoch": float(report.epoch), **flatten(by_name)}


def epoch_records(history: Iterable[EpochReport | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one record for each epoch of a log, in order.

    ``metrics()`` repeats the last epoch at every step, and a resumed training logs some epochs once more. The last
    record of an epoch counts; where the number of the epoch goes back, what was logged from there on belongs to the
    attempt that was given up, and is left out. So are records that say nothing about an epoch's modalities: from before
    the end of the first one, or other numbers in the same log.

    Args:
        history: what ``end_epoch()`` returned, or what ``metrics()`` did.

    Returns:
        Flat dicts with an ``"epoch"``, which rises.

    Example:
        >>> epoch_records([{"pixel/t1": 0.5}, *({"epoch": e, "beta/t1": 1 + e} for e in (0, 1, 2, 1))])
        [{'epoch': 0, 'beta/t1': 1}, {'epoch': 1, 'beta/t1': 2}]
    """
    kept: list[dict[str, Any]] = []
    for entry in history:
        record = epoch_metrics(entry) if isinstance(entry, EpochReport) else dict(entry)
        epoch = record.get("epoch")
        if epoch is None or not math.isfinite(epoch) or not any(is_of_an_epoch(key) for key in record):
            continue
        while kept and kept[-1]["epoch"] >= epoch:
            kept.pop()
        kept.append(record)
    return kept

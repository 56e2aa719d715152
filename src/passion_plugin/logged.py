"""Numbers for loggers: one flat dict, whatever rule runs."""

from __future__ import annotations

import math
from collections.abc import Mapping

from passion_plugin.balance import Preference

__all__ = ["epoch_metrics", "flat"]


def flat(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Join the keys of two levels, and leave out what is not a number because it does not exist.

    Example:
        >>> flat({"pixel": {"flair": 0.5, "t1": math.nan}})
        {'pixel/flair': 0.5}
    """
    return {
        f"{quantity}/{modality}": number
        for quantity, by_modality in values.items()
        for modality, number in by_modality.items()
        if not math.isnan(number)
    }


def epoch_metrics(report: Preference) -> dict[str, float]:
    """Return what is logged of an epoch that ended: ``epoch``, ``beta/…`` and ``relative_preference/…``.

    The relative preference of a modality whose distance was not measured is left out.
    """
    rows = report.as_dict()
    measured = {name: row for name, row in rows.items() if not math.isnan(row["distance"])}
    by_name = {
        "beta": {name: row["beta"] for name, row in rows.items()},
        "relative_preference": {name: row["relative_preference"] for name, row in measured.items()},
    }
    return {"epoch": float(report.epoch), **flat(by_name)}

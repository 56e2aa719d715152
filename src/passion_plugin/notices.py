"""Warnings about a training; each is given once."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from passion_plugin.balance import Preference
from passion_plugin.errors import PassionWarning

__all__ = ["Notices", "warn_user"]

_OURS = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.__file__))


class Notices:
    """Remembers which warnings of one engine were given."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def dropped_step(self) -> None:
        """Warn that nobody took the loss of the last forward."""
        self._once(
            "dropped step",
            "forward ran again before passion_loss of the previous forward was taken; that step is dropped. "
            "Use passion_disabled() for passes that are not trained on",
        )

    def skipped(self, report: Preference) -> None:
        """Warn when an epoch held comparisons that were not finite."""
        counts = {} if report.skipped is None else dict(zip(report.modalities, report.skipped.tolist(), strict=True))
        found = ", ".join(f"{name!r}: {count:.0f}" for name, count in counts.items() if count)
        if found:
            self._once(
                "skipped",
                f"in epoch {report.epoch} comparisons of modalities were NaN or infinite and were left out ({found}): "
                f"features or logits overflowed, or weights are NaN. What balances the modalities stays finite; the "
                f"loss of such a batch does not: let a GradScaler skip the step, or skip it where the loss is not "
                f"finite. Later epochs say so in Preference.skipped and metrics() only",
            )

    def _once(self, key: str, message: str) -> None:
        if key not in self._given:
            self._given.add(key)
            warn_user(message)


def warn_user(message: str) -> None:
    """Warn about the line of the user: the first one on the stack that is neither ours nor of torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    file, line, module = frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__")
    # Without the registry of that line: its filter would take the warning of another engine for the same one.
    warnings.warn_explicit(message, PassionWarning, file, line, module)

"""The rows of docs/backbones.md: kept as CSV, printed as Markdown."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tools.backbones.measuring import Measured
from tools.backbones.trial import Trial

__all__ = ["MEASURED", "Row", "read_rows", "table", "write_rows"]

MEASURED = Path(__file__).with_name("measured.csv")

_STUDENTS = {
    "replay": "replay",
    "mixed": "mixed replay",
    "rerun": "re-run",
    "heads": "heads",
    "refused": "refused",
}


@dataclass(frozen=True)
class Row:
    """One model, as text.

    Attributes:
        name: of the recipe.
        source: URL of the repository.
        commit: 40 hexadecimal digits.
        date: day of the trial.
        model: class of the network.
        size: what was reduced.
        written: what the user writes besides modalities and rates.
        found: where the spec came from.
        students: by which rung of the ladder.
        difference: largest absolute difference of logits from a true run, with the fraction of the largest logit.
        leak: effect of the content of other modalities on a student.
        losses: first and last of six steps.
        traps: known traps, or why it is refused.
    """

    name: str
    source: str
    commit: str
    date: str
    model: str
    size: str
    written: str
    found: str
    students: str
    difference: str
    relative: str
    leak: str
    losses: str
    traps: str

    @classmethod
    def of(cls, recipe: Any, trial: Trial, measured: Measured) -> Row:
        """Put together what the recipe says and what was measured."""
        losses = (measured.losses[0], measured.losses[-1]) if measured.losses else ()
        return cls(
            name=recipe.__name__.rpartition(".")[2],
            source=recipe.SOURCE,
            commit=recipe.COMMIT,
            date=recipe.DATE,
            model=type(trial.model).__name__,
            size=trial.size,
            written=trial.written,
            found=measured.found,
            students=_STUDENTS[measured.outcome],
            difference=_number(measured.difference),
            relative=_number(measured.relative),
            leak=_number(measured.leak),
            losses=" → ".join(f"{loss:.2f}" for loss in losses),
            traps=trial.traps,
        )

    def __str__(self) -> str:
        lines = [(field.name, str(getattr(self, field.name))) for field in fields(self)]
        return "\n".join(f"{name:<12}{text}" for name, text in lines if text)


def read_rows() -> list[Row]:
    """Return the rows that were recorded."""
    if not MEASURED.exists():
        return []
    with MEASURED.open(encoding="utf-8", newline="") as file:
        return [Row(**line) for line in csv.DictReader(file)]


def write_rows(rows: Sequence[Row]) -> None:
    """Write all rows, in the order of their names."""
    with MEASURED.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in sorted(rows, key=lambda row: row.name))


def table(rows: Sequence[Row]) -> str:
    """Return the Markdown table of the page."""
    head = ("Model", "What you write", "Students", "Difference", "Leak", "Loss", "Traps", "Tried")
    lines = [head, ("---", "---", "---", "---:", "---:", "---", "---", "---")]
    for row in rows:
        repository = "/".join(row.source.rstrip("/").split("/")[-2:])
        link = f"[{repository}]({row.source}/tree/{row.commit}) `{row.model}`"
        lines.append(
            (
                f"`{row.name}`: {link}, {row.size}" if row.size else f"`{row.name}`: {link}",
                row.written or f"nothing ({row.found})",
                row.students,
                row.difference,
                row.leak,
                row.losses,
                row.traps,
                f"{row.date}, `{row.commit[:7]}`",
            )
        )
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"

"""The rows of docs/backbones.md: kept as CSV, printed as Markdown.

    python -m tools.backbones.table

writes the table into the page again, for instance after rows from elsewhere have been added to the CSV.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from examples.markdown import with_block
from tools.backbones.measuring import Measured
from tools.backbones.trial import Trial

__all__ = ["MEASURED", "PAGE", "Row", "read_rows", "record", "table", "write_page"]

MEASURED = Path(__file__).with_name("measured.csv")
PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"

_STUDENTS = {"replay": "replay", "mixed": "mixed replay", "rerun": "re-run", "heads": "heads"}
_HEAD = ("Model", "What you write", "Students", "Difference", "Leak", "Loss", "Traps", "Tried")


@dataclass(frozen=True)
class Row:
    """One model, as text.

    Attributes:
        name: of the recipe.
        source: URL of the repository.
        commit: 40 hexadecimal digits.
        date: day of the trial.
        model: class of the network.
        size: of the images, and what else was reduced.
        written: what the user writes besides modalities and rates.
        found: where the spec came from.
        students: by which student mode, or the reason of the refusal.
        difference: largest absolute difference of logits from a true run.
        relative: the same, as a fraction of the largest logit.
        leak: effect of the content of other modalities on a student, as such a fraction.
        losses: first and last of six steps.
        traps: what is easily done wrong.
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
            students=_STUDENTS.get(measured.outcome, f"refused: {trial.reason}"),
            difference=_number(measured.difference),
            relative=_number(measured.relative),
            leak=_number(measured.leak),
            losses=" → ".join(f"{loss:.2f}" for loss in losses),
            traps=trial.traps,
        )

    def __str__(self) -> str:
        lines = [(field.name, str(getattr(self, field.name))) for field in fields(self)]
        return "\n".join(f"{name:<12}{text}" for name, text in lines if text)

    def cells(self) -> tuple[str, ...]:
        """Return the row as it stands in the table."""
        repository = "/".join(self.source.rstrip("/").split("/")[-2:])
        model = f"[{repository}]({self.source}/tree/{self.commit}), `{self.model}`"
        difference = self.difference if self.difference in ("", "0") else f"{self.difference} ({self.relative})"
        return (
            f"`{self.name}`: {model}, {self.size}" if self.size else f"`{self.name}`: {model}",
            self.written or f"nothing ({self.found})",
            self.students,
            difference,
            self.leak,
            self.losses,
            self.traps,
            f"{self.date}, `{self.commit[:7]}`",
        )


def read_rows() -> list[Row]:
    """Return the rows that were recorded."""
    if not MEASURED.exists():
        return []
    with MEASURED.open(encoding="utf-8", newline="") as file:
        return [Row(**line) for line in csv.DictReader(file)]


def record(row: Row) -> None:
    """Keep a row in place of the last one of that name, and write the page again."""
    rows = sorted([*(kept for kept in read_rows() if kept.name != row.name), row], key=lambda kept: kept.name)
    with MEASURED.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    write_page()


def write_page() -> None:
    """Put the table of all rows between its markers in the page."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_block(page, "table", table(read_rows())), encoding="utf-8")


def table(rows: Sequence[Row]) -> str:
    """Return the Markdown table of some rows."""
    lines = [_HEAD, ("---",) * len(_HEAD), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


if __name__ == "__main__":
    write_page()

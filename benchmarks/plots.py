"""Cost against the number of voxels, the number of modalities and the rate at which they are missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Row, read

__all__ = ["draw"]


def draw(folder: Path, picture: Path) -> None:
    """Draw one picture from the CPU results in ``folder``.

    Args:
        folder: with ``losses.csv`` and ``step.csv``; a panel stays empty where a file or a sweep is missing.
        picture: PNG file to write.
    """
    from matplotlib.figure import Figure

    terms = [row for row in read(folder / "losses.csv") if row["status"] == "ok" and row["dtype"] == "float32"]
    steps = [row for row in read(folder / "step.csv") if row["status"] == "ok" and row["stage"] == "training"]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    voxels, modalities, missing = figure.subplots(1, 3)

    usual = [row for row in terms if row["classes"] == "4" and row["channels"] in ("0", "8")]
    for number, operation in enumerate(dict.fromkeys(row["operation"] for row in usual)):
        for name, style in (("naive", ":"), ("compiled", "--"), ("ours", "-")):
            rows = [row for row in usual if (row["operation"], row["candidate"]) == (operation, name)]
            _line(
                voxels,
                rows,
                lambda row: int(row["side"]) ** 3,
                "seconds",
                1e3,
                f"{operation}, {name}",
                f"C{number}",
                style,
            )
    voxels.set(xscale="log", yscale="log", xlabel="voxels", ylabel="forward + backward, ms")

    for panel, sweep, place, label in (
        (modalities, "modalities", lambda row: int(row["modalities"]), "modalities"),
        (missing, "rate", lambda row: float(row["missing"].split()[0]), "missing rate of every modality"),
    ):
        chosen = [row for row in steps if row["sweep"] == sweep]
        for number, name in enumerate(dict.fromkeys(row["candidate"] for row in chosen)):
            rows = [row for row in chosen if row["candidate"] == name]
            _line(panel, rows, place, "ratio", 1, name, f"C{number}")
        panel.set(xlabel=label, ylabel="training step / plain", ylim=(0, None))
    for panel in (voxels, modalities, missing):
        panel.grid(alpha=0.3)
        if panel.has_data():
            panel.legend(fontsize=6)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)


def _line(
    panel: Any,
    rows: Sequence[Row],
    place: Callable[[Row], float],
    column: str,
    scale: float,
    label: str,
    colour: str,
    style: str = "-",
) -> None:
    """Draw medians with quartiles as bars."""
    if not rows:
        return
    rows = sorted(rows, key=place)
    middle, low, high = ([scale * float(row[key]) for row in rows] for key in (column, f"{column}_q1", f"{column}_q3"))
    below = [m - value for m, value in zip(middle, low, strict=True)]
    above = [value - m for m, value in zip(middle, high, strict=True)]
    places = [place(row) for row in rows]
    panel.errorbar(places, middle, (below, above), color=colour, linestyle=style, marker=".", capsize=2, label=label)

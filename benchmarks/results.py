"""What all benchmarks share: options, a progress bar, and results as CSV."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.measure import ParityError, Spread, machine_facts, spread

__all__ = ["FOLDER", "Row", "command_line", "read", "rows_of_times", "run", "timing_options", "with_progress", "write"]

FOLDER = Path(__file__).parent / "results"

Row = dict[str, str]
T = TypeVar("T")


def command_line(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    add = parser.add_argument
    add("--full", action="store_true", help="the whole sweep instead of one of about five minutes")
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    add("--threads", type=int, help="CPU threads (default: PyTorch's own choice)")
    add(
        "--out",
        nargs="?",
        const="",
        help=f"CSV file to write; without a name benchmarks/results/{name}.csv (or {name}_cuda.csv), which the "
        "documentation is made from. Without this option the table is only printed",
    )
    return parser


def timing_options(parser: argparse.ArgumentParser, *, rounds: int, seconds: float) -> None:
    """Add how long to measure."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"repetitions at most (default: {rounds})")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"per point, no new repetition after (default: {seconds:g})"
    )


def run(
    name: str,
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Iterable[Row]],
    table: Callable[[Sequence[Row]], str],
) -> int:
    """Measure, print the table and write the results, all or nothing.

    Returns:
        Exit status: 1 after a failed parity check, with the reason on stderr, no table and no file.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        rows = list(measure(options))
    except ParityError as error:
        print(f"parity check failed: {error}", file=sys.stderr)
        return 1
    facts = machine_facts(options.device)
    rows = [{**row, **facts} for row in rows]
    print(table(rows))
    if options.out is not None:
        device = "" if options.device.type == "cpu" else f"_{options.device.type}"
        path = Path(options.out or FOLDER / f"{name}{device}.csv")
        write(path, rows)
        print(f"{len(rows)} rows written to {path}", file=sys.stderr)
    return 0


def with_progress(items: Sequence[T], describe: Callable[[T], str] = str) -> Iterator[T]:
    """Go through ``items`` with a bar on stderr that names the current one."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(items, file=sys.stderr, unit="point", mininterval=1.0, disable=None) as bar:
        for item in bar:
            bar.set_description(describe(item))
            yield item


def rows_of_times(times: Mapping[str, Sequence[float]], baseline: str) -> list[Row]:
    """Return a row for each candidate: seconds, and the ratio to ``baseline`` round by round, with quartiles."""
    rows = []
    for name, values in times.items():
        row = {"candidate": name, "status": "ok", "rounds": str(len(values)), **_columns("seconds", spread(values))}
        if baseline in times:
            pairs = zip(values, times[baseline], strict=True)
            row |= _columns("ratio", spread([own / other for own, other in pairs]))
        rows.append(row)
    return rows


def _columns(name: str, values: Spread) -> Row:
    numbers = zip((name, f"{name}_q1", f"{name}_q3"), values, strict=True)
    return {column: f"{number:.4g}" for column, number in numbers}


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows; columns in the order in which they first occur, empty where a row has no value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """Read what :func:`write` wrote; no rows where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))

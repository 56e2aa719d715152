"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.results import Row

__all__ = ["losses", "memory", "profile", "step"]

_POINT = ("operation", "side", "classes", "channels", "batch", "dtype")
_STEP = ("sweep", "backbone", "shape", "missing", "stage")


def losses(rows: Sequence[Row]) -> str:
    """Times of the loss terms: a line for each point, a column for each candidate."""
    names = _names(rows)
    others = [name for name in names if not name.startswith("ours")]
    header = ["loss", "voxels", "K", "C", *[f"{name}, ms" for name in names]]
    header += [*[f"{name} / ours" for name in others], "floor, ms", "floor / ours"]
    lines = []
    for found in _grouped(rows, _POINT).values():
        ours = found["ours"]
        floor = float(ours["floor_seconds"])
        line = _case(ours) + [_milliseconds(found.get(name)) for name in names]
        line += [_spread(found.get(name)) for name in others]
        line += [f"{_number(1e3 * floor)} ({ours['floor_limit']})", f"{floor / float(ours['seconds']):.0%}"]
        lines.append(line)
    return _table(header, lines, left=1)


def memory(rows: Sequence[Row]) -> str:
    """Peak memory of loss terms, beyond inputs and gradient too, and of steps relative to the plain one."""
    parts = []
    terms = [row for row in rows if row["what"] == "loss"]
    if terms:
        names = _names(terms)
        header = ["loss", "voxels", "K", "C", "inputs, MiB", *[f"{name}, MiB" for name in names]]
        header += ["ours / naive", "without gradient"]
        lines = []
        for found in _grouped(terms, _POINT).values():
            ours, naive = found["ours"], found.get("naive", {})
            gradient = float(ours["gradient_bytes"])
            line = [*_case(ours), _mebibytes(ours, "inputs_bytes")]
            line += [_mebibytes(found.get(name), "peak_bytes") for name in names]
            line.append(_quotient(ours, naive, "peak_bytes"))
            line.append(_quotient(ours, naive, "peak_bytes", less=gradient))
            lines.append(line)
        parts.append(_table(header, lines, left=1))
    steps = [row for row in rows if row["what"] == "step"]
    if steps:
        names = [name for name in _names(steps) if name != "plain"]
        header = ["backbone", "images", "missing", "plain, MiB", *[f"{name} / plain" for name in names]]
        lines = []
        for found in _grouped(steps, _STEP).values():
            plain = found["plain"]
            line = [plain["backbone"], plain["shape"], plain["missing"], _mebibytes(plain, "peak_bytes")]
            lines.append(line + [_ratios(found.get(name), "ratio", "largest_ratio") for name in names])
        parts.append(_table(header, lines, left=3))
    return "\n\n".join(parts)


def step(rows: Sequence[Row]) -> str:
    """Times of training steps, and of predictions in ``eval()``, relative to the plain backbone."""
    parts = []
    for stage, title in (("training", "Training step"), ("evaluation", "Prediction in `eval()`")):
        chosen = [row for row in rows if row["stage"] == stage]
        if not chosen:
            continue
        names = [name for name in _names(chosen) if name != "plain"]
        header = ["backbone", "images", "missing", "plain, s", *[f"{name} / plain" for name in names]]
        lines = []
        for found in _grouped(chosen, _STEP).values():
            plain = found["plain"]
            line = [plain["backbone"], plain["shape"], plain["missing"], _number(float(plain["seconds"]))]
            lines.append(line + [_spread(found.get(name)) for name in names])
        parts.append(f"{title}:\n\n{_table(header, lines, left=3)}")
    return "\n\n".join(parts)


def profile(rows: Sequence[Row]) -> str:
    """Seconds of a step by kind of work: a table for each point, a column for each candidate."""
    parts = []
    names = _names(rows)
    points: dict[tuple[str, ...], dict[tuple[str, str], float]] = {}
    for row in rows:
        point = tuple(row[column] for column in ("backbone", "shape", "missing", "students"))
        points.setdefault(point, {})[row["kind"], row["candidate"]] = float(row["seconds"])
    for (backbone, shape, missing, students), seconds in points.items():
        kinds = list(dict.fromkeys(kind for kind, _ in seconds))
        lines = [[kind, *[_number(seconds[kind, name]) for name in names]] for kind in kinds]
        lines.append(["whole step", *[_number(sum(seconds[kind, name] for kind in kinds)) for name in names]])
        title = f"{backbone}, {shape}, missing {missing}, {float(students):.3g} students a step:"
        parts.append(f"{title}\n\n{_table(['seconds', *names], lines, left=1)}")
    return "\n\n".join(parts)


def _grouped(rows: Sequence[Row], key: Sequence[str]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Sort rows by point, and within it by candidate."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(column, "") for column in key), {})[row["candidate"]] = row
    return found


def _names(rows: Sequence[Row]) -> list[str]:
    """Candidates in the order of their first row, naive ones first and ours last."""
    names = dict.fromkeys(row["candidate"] for row in rows)
    return sorted(names, key=lambda name: (name.startswith("ours"), not name.startswith("naive")))


def _case(row: Row) -> list[str]:
    extras = [row["dtype"]] * (row["dtype"] != "float32") + [f"B={row['batch']}"] * (row["batch"] != "1")
    name = row["operation"] + (f" ({', '.join(extras)})" if extras else "")
    return [name, f"{row['side']}³", row["classes"], row["channels"] if row["channels"] != "0" else ""]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _measured(row: Row | None) -> bool:
    return row is not None and row.get("status") == "ok"


def _reason(row: Row | None) -> str:
    return row["status"].partition(":")[0] if row else ""


def _milliseconds(row: Row | None) -> str:
    if row is None or not _measured(row):
        return _reason(row)
    median, low, high = (1e3 * float(row[column]) for column in ("seconds", "seconds_q1", "seconds_q3"))
    return f"{_number(median)} ({_number(low)}–{_number(high)})"


def _spread(row: Row | None) -> str:
    if row is None or not _measured(row):
        return _reason(row)
    median, low, high = (float(row[column]) for column in ("ratio", "ratio_q1", "ratio_q3"))
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def _ratios(row: Row | None, *columns: str) -> str:
    return "; ".join(f"{float(row[column]):.2f}" for column in columns) if row else ""


def _mebibytes(row: Row | None, column: str) -> str:
    return _number(float(row[column]) / 2**20) if row is not None and _measured(row) else _reason(row)


def _quotient(row: Row | None, other: Row | None, column: str, *, less: float = 0.0) -> str:
    if row is None or other is None or not (_measured(row) and _measured(other)):
        return ""
    return f"{(float(row[column]) - less) / (float(other[column]) - less):.2f}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], *, left: int) -> str:
    """A Markdown table whose first ``left`` columns are words and the others numbers."""
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))

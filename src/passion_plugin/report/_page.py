"""One HTML file about a run: pictures and tables, everything embedded, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import io
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from passion_plugin.errors import ConfigError, require
from passion_plugin.evaluation import SubsetResults, caption, table_lines
from passion_plugin.report._curves import plot_distances, plot_preference
from passion_plugin.report._grids import plot_subsets
from passion_plugin.report._log import Run, read_run
from passion_plugin.training import EPOCH_QUANTITIES, by_modality, epoch_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["render", "write_report"]

# The policy forbids every request; what strangers named their modalities cannot change that.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ max-width: 100%; background: #fff; border-radius: 4px; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .15rem .7rem; border-bottom: 1px solid #8886; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; overflow-wrap: anywhere; }}
.facts td {{ text-align: left; overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; }}
summary {{ cursor: pointer; }}
footer {{ margin-top: 3rem; font-size: .85rem; opacity: .8; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_report(
    folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, command: str = ""
) -> tuple[Path, Run]:
    """Write the page of a run.

    Args:
        folder: of the run, see :mod:`passion_plugin.runs`.
        out: the file, ``.html``; None takes ``report.html`` in ``folder``. An earlier one is replaced.
        command: told at the end of the page.

    Returns:
        Where the page is, and what was read.

    Raises:
        ConfigError: there is nothing to report, a file of the run cannot be read, or ``out`` does not end in
            ``.html``: no other file is written over by mistake.
        ImportError: matplotlib is not installed (the ``plot`` extra).
    """
    path = Path(folder, "report.html") if out is None else Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{path}: the report is an HTML file; give it a name that ends in .html")
    run = read_run(folder)
    # File names need not be text; the page is.
    path.write_text(render(run, command=command), encoding="utf-8", errors="backslashreplace")
    return path, run


def render(run: Run, *, command: str = "") -> str:
    """Return the page of a run; the same run gives the same page.

    Args:
        run: what :func:`passion_plugin.runs.read_run` returned.
        command: told at the end of the page.
    """
    matplotlib = require("matplotlib", extra="plot", purpose="A report")
    notes = [*run.notes]
    parts = [*_epochs(run, notes), *_results(run.results, notes), *_overlays(run.overlays)]
    if run.facts:
        parts += ["<h2>About this run</h2>", _table([], _flattened(run.facts), kind="facts")]
    from passion_plugin import __version__

    versions = (
        f"passion-plugin {__version__}, torch {torch.__version__}, matplotlib {matplotlib.__version__}, "
        f"Python {platform.python_version()}"
    )
    made = f"Made by <code>{escape(command)}</code> with " if command else "Made with "
    hints = "".join(f"<li>{escape(note)}</li>" for note in notes)
    body = [
        f"<h1>{escape(run.name)}</h1>",
        *([f"<ul>{hints}</ul>"] if hints else []),
        *parts,
        f"<footer>{made}{escape(versions)}.</footer>",
    ]
    return _PAGE.format(title=escape(run.name), body="\n".join(body))


def _epochs(run: Run, notes: list[str]) -> list[str]:
    """What the epochs said about the modalities."""
    epochs = epoch_records(run.records)
    parts: list[str] = []
    if run.records and not epochs:
        notes.append("No epoch has ended yet: metrics.jsonl has no weights of modalities.")
    for title, draw, quantities in (
        ("EpochReport", plot_preference, ("relative_preference", "beta")),
        ("Distance to the fused prediction", plot_distances, ("epoch_distance",)),
    ):
        if any(by_modality(epoch, quantity) for epoch in epochs for quantity in quantities):
            parts += [f"<h2>{title}</h2>", _figure(draw(epochs), f"{title} by modality over the epochs")]
    if not parts:
        return parts
    last = epochs[-1]
    columns = [by_modality(last, quantity) for quantity in EPOCH_QUANTITIES]
    lines = [
        [name, *(f"{column[name]:.4f}" if name in column else "n/a" for column in columns)]
        for name in dict.fromkeys(name for column in columns for name in column)
    ]
    header = ["modality", "beta", "relative preference", "mean distance"]
    return [*parts, f"<h2>Last epoch: {last['epoch']:g}</h2>", _table(header, lines)]


def _results(results: Mapping[str, SubsetResults], notes: list[str]) -> list[str]:
    """A comparison of all models, then each model with its tables."""
    parts = ["<h2>Results by subset of modalities</h2>"] if results else []
    if len(results) > 1:
        for metric in dict.fromkeys(metric for each in results.values() for metric in each.metrics):
            having = {name: each for name, each in results.items() if metric in each.metrics}
            try:
                parts.append(_figure(plot_subsets(having, metric=metric), f"{metric} by model and subset"))
            except ConfigError as error:
                notes.append(f"The models are not compared by {metric}. {error}")
    for name, each in results.items():
        parts += [f"<h3>{escape(name)}</h3>"] if len(results) > 1 else []
        for metric in each.metrics:
            header, *lines = table_lines(each, "subset", metric, digits=1, sd=True)
            parts += [
                _figure(plot_subsets(each, metric=metric), f"{metric} of {name} by subset and target"),
                f"<details><summary>{escape(caption(each, metric, True))}</summary>{_table(header, lines)}</details>",
            ]
    return parts


def _overlays(overlays: Mapping[str, bytes]) -> list[str]:
    parts = ["<h2>Cases</h2>"] if overlays else []
    for name, data in overlays.items():
        parts += [f"<h3>{escape(name)}</h3>", _image(data, f"Predictions of {name} from subsets of modalities")]
    return parts


def _figure(figure: Figure, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return _image(buffer.getvalue(), description)


def _image(png: bytes, description: str) -> str:
    return f'<p><img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'


def _table(header: Sequence[str], lines: Iterable[Sequence[str]], kind: str = "") -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = [row(header, "th")] if header else []
    rows += [row(line, "td") for line in lines]
    return f'<div class="wide"><table class="{kind}">' + "\n".join(rows) + "</table></div>"


def _flattened(facts: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Lines of name and value; names of nested objects are joined by dots."""
    lines: list[list[str]] = []
    for key, value in facts.items():
        nested = isinstance(value, Mapping) and value
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        lines += _flattened(value, f"{prefix}{key}.") if nested else [[f"{prefix}{key}", shown]]
    return lines

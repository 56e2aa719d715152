"""One HTML file about a run: figures and tables, everything embedded, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import io
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from passion_plugin.errors import ConfigError, InputError, require
from passion_plugin.evaluation import SubsetResults, caption, table_lines
from passion_plugin.report._figures import plot_distances, plot_preference, plot_subsets
from passion_plugin.report._log import Run, read_run
from passion_plugin.training import EPOCH_QUANTITIES, by_modality, epoch_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The policy forbids every request, whatever the names in a run are.
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ max-width: 100%; background: #fff; }}
table {{ display: block; overflow-x: auto; border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .15rem .7rem; border-bottom: 1px solid #8886; text-align: right; overflow-wrap: anywhere; }}
th:first-child, td:first-child {{ text-align: left; }}
pre {{ overflow-x: auto; }}
footer {{ margin-top: 3rem; font-size: .85rem; opacity: .8; }}
</style>
{body}
</html>
"""


def write_report(
    folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, command: str = ""
) -> tuple[Path, Run]:
    """Write the page of a run; the same run gives the same page.

    Args:
        folder: of the run, see :func:`read_run`.
        out: the file, ``.html``; None takes ``report.html`` in ``folder``. An earlier one is replaced.
        command: shown at the end of the page.

    Returns:
        Where the page is, and what was read.

    Raises:
        ConfigError: there is nothing to report, a file of the run cannot be read, or ``out`` does not end in
            ``.html``: no other file is overwritten by mistake.
        ImportError: matplotlib is not installed (the ``plot`` extra).
    """
    path = Path(folder, "report.html") if out is None else Path(out)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{path}: the report is an HTML file; give it a name that ends in .html")
    matplotlib = require("matplotlib", extra="plot", purpose="A report")
    run = read_run(folder)
    notes = [*run.notes]
    parts = [*_epochs(run, notes), *_results(run.results, notes)]
    parts += ["<h2>Cases</h2>"] if run.overlays else []
    for name, data in run.overlays.items():
        parts += [f"<h3>{escape(name)}</h3>", _image(data, f"Predictions of {name} from subsets of modalities")]
    if run.facts:
        parts += ["<h2>About this run</h2>", f"<pre>{escape(json.dumps(run.facts, indent=2))}</pre>"]
    versions = (
        f"passion-plugin {version('passion-plugin')}, torch {torch.__version__}, matplotlib {matplotlib.__version__}, "
        f"Python {platform.python_version()}"
    )
    hints = "".join(f"<li>{escape(note)}</li>" for note in notes)
    maker = f"by <code>{escape(command)}</code> " if command else ""
    body = [f"<h1>{escape(run.name)}</h1>", f"<ul>{hints}</ul>" if hints else "", *parts]
    body.append(f"<footer>Made {maker}with {escape(versions)}.</footer>")
    path.write_text(_PAGE.format(title=escape(run.name), body="\n".join(body)), encoding="utf-8")
    return path, run


def _epochs(run: Run, notes: list[str]) -> list[str]:
    """Curves of the modalities, and a table of the last epoch."""
    epochs = epoch_records(run.records)
    if run.records and not epochs:
        notes.append("No epoch has ended yet: metrics.jsonl has no weights of modalities.")
    parts: list[str] = []
    for title, draw in (("Preference", plot_preference), ("Distance to the fused prediction", plot_distances)):
        with suppress(InputError):  # No epoch has such a quantity.
            parts += [f"<h2>{title}</h2>", _figure(draw(epochs), f"{title} by modality over the epochs")]
    if not parts:
        return parts
    last = epochs[-1]
    header = ["modality", "beta", "relative preference", "mean distance"]
    columns = [by_modality(last, quantity) for quantity in EPOCH_QUANTITIES]
    lines = [
        [name, *(f"{column[name]:.4f}" if name in column else "n/a" for column in columns)]
        for name in dict.fromkeys(name for column in columns for name in column)
    ]
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


def _figure(figure: Figure, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return _image(buffer.getvalue(), description)


def _image(png: bytes, description: str) -> str:
    return f'<p><img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join(["<table>", row(header, "th"), *(row(line, "td") for line in lines), "</table>"])

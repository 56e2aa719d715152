"""Figures of a training and its results, the log of a run, and one HTML page about it.

* :func:`plot_preference`, :func:`plot_distances`: each modality over the epochs;
* :func:`plot_subsets`: a metric by subset of modalities, of one model or of several;
* :func:`plot_overlay`: one case, predicted from every subset;
* :class:`RunLog`, :func:`read_run`, :func:`write_report`: the folder of a run, and its page.

Figures need ``pip install "passion-plugin[plot]"``. They are :class:`matplotlib.figure.Figure` objects made without
pyplot: they need no display, and nothing has to close them. For figures of your own there are :func:`new_figure`,
:func:`draw_grid`, :func:`draw_case`, :func:`label_legend`, :func:`best_slice` and :data:`COLOURS`.
"""

from passion_plugin.report._figures import (
    COLOURS,
    best_slice,
    draw_case,
    draw_grid,
    label_legend,
    new_figure,
    plot_distances,
    plot_overlay,
    plot_preference,
    plot_subsets,
)
from passion_plugin.report._log import Run, RunLog, read_run
from passion_plugin.report._page import write_report

__all__ = [
    "COLOURS",
    "Run",
    "RunLog",
    "best_slice",
    "draw_case",
    "draw_grid",
    "label_legend",
    "new_figure",
    "plot_distances",
    "plot_overlay",
    "plot_preference",
    "plot_subsets",
    "read_run",
    "write_report",
]

"""Pictures of a training and of its results, as matplotlib figures that no global state knows of.

Needs ``pip install "passion-plugin[plot]"``. Every function takes plain data and returns a
:class:`matplotlib.figure.Figure`: save it with ``figure.savefig(path)``, or let a notebook show it.

* :func:`plot_preference`, :func:`plot_distances`: what each epoch said about the modalities;
* :func:`plot_subsets`: a metric by subset of modalities, of one model or of several;
* :func:`plot_overlay`: one case, predicted from every subset.

For pictures of your own, ``passion_plugin.plot.canvas``, ``grids`` and ``overlay`` hold what these are drawn with.
"""

from __future__ import annotations

from passion_plugin.report._curves import plot_distances, plot_preference
from passion_plugin.report._grids import plot_subsets
from passion_plugin.report._overlay import plot_overlay
from passion_plugin.report._page import write_report

__all__ = ["plot_distances", "plot_overlay", "plot_preference", "plot_subsets", "write_report"]

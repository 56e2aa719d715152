"""What all pictures share: colours, a figure without global state, text as it was written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from passion_plugin.errors import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "line_style", "literal", "new_figure"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, told apart by colour-blind readers as well."""

_DASHES = ("-", "--", ":", "-.")


def new_figure(**options: Any) -> Figure:
    """Return an empty figure made without pyplot: it needs no display, and nothing has to close it.

    Raises:
        ImportError: matplotlib is not installed (the ``plot`` extra).
    """
    figure: Figure = require("matplotlib.figure", extra="plot", purpose="A picture").Figure(
        layout="constrained", **options
    )
    return figure


def line_style(k: int) -> dict[str, Any]:
    """Colour and dashes of curve ``k``; the dashes change where the colours come round again."""
    return {"color": COLOURS[k % len(COLOURS)], "linestyle": _DASHES[k // len(COLOURS) % len(_DASHES)]}


def literal(text: str) -> str:
    r"""Return a text that matplotlib shows as it is: a pair of ``$`` would be set as mathematics, or fail.

    Example:
        >>> literal("t1$x$")
        't1\\$x\\$'
    """
    return text.replace("$", r"\$")

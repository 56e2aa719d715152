"""The plain records that results are made of."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["DIFFERENCE", "STATUS", "Convention", "Grouping", "Row", "Summary"]

STATUS = ("ok", "one empty", "both empty")
"""Status of a scored row, by the number of empty masks (prediction, truth)."""

DIFFERENCE = " difference"
"""What :meth:`SubsetResults.compare` appends to the names of metrics."""

Grouping = Literal["subset", "modality", "size"]


class Row(NamedTuple):
    """One value.

    Attributes:
        subset: name such as ``"flair+t1ce"``.
        sample: id of the sample.
        target: class or region.
        metric: ``"dice"`` or ``"hd95"``, with ``" difference"`` behind it in a comparison.
        value: a finite number, or None when there is no score.
        status: ``"ok"``; ``"one empty"`` or ``"both empty"``: the convention decided; ``"missing"``: the
            sample lacks a modality of the subset; ``"unpaired"``: one side of a comparison has no score.
    """

    subset: str
    sample: str
    target: str
    metric: str
    value: float | None
    status: str


class Convention(NamedTuple):
    """How a metric was computed.

    Attributes:
        unit: ``"fraction"``, ``"mm"`` or ``"voxels"``.
        both_empty: the value where prediction and truth are empty; None leaves the sample out.
        one_empty: the value where exactly one of them is empty.
    """

    unit: str
    both_empty: float | None
    one_empty: float


class Summary(NamedTuple):
    """Mean and standard deviation of a group of values.

    Attributes:
        mean: mean over samples; over several subsets or targets the unweighted mean of their means, as
            published tables average their cells. NaN when there is no value.
        sd: standard deviation over samples (ddof = 1) of each sample's average in the group. NaN for n < 2.
        n: samples with at least one value.
    """

    mean: float
    sd: float
    n: int

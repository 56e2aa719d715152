"""Trial: a public backbone, ready to be tried, and what is expected of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor, nn

from passion_plugin import BackboneSpec

__all__ = ["Call", "Expectation", "Trial"]

Expectation = Literal["exact", "mixed", "rerun", "heads", "refused"]
"""What becomes of a backbone: replay that is exact, another rung of the ladder, or an error that says why not."""

Call = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of a call."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A public backbone of reduced size, how its user calls it, and what is expected of the library.

    Attributes:
        model: the network, in training mode.
        inputs: positional arguments as the user of that model passes them, usually ``(x, mask)``: a batch of 2 in
            which every modality is present and has content (except where the model takes batches of 1 only).
        keywords: keyword arguments of the same call.
        modalities: names, in mask-column order.
        spec: what the user passes as ``spec=``; None when nothing is needed.
        written: the lines that the user writes, for the table; the arguments of ``PassionWrapper`` besides backbone,
            modalities and rates.
        traps: what is easily done wrong with this model, for the table.
        expect: see :data:`Expectation`.
        reason: fragment of the error that must appear when it is refused.
        target: labels int64 (B, *spatial), or for regions float masks (B, K, *spatial).
        task_loss: ``(raw, target) -> scalar``, the user's own loss on what the model returns in training; None when the
            trial never gets to train.
        truth: dotted name of the module whose output are the logits of the fused prediction, as read in the source.
            The measurement listens there; it does not ask the library.
        alone: ``(m) -> Call``, what the user would pass to run the bare model on modality number ``m`` only, absent
            images zero (or whatever absent means to the model). None: the images of the others are zeroed along the
            channels of ``inputs[0]``, and ``inputs[1]`` becomes a bool mask with this column only.
        noisy: ``(m) -> Call``, the same with noise for images in place of the absent ones; None: as above.
            ``False``: the model knows absent modalities as blank images only, so that there is nothing to measure.
        prepare: called with the model before every pass that is compared; switches off what would make two runs of
            the model differ although nothing else does.
        wrap: further keyword arguments of ``PassionWrapper``.
        call: further keyword arguments of the wrapped call, such as ``passion_presence``.
        size: what was reduced, for the table.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    modalities: Sequence[str]
    spec: BackboneSpec | str | None
    written: str
    traps: str
    expect: Expectation
    target: Tensor
    reason: str = ""
    keywords: Mapping[str, Any] = field(default_factory=dict)
    task_loss: Callable[[Any, Tensor], Tensor] | None = None
    truth: str = ""
    alone: Callable[[int], Call] | None = None
    noisy: Callable[[int], Call] | Literal[False] | None = None
    prepare: Callable[[nn.Module], None] | None = None
    wrap: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    size: str = ""

    def __post_init__(self) -> None:
        if self.expect not in get_args(Expectation):
            raise ValueError(f"expect must be one of {get_args(Expectation)}, got {self.expect!r}")
        if (self.expect == "refused") != bool(self.reason):
            raise ValueError("reason= belongs to expect='refused': the fragment of the error that must appear")
        if self.expect != "refused" and (self.task_loss is None or not self.truth):
            raise ValueError("a model that trains needs task_loss= and truth=")

"""Trial: a public backbone, ready to be tried, and what is expected of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from passion_plugin.backbone import BackboneSpec

__all__ = ["Call", "Expectation", "Trial"]

Expectation = Literal["exact", "mixed", "rerun", "heads", "refused"]
"""What becomes of a backbone: replay that is exact, another student mode, or an error that says why not."""

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
        images: M tensors (B, C, *spatial), one for each modality; None: the channels of ``inputs[0]``.
        make: ``(images, present) -> Call``, what the user passes when only the modalities with ``present[m]`` are there
            and ``images`` are what the data set holds for them; all True gives ``inputs`` and ``keywords`` again. None:
            images along the channels and a bool mask (B, M). The measurement makes true single-modality runs of the
            bare model with it (absent images are zeros, ``make`` may put something else there) and steps in which the
            other modalities have other content.
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
    images: Sequence[Tensor] | None = None
    make: Callable[[Sequence[Tensor], Sequence[bool]], Call] | None = None
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

    def full(self) -> Call:
        """Return the call with every modality present."""
        return tuple(self.inputs), self.keywords

    def alone(self, m: int) -> Call:
        """Return the call of the bare model with modality number ``m`` only, the others blank."""
        return self._made([image if k == m else torch.zeros_like(image) for k, image in enumerate(self._images())], m)

    def disturbed(self, m: int) -> Call:
        """Return the call with every modality present, in which all but number ``m`` have other content."""
        generator = torch.Generator().manual_seed(m + 1)
        noise = [torch.randn(image.shape, generator=generator).to(image) for image in self._images()]
        return self._made([image if k == m else noise[k] for k, image in enumerate(self._images())], None)

    def _images(self) -> Sequence[Tensor]:
        return self.images if self.images is not None else self.inputs[0].split(1, dim=1)

    def _made(self, images: Sequence[Tensor], only: int | None) -> Call:
        present = [only is None or k == only for k in range(len(images))]
        if self.make is not None:
            return self.make(images, present)
        return (torch.cat(list(images), dim=1), torch.tensor([present] * len(images[0]))), {}

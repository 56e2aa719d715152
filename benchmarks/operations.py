"""The loss terms that are measured, each as a naive formula, a plain definition to compile, and ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks import naive
from benchmarks.floor import Work
from passion_plugin import losses
from passion_plugin._types import Backend
from passion_plugin.losses._pixel import plain_pixel_distillation
from passion_plugin.losses._prototype import plain_prototype_distillation
from passion_plugin.losses._segmentation import plain_segmentation

__all__ = ["OPERATIONS", "Inputs", "Loss", "Operation", "forward_backward"]


@dataclass(frozen=True)
class Inputs:
    """Student with gradient and teacher (B, K or C, *spatial), labels (B, *spatial), K."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    classes: int

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return self.student.nbytes + self.teacher.nbytes + self.labels.nbytes

    def to(self, dtype: torch.dtype) -> Inputs:
        """Return them in another dtype, connected by autograd."""
        return replace(self, student=self.student.to(dtype), teacher=self.teacher.to(dtype))


Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Operation:
    """A loss term in three forms, each from inputs to (B,).

    Attributes:
        naive: the formula as a reader would write it.
        plain: the definition in the library, which ``torch.compile`` is given.
        ours: the public function, with a keyword ``backend``.
        work: what forward and backward on such inputs cannot do without.
        on_features: whether student and teacher are features rather than logits.
        coarser: how many times smaller than the image the inputs are along each axis.
        others: further forms to measure, by name.
    """

    naive: Loss
    plain: Loss
    ours: Callable[..., Tensor]
    work: Callable[[Inputs], Work]
    on_features: bool = False
    coarser: int = 1
    others: Mapping[str, Loss] = field(default_factory=dict)


def forward_backward(loss: Loss, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the values (B,) and the gradient of their sum for the student."""
    values = loss(inputs)
    return values.detach(), torch.autograd.grad(values.sum(), inputs.student)[0]


def _in_single(loss: Loss) -> Loss:
    """Cast half precision up first: the naive formulas sum over volumes in the dtype that they are given."""
    return lambda x: loss(x.to(torch.promote_types(x.student.dtype, torch.float32)))


def _prototype_work(x: Inputs) -> Work:
    # The maps depend on sums over all voxels: forward goes over everything twice, backward once and writes.
    once = x.student.nbytes + x.teacher.nbytes + x.labels.nbytes
    product = 2 * x.classes
    maps = product * (x.student.numel() + x.teacher.numel())
    # Maps forward and backward, and the products of the gaps with features and with prototypes.
    return Work(3 * once + x.student.nbytes, flops=2 * maps + 2 * product * x.student.numel())


def _segmentation_work(x: Inputs) -> Work:
    return Work(3 * x.student.nbytes + 2 * x.labels.nbytes, exponentials=2 * x.student.numel())


def _pixel(mode: Literal["default", "official"] = "default", scale_factor: int = 1) -> Operation:
    official = mode == "official"

    def by_hand(x: Inputs) -> Tensor:
        return naive.pixel_distillation(x.student, x.teacher, official=official, scale_factor=scale_factor)

    def plain(x: Inputs) -> Tensor:
        kind = "clamped" if official else "softmax"
        return plain_pixel_distillation(x.student, x.teacher, 4.0, kind, scale_factor)

    def ours(x: Inputs, backend: Backend = "auto") -> Tensor:
        return losses.pixel_distillation(x.student, x.teacher, mode=mode, scale_factor=scale_factor, backend=backend)

    def work(x: Inputs) -> Work:
        # Forward reads both, backward reads both and writes a gradient; each time a softmax of both.
        nbytes = 2 * (x.student.nbytes + x.teacher.nbytes) + x.student.nbytes
        # A clamped probability needs a logarithm of its own, at the size of the image; as slow as an exponential.
        logarithms = x.student.numel() * scale_factor ** (x.student.ndim - 2) if official else 0
        return Work(nbytes, exponentials=4 * x.student.numel() + logarithms)

    return Operation(_in_single(by_hand), plain, ours, work, coarser=scale_factor)


def _prototype() -> Operation:
    def by_hand(x: Inputs) -> Tensor:
        return naive.prototype_distillation(x.student, x.teacher, x.labels, x.classes)[0]

    def by_sums(x: Inputs) -> Tensor:
        return naive.prototype_distillation(x.student, x.teacher, x.labels, x.classes, naive.cosine_by_sums)[0]

    def plain(x: Inputs) -> Tensor:
        return plain_prototype_distillation(x.student, x.teacher, x.labels, x.classes, False, None)[0]

    def ours(x: Inputs, backend: Backend = "auto") -> Tensor:
        return losses.prototype_distillation(
            x.student, x.teacher, x.labels, x.classes, check_values=False, backend=backend
        )[0]

    return Operation(
        _in_single(by_hand), plain, ours, _prototype_work, True, others={"naive, own cosine": _in_single(by_sums)}
    )


def _segmentation() -> Operation:
    def by_hand(x: Inputs) -> Tensor:
        return naive.segmentation_loss(x.student, x.labels)

    def plain(x: Inputs) -> Tensor:
        entropy, dice = plain_segmentation(x.student, x.labels, 0.0, None)
        return entropy + dice

    def ours(x: Inputs, backend: Backend = "auto") -> Tensor:
        return losses.segmentation_loss(x.student, x.labels, check_values=False, backend=backend)

    return Operation(_in_single(by_hand), plain, ours, _segmentation_work)


OPERATIONS: dict[str, Operation] = {
    "pixel": _pixel(),
    "pixel-official": _pixel("official"),
    "pixel-official-upsampled": _pixel("official", scale_factor=2),
    "prototype": _prototype(),
    "segmentation": _segmentation(),
}
"""``segmentation`` is weighted cross-entropy plus Dice; the up-sampled form has logits of half the side."""

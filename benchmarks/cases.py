"""The points of a sweep: inputs, candidates, and the check that all of these compute the same."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.measure import ParityError, available_bytes, peak_memory, relative_error
from benchmarks.operations import OPERATIONS, Inputs, Loss, forward_backward

__all__ = ["Case", "candidates", "check_parity", "draw_inputs", "parity_case", "shells", "too_large"]

_SMALL_SIDE = 32
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3}


@dataclass(frozen=True)
class Case:
    """One point of a sweep.

    Attributes:
        operation: key of :data:`~benchmarks.operations.OPERATIONS`.
        side: voxels along each of the three axes of the image.
        classes: K.
        channels: C of the features; 0 for an operation on logits.
        batch: B.
        dtype: of logits and features.
    """

    operation: str
    side: int
    classes: int
    channels: int
    batch: int = 1
    dtype: str = "float32"

    def __str__(self) -> str:
        channels = f", C={self.channels}" if self.channels else ""
        return f"{self.operation}, {self.batch} x {self.side}^3, K={self.classes}{channels}, {self.dtype}"


def draw_inputs(case: Case, device: torch.device) -> Inputs:
    """Draw labels in which every class occurs, and normal numbers around a mean of each class.

    Without means of their own the class prototypes would be next to zero, and their directions mostly rounding.
    """
    generator = torch.Generator().manual_seed(0)
    operation = OPERATIONS[case.operation]
    side = case.side // operation.coarser
    channels = case.channels if operation.on_features else case.classes
    labels = shells((side,) * 3, case.classes)
    means = torch.randn(case.classes, channels, generator=generator)[labels].movedim(-1, 0)
    shape = (case.batch, *means.shape)
    student, teacher = (
        (means + torch.randn(shape, generator=generator)).to(device, getattr(torch, case.dtype)) for _ in range(2)
    )
    return Inputs(student.requires_grad_(), teacher, labels.repeat(case.batch, 1, 1, 1).to(device), case.classes)


def shells(spatial: tuple[int, ...], classes: int) -> Tensor:
    """Return int64 labels: shells of equal volume around the centre, the last class innermost.

    Example:
        >>> shells((1, 6), 3).tolist()
        [[0, 1, 2, 2, 1, 0]]
    """
    axes = [torch.linspace(-1, 1, size) if size > 1 else torch.zeros(1) for size in spatial]
    distance = sum((axis**2 for axis in torch.meshgrid(*axes, indexing="ij")), torch.zeros(()))
    rank = distance.flatten().argsort(stable=True).argsort().view(spatial)
    return classes - 1 - rank * classes // rank.numel()


def candidates(case: Case, device: torch.device) -> dict[str, Loss]:
    """Return the implementations by name; on CUDA also our eager body, which is what ``ours`` is on the CPU."""
    operation = OPERATIONS[case.operation]
    # Every case is compiled for its own sizes, as in a training with patches of one size.
    torch.compiler.reset()
    compiled = torch.compile(operation.plain, dynamic=False)
    found: dict[str, Loss] = {"naive": operation.naive, **operation.others, "compiled": compiled}
    if device.type == "cuda":
        found["eager"] = functools.partial(operation.ours, backend="eager")
    return {**found, "ours": operation.ours}


def too_large(case: Case, device: torch.device, *, double: bool = False) -> str:
    """Say how much memory the naive formula would need if that is more than there is, else nothing."""
    small = replace(case, side=min(case.side, _SMALL_SIDE))
    growth = (case.side / small.side) ** 3 * (2 if double else 1)
    needed = _naive_bytes(small, device) * growth
    return f"would need {needed / 2**30:.0f} GiB" if needed > available_bytes(device) else ""


@functools.cache
def _naive_bytes(case: Case, device: torch.device) -> int:
    inputs = draw_inputs(case, device)
    return inputs.nbytes + peak_memory(lambda: forward_backward(OPERATIONS[case.operation].naive, inputs), device)


def parity_case(case: Case, device: torch.device) -> Case:
    """Return the case itself, or the largest one like it for which the reference has enough memory."""
    sides = [case.side, *(side for side in (96, 64) if side < case.side)]
    fitting = (side for side in sides if not too_large(replace(case, side=side), device, double=True))
    return replace(case, side=next(fitting, _SMALL_SIDE))


def check_parity(case: Case, found: Mapping[str, Loss], device: torch.device) -> None:
    """Compare values and gradients of every candidate with the reference, the naive formula in float64.

    Raises:
        ParityError: naming candidate, case and error.
    """
    inputs = draw_inputs(case, device)
    reference = forward_backward(lambda x: OPERATIONS[case.operation].naive(x.to(torch.float64)), inputs)
    for name, loss in found.items():
        for what, value, truth in zip(("value", "gradient"), forward_backward(loss, inputs), reference, strict=True):
            error = relative_error(value, truth)
            # Not `error > tolerance`, which NaN would pass.
            if not error <= _TOLERANCE[case.dtype]:
                raise ParityError(
                    f"{name!r} does not compute what it should: the {what} of {case} is off by {error:.2g}, allowed "
                    f"is {_TOLERANCE[case.dtype]:g}. Nothing is reported"
                )

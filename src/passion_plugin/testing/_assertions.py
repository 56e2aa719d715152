"""Assertions about losses that compare a student with a teacher, or a prediction with labels.

``loss`` is any callable that returns one value per sample (B,), or a tuple whose first entry is that. Fix
further arguments with a lambda or ``functools.partial``. The tolerances are meant for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from passion_plugin.testing._calls import Function, assert_same, floating, gradients, outputs

__all__ = [
    "assert_batch_independent",
    "assert_class_permutation_invariant",
    "assert_computed_in_float32",
    "assert_independent_of_layout",
    "assert_matches_reference",
    "assert_no_gradient_to_teacher",
    "assert_nonnegative",
    "assert_voxel_permutation_invariant",
    "assert_zero_at_teacher",
]

_STEP = 1e-6


def assert_matches_reference(
    loss: Function,
    reference: Function,
    *arguments: Any,
    rtol: float = 1e-9,
    atol: float = 1e-10,
    gradient: bool = True,
    gradient_rtol: float = 1e-5,
    gradient_atol: float = 1e-6,
) -> None:
    """The loss equals a reference, and its gradient the slope of that reference.

    The slope is the central difference of the reference along a random direction of the FIRST argument, with
    random weights on the samples: one number, which is wrong if any part of the gradient is. Switch it off at
    inputs where the loss has a kink.

    Args:
        loss: computes with tensors.
        reference: takes the same arguments; may return NumPy arrays.
        *arguments: of both.
        rtol: relative tolerance of the values.
        atol: absolute tolerance of the values.
        gradient: whether to check the gradient.
        gradient_rtol: relative tolerance of the slope.
        gradient_atol: absolute tolerance of the slope.

    Raises:
        AssertionError: they differ.
    """
    expected = reference(*arguments)
    assert_same(loss(*arguments), expected, rtol=rtol, atol=atol, what="the loss is not its reference")
    if not gradient:
        return
    point, rest = arguments[0], arguments[1:]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(point.shape, dtype=point.dtype, generator=generator)
    weight = torch.randn(outputs(expected)[0].shape, dtype=point.dtype, generator=generator)
    above, below = (outputs(reference(point + sign * _STEP * direction, *rest))[0] for sign in (1, -1))
    slope = (weight * (above - below)).sum() / (2 * _STEP)
    (found, *_) = gradients(loss, arguments, weight)
    assert found is not None
    assert_same(
        (found * direction).sum(),
        slope,
        rtol=gradient_rtol,
        atol=gradient_atol,
        what="the gradient of the loss is not the slope of its reference",
    )


def assert_zero_at_teacher(loss: Function, teacher: Tensor, *, atol: float = 0.0) -> None:
    """A student that equals its teacher costs nothing and is pushed nowhere.

    Args:
        loss: ``loss(student, teacher)``.
        teacher: used as both.
        atol: largest absolute value that counts as zero, of the loss and of the student's gradient.

    Raises:
        AssertionError: the loss, another output or the gradient is not zero.
    """
    for value in outputs(loss(teacher.clone(), teacher)):
        assert_same(value, torch.zeros_like(value), rtol=0, atol=atol, what="not zero at student = teacher")
    found = gradients(lambda student: loss(student, teacher), (teacher,))[0]
    assert found is not None
    assert_same(found, torch.zeros_like(found), rtol=0, atol=atol, what="gradient at student = teacher is not zero")


def assert_no_gradient_to_teacher(loss: Function, student: Tensor, teacher: Tensor) -> None:
    """The student is trained, the teacher is not.

    Args:
        loss: ``loss(student, teacher)``.
        student: at a point where the loss has a gradient.
        teacher: differs from the student.

    Raises:
        AssertionError: the teacher gets a gradient, or the student gets none.
    """
    to_student, to_teacher = gradients(loss, (student, teacher))
    if to_student is None or not bool(to_student.any()):
        raise AssertionError("the student gets no gradient: it was detached, or the inputs are where it is zero")
    if to_teacher is not None and bool(to_teacher.any()):
        size = to_teacher.abs().max().item()
        raise AssertionError(f"the teacher gets a gradient (up to {size:.3g}): detach it inside the loss")


def assert_batch_independent(loss: Function, *tensors: Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """A sample's value does not depend on the other samples of the batch, nor does its gradient reach them.

    Args:
        loss: of the tensors, one value per sample in every output.
        *tensors: each with the batch first; B >= 2.
        rtol: relative tolerance.
        atol: absolute tolerance.

    Raises:
        AssertionError: it does.
        ValueError: the batch has fewer than two samples, so nothing could be checked.
    """
    size = len(tensors[0])
    if size < 2:
        raise ValueError("assert_batch_independent: pass at least two samples")
    together = outputs(loss(*tensors))
    for value in together:
        if value.ndim == 0 or len(value) != size:
            raise AssertionError(
                f"the loss has shape {tuple(value.shape)} instead of one value for each of {size} samples"
            )
    for b in range(size):
        alone = outputs(loss(*(tensor[b : b + 1] for tensor in tensors)))
        rows = tuple(value[b : b + 1] for value in together)
        assert_same(rows, alone, rtol=rtol, atol=atol, what=f"sample {b} depends on its batch")
        only = torch.zeros(size, dtype=together[0].dtype)
        only[b] = 1
        for found in gradients(loss, tensors, only):
            if found is not None and bool(torch.cat((found[:b], found[b + 1 :])).any()):
                raise AssertionError(f"the gradient of sample {b} reaches other samples of its batch")


def assert_nonnegative(loss: Function, *arguments: Any, atol: float = 1e-12) -> None:
    """No output of the loss is negative.

    Args:
        loss: of the arguments.
        *arguments: passed on.
        atol: how far below zero rounding may lead.

    Raises:
        AssertionError: one is, or is NaN.
    """
    for value in outputs(loss(*arguments)):
        if not bool((value >= -atol).all()):
            raise AssertionError(f"the loss is negative or NaN: {value.detach().tolist()}")


def assert_class_permutation_invariant(
    loss: Function, labels: Tensor | None, *maps: Tensor, rtol: float = 1e-9, atol: float = 1e-12
) -> None:
    """Renaming the classes, in maps and labels alike, changes nothing.

    Args:
        loss: ``loss(*maps, labels)``, or ``loss(*maps)`` where labels are None.
        labels: class numbers (B, *spatial), or None.
        *maps: (B, K, *spatial), channel = class.
        rtol: relative tolerance.
        atol: absolute tolerance.

    Raises:
        AssertionError: it does.
    """
    classes = maps[0].shape[1]
    before = loss(*maps) if labels is None else loss(*maps, labels)
    for order in (torch.arange(classes).roll(1), torch.arange(classes).flip(0)):
        renamed = [values[:, order] for values in maps]
        after = loss(*renamed) if labels is None else loss(*renamed, order.argsort()[labels])
        what = f"the loss changes when class k becomes class {order.argsort().tolist()}[k]"
        assert_same(after, before, rtol=rtol, atol=atol, what=what)


def assert_voxel_permutation_invariant(
    loss: Function, *tensors: Tensor, rtol: float = 1e-9, atol: float = 1e-12
) -> None:
    """Shuffling the voxels of all tensors alike changes nothing: the loss has no geometry.

    Args:
        loss: of the tensors.
        *tensors: the first (B, C, *spatial); others (B, C', *spatial) or (B, *spatial).
        rtol: relative tolerance.
        atol: absolute tolerance.

    Raises:
        AssertionError: it does.
    """
    axes = tensors[0].ndim - 2
    voxels = tensors[0][0, 0].numel()
    order = torch.randperm(voxels, generator=torch.Generator().manual_seed(0))
    shuffled = [tensor.flatten(-axes)[..., order].view(tensor.shape) for tensor in tensors]
    what = "the loss changes when voxels are shuffled"
    assert_same(loss(*shuffled), loss(*tensors), rtol=rtol, atol=atol, what=what)


def assert_independent_of_layout(loss: Function, *tensors: Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Strides do not matter: channels last, transposed and sliced inputs give the same values and gradients.

    Args:
        loss: of the tensors.
        *tensors: (B, ...) each.
        rtol: relative tolerance.
        atol: absolute tolerance.

    Raises:
        AssertionError: they do matter, or the loss cannot take such inputs.
    """
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "channels last": lambda tensor: tensor.movedim(1, -1).contiguous().movedim(-1, 1),
        "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": lambda tensor: torch.stack((tensor, tensor), -1)[..., 0],
    }
    plain = tuple(tensor.contiguous() for tensor in tensors)
    values, slopes = loss(*plain), gradients(loss, plain)
    for name, arrange in layouts.items():
        arranged = tuple(arrange(tensor) for tensor in plain)
        try:
            found = loss(*arranged)
            slopes_found = gradients(_arranged(loss, arrange), plain)
        except RuntimeError as error:
            raise AssertionError(f"the loss fails on {name} inputs: {error}") from error
        assert_same(found, values, rtol=rtol, atol=atol, what=f"values differ on {name} inputs")
        for slope, expected in zip(slopes_found, slopes, strict=True):
            if slope is not None:
                assert_same(slope, expected, rtol=rtol, atol=atol, what=f"gradients differ on {name} inputs")


def _arranged(loss: Function, arrange: Callable[[Tensor], Tensor]) -> Function:
    return lambda *tensors: loss(*map(arrange, tensors))


def assert_computed_in_float32(loss: Function, *tensors: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    """Low-precision inputs are rounded once, by the caller, and never again inside, with autocast or without.

    Args:
        loss: of the tensors.
        *tensors: floating ones are rounded to ``dtype``, labels are left alone.
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Raises:
        AssertionError: an output is not float32, or not what the same values give in float64 (to 1e-4).
    """
    low = [tensor.to(dtype) if floating(tensor) else tensor for tensor in tensors]
    exact = loss(*(tensor.double() if floating(tensor) else tensor for tensor in low))
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = outputs(loss(*low))
        where = f"{dtype} inputs, autocast {'on' if autocast else 'off'}"
        for value in found:
            if value.dtype != torch.float32:
                raise AssertionError(f"{where}: the result is {value.dtype}, not float32")
        assert_same(found, exact, rtol=1e-4, atol=1e-5, what=f"{where}: not computed in float32")

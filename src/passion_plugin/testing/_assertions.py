"""Assertions about losses (student against teacher, prediction against labels) and about rules over modalities.

The docstring of the package says what all of them have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Function: TypeAlias = Callable[..., Any]

_STEP = 1e-6
_POISONS = (math.nan, math.inf, -math.inf, 1e30)


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
    random weights on the samples: one number, which is wrong if any part of the gradient is.

    Args:
        loss: computes with tensors.
        reference: takes the same arguments; may return NumPy arrays.
        *arguments: of both.
        rtol: relative tolerance of the values.
        atol: absolute tolerance of the values.
        gradient: whether to check the gradient; switch it off at inputs where the loss has a kink.
        gradient_rtol: relative tolerance of the slope.
        gradient_atol: absolute tolerance of the slope.
    """
    expected = reference(*arguments)
    _assert_same(loss(*arguments), expected, rtol=rtol, atol=atol, what="the loss is not its reference")
    if not gradient:
        return
    point, rest = arguments[0], arguments[1:]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(point.shape, dtype=point.dtype, generator=generator)
    weight = torch.randn(_outputs(expected)[0].shape, dtype=point.dtype, generator=generator)
    above, below = (_outputs(reference(point + sign * _STEP * direction, *rest))[0] for sign in (1, -1))
    slope = (weight * (above - below)).sum() / (2 * _STEP)
    (found, *_) = _gradients(loss, arguments, weight)
    assert found is not None
    what = "the gradient of the loss is not the slope of its reference"
    _assert_same((found * direction).sum(), slope, rtol=gradient_rtol, atol=gradient_atol, what=what)


def assert_zero_at_teacher(loss: Function, teacher: Tensor, *, atol: float = 0.0) -> None:
    """Every output of ``loss(student, teacher)`` and the gradient are zero where the student equals its teacher."""
    for value in _outputs(loss(teacher.clone(), teacher)):
        _assert_same(value, torch.zeros_like(value), rtol=0, atol=atol, what="not zero at student = teacher")
    found = _gradients(lambda student: loss(student, teacher), (teacher,))[0]
    assert found is not None
    _assert_same(found, torch.zeros_like(found), rtol=0, atol=atol, what="gradient at student = teacher is not zero")


def assert_no_gradient_to_teacher(loss: Function, student: Tensor, teacher: Tensor) -> None:
    """``loss(student, teacher)`` has a gradient for the student, here not zero, and none for the teacher."""
    to_student, to_teacher = _gradients(loss, (student, teacher))
    if to_student is None or not bool(to_student.any()):
        raise AssertionError("the student gets no gradient: it was detached, or the inputs are where it is zero")
    if to_teacher is not None and bool(to_teacher.any()):
        size = to_teacher.abs().max().item()
        raise AssertionError(f"the teacher gets a gradient (up to {size:.3g}): detach it inside the loss")


def assert_batch_independent(loss: Function, *tensors: Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """A sample's value does not depend on the other samples of the batch, nor does its gradient reach them.

    ``loss(*tensors)`` takes tensors with the batch first; every output has one value per sample.

    Raises:
        ValueError: the batch has fewer than two samples, so nothing could be checked.
    """
    size = len(tensors[0])
    if size < 2:
        raise ValueError("assert_batch_independent: pass at least two samples")
    together = _outputs(loss(*tensors))
    for value in together:
        if value.ndim == 0 or len(value) != size:
            shape = tuple(value.shape)
            raise AssertionError(f"the loss has shape {shape} instead of one value for each of {size} samples")
    for b in range(size):
        alone = _outputs(loss(*(tensor[b : b + 1] for tensor in tensors)))
        rows = tuple(value[b : b + 1] for value in together)
        _assert_same(rows, alone, rtol=rtol, atol=atol, what=f"sample {b} depends on its batch")
        only = torch.zeros(size, dtype=together[0].dtype)
        only[b] = 1
        for found in _gradients(loss, tensors, only):
            if found is not None and bool(torch.cat((found[:b], found[b + 1 :])).any()):
                raise AssertionError(f"the gradient of sample {b} reaches other samples of its batch")


def assert_nonnegative(loss: Function, *arguments: Any, atol: float = 1e-12) -> None:
    """No output of ``loss(*arguments)`` is NaN or negative; rounding may lead ``atol`` below zero."""
    for value in _outputs(loss(*arguments)):
        if not bool((value >= -atol).all()):
            raise AssertionError(f"the loss is negative or NaN: {value.detach().tolist()}")


def assert_class_permutation_invariant(
    loss: Function, labels: Tensor | None, *maps: Tensor, rtol: float = 1e-9, atol: float = 1e-12
) -> None:
    """Renaming the classes, in maps and labels alike, changes nothing.

    The loss is ``loss(*maps, labels)`` of maps (B, K, *spatial), channel = class, and class numbers (B, *spatial); or
    ``loss(*maps)`` where labels are None.
    """
    classes = torch.arange(maps[0].shape[1])
    before = loss(*maps) if labels is None else loss(*maps, labels)
    for order in (classes.roll(1), classes.flip(0)):
        names, renamed = order.argsort(), [values[:, order] for values in maps]
        after = loss(*renamed) if labels is None else loss(*renamed, names[labels])
        what = f"the loss changes when class k becomes class {names.tolist()}[k]"
        _assert_same(after, before, rtol=rtol, atol=atol, what=what)


def assert_voxel_permutation_invariant(
    loss: Function, *tensors: Tensor, rtol: float = 1e-9, atol: float = 1e-12
) -> None:
    """Shuffling the voxels of all tensors alike changes nothing in ``loss(*tensors)``: it has no geometry.

    The first tensor is (B, C, *spatial), others are (B, C', *spatial) or (B, *spatial).
    """
    axes = tensors[0].ndim - 2
    order = torch.randperm(tensors[0][0, 0].numel(), generator=torch.Generator().manual_seed(0))
    shuffled = [tensor.flatten(-axes)[..., order].view(tensor.shape) for tensor in tensors]
    what = "the loss changes when voxels are shuffled"
    _assert_same(loss(*shuffled), loss(*tensors), rtol=rtol, atol=atol, what=what)


def assert_independent_of_layout(loss: Function, *tensors: Tensor, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    """Channels last, transposed and sliced inputs (B, ...) give the same values and gradients of ``loss(*tensors)``."""
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "channels last": lambda tensor: tensor.movedim(1, -1).contiguous().movedim(-1, 1),
        "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": lambda tensor: torch.stack((tensor, tensor), -1)[..., 0],
    }
    plain = tuple(tensor.contiguous() for tensor in tensors)
    values, slopes = loss(*plain), _gradients(loss, plain)
    for name, arrange in layouts.items():

        def arranged(*inputs: Tensor, _arrange: Callable[[Tensor], Tensor] = arrange) -> Any:
            return loss(*map(_arrange, inputs))

        try:
            found, slopes_found = arranged(*plain), _gradients(arranged, plain)
        except RuntimeError as error:
            raise AssertionError(f"the loss fails on {name} inputs: {error}") from error
        _assert_same(found, values, rtol=rtol, atol=atol, what=f"values differ on {name} inputs")
        for slope, expected in zip(slopes_found, slopes, strict=True):
            if slope is not None:
                _assert_same(slope, expected, rtol=rtol, atol=atol, what=f"gradients differ on {name} inputs")


def assert_computed_in_float32(loss: Function, *tensors: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
    """Low-precision inputs give the float32 values of the same numbers in float64 (to 1e-4), under autocast too.

    Floating tensors of ``loss(*tensors)`` are rounded to ``dtype``, bfloat16 or float16; labels are left alone.
    """
    low = [tensor.to(dtype) if _is_floating(tensor) else tensor for tensor in tensors]
    exact = loss(*(tensor.double() if _is_floating(tensor) else tensor for tensor in low))
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = _outputs(loss(*low))
        where = f"{dtype} inputs, autocast {'on' if autocast else 'off'}"
        for value in found:
            if value.dtype != torch.float32:
                raise AssertionError(f"{where}: the result is {value.dtype}, not float32")
        _assert_same(found, exact, rtol=1e-4, atol=1e-5, what=f"{where}: not computed in float32")


def assert_modality_permutation_equivariant(
    rule: Function, *tables: Tensor, rtol: float = 1e-9, atol: float = 1e-12
) -> None:
    """Results of ``rule(*tables)`` follow their modalities when the columns, the last axis of all, change places."""
    before = _outputs(rule(*tables))
    for order in _orders(tables[0].shape[-1]):
        after = rule(*(table[..., order] for table in tables))
        moved = tuple(value[..., order] for value in before)
        what = f"results do not follow their modalities into the order {order.tolist()}"
        _assert_same(after, moved, rtol=rtol, atol=atol, what=what)


def assert_modality_permutation_invariant(
    rule: Function, *tables: Tensor, rtol: float = 1e-9, atol: float = 1e-12
) -> None:
    """Results of ``rule(*tables)`` do not change when the columns, the last axis of all tables, change places."""
    before = rule(*tables)
    for order in _orders(tables[0].shape[-1]):
        after = rule(*(table[..., order] for table in tables))
        what = f"the result changes when the modalities are in the order {order.tolist()}"
        _assert_same(after, before, rtol=rtol, atol=atol, what=what)


def assert_invariant_to_absent_content(rule: Function, presence: Tensor, *tables: Tensor) -> None:
    """What stands where a modality is absent changes nothing, be it NaN, and gets a gradient of exactly 0.

    ``rule(*tables)`` of floating tables (B, M) or (B, M, *spatial) knows by itself what ``presence`` says, bool (B, M).

    Raises:
        ValueError: nothing is absent, so nothing could be checked.
    """
    if bool(presence.all()):
        raise ValueError("assert_invariant_to_absent_content: no modality is absent, nothing to check")
    absent = [~presence.view(presence.shape + (1,) * (table.ndim - 2)).expand_as(table) for table in tables]
    clean = tuple(table.masked_fill(gap, 0.0) for table, gap in zip(tables, absent, strict=True))
    before, slopes = rule(*clean), _gradients(rule, clean)
    for poison in _POISONS:
        poisoned = tuple(table.masked_fill(gap, poison) for table, gap in zip(tables, absent, strict=True))
        what = f"{poison} in an absent modality"
        _assert_same(rule(*poisoned), before, rtol=0, atol=0, what=f"{what} changes the result")
        for slope, expected, gap in zip(_gradients(rule, poisoned), slopes, absent, strict=True):
            assert slope is not None
            if bool((slope[gap] != 0).any()):
                raise AssertionError(f"{what} gets a gradient that is not 0")
            _assert_same(slope, expected, rtol=0, atol=0, what=f"{what} changes the gradient")


def _orders(modalities: int) -> Iterator[Tensor]:
    """Every rotation and the reversal, without the identity."""
    columns = torch.arange(modalities)
    for shift in range(1, modalities):
        yield columns.roll(shift)
    yield columns.flip(0)


def _outputs(result: Any) -> tuple[Tensor, ...]:
    """What a loss or reference returned, as a tuple of tensors; the first is the one that is trained on."""
    values = result if isinstance(result, tuple) else (result,)
    return tuple(value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value)) for value in values)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _gradients(function: Function, arguments: tuple[Any, ...], weight: Tensor | None = None) -> list[Tensor | None]:
    """Gradient of ``sum(weight * function(*arguments))`` for each argument: zeros if unused, None if not floating."""
    leaves = [value.detach().clone().requires_grad_() if _is_floating(value) else value for value in arguments]
    value = _outputs(function(*leaves))[0]
    wanted = [leaf for leaf in leaves if _is_floating(leaf)]
    if not value.requires_grad:
        found = iter([torch.zeros_like(leaf) for leaf in wanted])
    else:
        scalar = value.sum() if weight is None else (value * weight).sum()
        found = iter(torch.autograd.grad(scalar, wanted, allow_unused=True, materialize_grads=True))
    return [next(found) if _is_floating(leaf) else None for leaf in leaves]


def _assert_same(actual: Any, expected: Any, *, rtol: float, atol: float, what: str) -> None:
    """Compare values and shapes in float64 and say what was expected to be the same."""
    left, right = _outputs(actual), _outputs(expected)
    if len(left) != len(right):
        raise AssertionError(f"{what}: {len(left)} outputs instead of {len(right)}")
    for number, (one, other) in enumerate(zip(left, right, strict=True)):
        name = what if len(left) == 1 else f"{what} (output {number})"
        if one.shape != other.shape:
            raise AssertionError(f"{name}: shape {tuple(one.shape)} instead of {tuple(other.shape)}")
        try:
            torch.testing.assert_close(one.detach().double(), other.detach().double(), rtol=rtol, atol=atol)
        except AssertionError as error:
            raise AssertionError(f"{name}.\n{error}") from None

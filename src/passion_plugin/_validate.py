"""Checks of user arguments: types, ranges, tensors, labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from passion_plugin.errors import ConfigError, InputError, PassionError, raise_problems, suggest

__all__ = [
    "Problems",
    "as_tuple",
    "check_choice",
    "check_labels",
    "check_map",
    "check_outputs",
    "check_pair",
    "check_positive_int",
    "check_positive_number",
    "describe",
    "is_int",
    "is_number",
    "is_one_of",
    "modality_problems",
    "unreadable",
]


def is_one_of(value: Any, choices: Sequence[str]) -> bool:
    """Whether ``value`` is one of some words."""
    return isinstance(value, str) and value in choices


def is_number(
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> bool:
    """Whether ``value`` is a finite real number in a range; True and False are none.

    Example:
        >>> is_number(0.5, above=0, most=1), is_number(0, above=0), is_number("1"), is_number(float("nan"))
        (True, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        number = float(value)
    except OverflowError:
        return False
    return math.isfinite(number) and above < number < below and least <= number <= most


def is_int(value: Any, *, least: int) -> bool:
    """Whether ``value`` is an integer of at least ``least``; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def as_tuple(value: Any) -> tuple[Any, ...] | None:
    """Return what a list, a tuple or another collection holds; None for anything else, a string included.

    Example:
        >>> as_tuple(["t1", "t2"]), as_tuple("t1"), as_tuple(3)
        (('t1', 't2'), None, None)
    """
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        return None
    try:
        return tuple(value)
    except TypeError:  # a tensor or an array without axes
        return None


def modality_problems(modalities: Any, *, least: int = 1) -> list[str]:
    """Return what is wrong with names of modalities, one sentence each; an empty list when nothing is.

    Names stand in headers and comments of CSV files and on command lines, so ``,``, white space at the ends and line
    breaks are refused. ``+`` joins names to those of subsets; a name may hold it (``"T1+C"``) as long as every joined
    name can be read in one way only.

    Args:
        modalities: what the user passed.
        least: smallest number of names.

    Example:
        >>> modality_problems(("T1", "T1+C", "T2"))
        []
        >>> modality_problems(("T1", "C", "T1+C"))
        ["modalities ('T1', 'C', 'T1+C') can be joined by '+' to one name in several ways; rename one that holds a '+'"]
    """
    names = as_tuple(modalities)
    if names is None or len(names) < least:
        number = {1: "one name", 2: "two names"}[least]
        return [f"modalities must be at least {number} in a list or tuple, got {modalities!r}"]
    problems = []
    for name in names:
        if not isinstance(name, str):
            problems.append(f"modality {name!r} is {describe(name)}; names are strings")
        elif not name or name != name.strip() or not name.isprintable() or "," in name:
            problems.append(
                f"modality {name!r}: a name must be printable and not empty, without ',' and without spaces at its ends"
            )
    repeated = [name for name, count in Counter(map(str, names)).items() if count > 1]
    if repeated:
        problems.append(f"modality {', '.join(map(repr, repeated))} is named more than once; use different names")
    if not problems and _is_ambiguous(names):
        problems.append(
            f"modalities {names} can be joined by '+' to one name in several ways; rename one that holds a '+'"
        )
    return problems


def _is_ambiguous(names: Sequence[str]) -> bool:
    """Whether two sequences of names give the same text when joined by "+".

    The test of Sardinas and Patterson (1953) on the pieces between the "+": a sequence that is ahead of another one
    leaves a rest behind; if a rest is ever a name itself, both sequences have come to the same text.
    """
    words = {tuple(piece.strip() for piece in name.split("+")) for name in names}
    if len(words) < len(names):
        return True

    def rests(longer: Iterable[tuple[str, ...]], shorter: Iterable[tuple[str, ...]]) -> set[tuple[str, ...]]:
        return {a[len(b) :] for a in longer for b in shorter if len(a) > len(b) and a[: len(b)] == b}

    seen: set[tuple[str, ...]] = set()
    found = rests(words, words)
    while found and not found & words:
        seen |= found
        found = (rests(words, found) | rests(found, words)) - seen
    return bool(found)


_INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Problems:
    """Sentences about one call, raised together.

    Args:
        what: what is being checked, the start of the message.

    Attributes:
        settings: what is wrong with plain settings.
        inputs: what is wrong with tensors.

    Example:
        >>> problems = Problems("my_loss")
        >>> check_choice(problems, "mode", "oficial", ("default", "official"))
        >>> problems.raise_all()
        Traceback (most recent call last):
        ...
        passion_plugin.errors.ConfigError: my_loss: mode='oficial' is unknown. Did you mean 'official'?
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.settings: list[str] = []
        self.inputs: list[str] = []

    def raise_all(self) -> None:
        """Raise everything found as one error; do nothing when there is nothing.

        Raises:
            InputError: at least one tensor is wrong.
            ConfigError: only settings are wrong.
        """
        error: type[PassionError] = InputError if self.inputs else ConfigError
        raise_problems([*self.settings, *self.inputs], what=self.what, error=error)


def describe(value: object) -> str:
    """Say in words what was passed.

    Example:
        >>> describe(torch.zeros(2, 3))
        'a torch.float32 tensor of shape (2, 3)'
        >>> describe([1, 2])
        'a list'
    """
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def unreadable(tensor: Tensor) -> str:
    """Say why the values of a tensor cannot be looked at; empty when they can.

    Example:
        >>> unreadable(torch.eye(2).to_sparse())
        'has layout torch.sparse_coo; pass tensor.to_dense()'
    """
    if tensor.is_meta:
        return "is on the meta device, which holds no values"
    return "" if tensor.layout == torch.strided else f"has layout {tensor.layout}; pass tensor.to_dense()"


def check_choice(problems: Problems, name: str, value: object, choices: Sequence[str]) -> None:
    """``value`` must be one of ``choices``."""
    if value not in choices:
        problems.settings.append(f"{name}={value!r} is unknown.{suggest(str(value), choices)}")


def check_outputs(problems: Problems, mode: object, outputs: object) -> None:
    """``mode`` and ``outputs`` must be known, and official mode exists for softmax outputs only."""
    check_choice(problems, "mode", mode, ("default", "official"))
    check_choice(problems, "outputs", outputs, ("softmax", "sigmoid"))
    if mode == "official" and outputs == "sigmoid":
        problems.settings.append(
            "mode='official' has no sigmoid outputs: the published code defines softmax only. "
            "Use mode='default' for region (sigmoid) models."
        )


def check_positive_number(problems: Problems, name: str, value: object) -> None:
    """``value`` must be a finite real number above zero."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        problems.settings.append(f"{name}={value!r}, but it must be a finite number above 0.")


def check_positive_int(problems: Problems, name: str, value: object, minimum: int = 1) -> bool:
    """``value`` must be an integer of at least ``minimum``; return whether it is."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
        problems.settings.append(f"{name}={value!r}, but it must be an integer of at least {minimum}.")
        return False
    return True


def check_map(problems: Problems, name: str, value: object, *, channels: str = "K", minimum: int = 1) -> bool:
    """``value`` must be a floating (B, channels, *spatial) tensor with 2 or 3 spatial axes, none empty.

    Args:
        problems: collects what is wrong.
        name: how the caller calls the argument.
        value: the argument.
        channels: symbol of the second axis in messages.
        minimum: smallest number of channels.

    Returns:
        Whether the shape is usable for further checks.
    """
    layout = f"(B, {channels}, H, W) or (B, {channels}, D, H, W)"
    if not isinstance(value, Tensor):
        problems.inputs.append(f"{name} is {describe(value)}; pass a floating tensor {layout}.")
        return False
    if not value.is_floating_point():
        problems.inputs.append(
            f"{name} is {describe(value)}; pass floating values as the network gives them, not class numbers."
        )
    if value.ndim not in (4, 5):
        problems.inputs.append(f"{name} is {describe(value)}; its shape must be {layout}.")
        return False
    if value.shape[1] < minimum or 0 in value.shape[1:]:
        problems.inputs.append(
            f"{name} is {describe(value)}; it needs at least {minimum} channel(s) and no empty spatial axis."
        )
        return False
    return True


def check_pair(problems: Problems, student: Tensor, teacher: Tensor, *, channels: bool) -> None:
    """Student and teacher must lie on one device and agree in batch and space, and in channels if asked."""
    skipped = "" if channels else " apart from the channels"
    left = student.shape if channels else (student.shape[0], *student.shape[2:])
    right = teacher.shape if channels else (teacher.shape[0], *teacher.shape[2:])
    if tuple(left) != tuple(right):
        problems.inputs.append(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}; "
            f"they must agree{skipped}. Bring both to one resolution first."
        )
    if student.device != teacher.device:
        where = f"student is on {student.device} and teacher on {teacher.device}"
        problems.inputs.append(f"{where}; use one device.")


def check_labels(
    problems: Problems,
    labels: object,
    reference: Tensor,
    num_classes: int,
    *,
    kind: Literal["classes", "regions", "either"],
    values: bool = True,
    ignoring: str = "pass ignore_index for voxels that belong to none",
) -> None:
    """Labels must fit ``reference`` (B, C, *spatial): class numbers (B, *spatial) or masks (B, K, *spatial).

    Class numbers are uint8, int8, int16, int32 or int64 in 0..K-1. Bool class numbers mean False = class
    0 and True = class 1, so they are taken for K = 2 only. Region masks hold 0 and 1 in any real dtype.

    Args:
        problems: collects what is wrong.
        labels: the argument.
        reference: logits or features, already checked, whose batch, space and device the labels must share.
        num_classes: K.
        kind: which of the two layouts is allowed.
        values: whether to read the values too; on an accelerator this waits for the device. Never done
            on meta tensors, nor while ``torch.compile`` traces, where it would break the graph.
        ignoring: what the caller offers for voxels that belong to no class.
    """
    batch, spatial = reference.shape[0], tuple(reference.shape[2:])
    numbers, masks = (batch, *spatial), (batch, num_classes, *spatial)
    wanted = {
        "classes": f"integers {numbers}",
        "regions": f"0/1 masks {masks}",
        "either": f"integers {numbers} or 0/1 masks {masks}",
    }[kind]
    if not isinstance(labels, Tensor):
        problems.inputs.append(f"labels are {describe(labels)}; pass {wanted}.")
        return
    if labels.device != reference.device:
        where = f"labels are on {labels.device} and the maps on {reference.device}"
        problems.inputs.append(f"{where}; use one device.")
    values = values and not labels.is_meta and not torch.compiler.is_compiling()
    shape = tuple(labels.shape)
    if kind != "classes" and shape == masks:
        _check_masks(problems, labels, values)
    elif kind != "regions" and shape == numbers:
        _check_numbers(problems, labels, num_classes, values, ignoring)
    else:
        hint = _shape_hint(labels, reference, kind)
        problems.inputs.append(f"labels are {describe(labels)}; pass {wanted}.{hint}")


def _shape_hint(labels: Tensor, reference: Tensor, kind: str) -> str:
    if kind == "regions" and labels.ndim == reference.ndim - 1:
        return " Class numbers do not say which regions they belong to: build one mask per region."
    if labels.ndim == reference.ndim and labels.shape[1] == 1:
        return " Drop the channel axis with labels[:, 0]."
    if kind == "classes" and labels.ndim == reference.ndim:
        return " Turn one-hot labels into class numbers with labels.argmax(1)."
    return ""


def _check_numbers(problems: Problems, labels: Tensor, num_classes: int, values: bool, ignoring: str) -> None:
    if labels.dtype == torch.bool:
        if num_classes != 2:
            problems.inputs.append(f"labels are bool, which names 2 classes, but there are {num_classes}.")
        return
    if labels.dtype not in _INTEGER_DTYPES:
        problems.inputs.append(
            f"labels are {describe(labels)}; class numbers must be uint8, int8, int16, int32 or int64. "
            "Use labels.long() if they hold whole numbers."
        )
        return
    if not values or labels.numel() == 0:
        return
    low, high = (int(adapter) for adapter in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        problems.inputs.append(
            f"labels hold values from {low} to {high}, but {num_classes} classes are 0..{num_classes - 1}. "
            f"Renumber them without gaps (BraTS: 4 becomes 3); {ignoring}."
        )


def _check_masks(problems: Problems, labels: Tensor, values: bool) -> None:
    if labels.is_complex():
        problems.inputs.append(f"labels are {describe(labels)}; region masks must be real.")
        return
    if not values or labels.dtype == torch.bool:
        return
    if bool(((labels != 0) & (labels != 1)).any()):
        low, high = (adapter.item() for adapter in torch.aminmax(labels))
        problems.inputs.append(
            f"labels are region masks with values from {low} to {high} other than 0 and 1; threshold soft masks first."
        )

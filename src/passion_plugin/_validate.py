"""Checks of user arguments: types, ranges, tensors, labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, get_args

import torch
from torch import Tensor

from passion_plugin._types import Backend, Mode, Outputs
from passion_plugin.errors import ConfigError, InputError, PassionError, raise_problems, suggest


def is_one_of(value: Any, choices: Sequence[str]) -> bool:
    """Whether ``value`` is one of some words."""
    return isinstance(value, str) and value in choices


def require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a ConfigError with close matches unless ``value`` is one of ``choices``."""
    if not is_one_of(value, choices):
        raise ConfigError(_unknown(name, value, choices))


def _unknown(name: str, value: object, choices: Sequence[str]) -> str:
    return f"{name}={value!r} is unknown.{suggest(str(value), choices)}"


def is_number(
    value: Any, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf, most: float = math.inf
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
    """Return what is wrong with names of modalities, of which there must be ``least``, one sentence each.

    Names stand in headers and comments of CSV files and on command lines, so ``,``, white space at the ends and line
    breaks are refused. ``+`` joins names to those of subsets; a name may hold it (``"T1+C"``) as long as every joined
    name can be read in one way only.

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


_CLASS_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass
class Problems:
    """What is wrong with a call, raised together: with its plain ``settings``, and with its tensors, ``inputs``."""

    what: str
    settings: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)

    def raise_all(self) -> None:
        """Raise everything found as one InputError, or ConfigError where only settings are wrong."""
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
    """Say why the values of a tensor cannot be read; empty when they can."""
    if tensor.is_meta:
        return "is on the meta device, which holds no values"
    return "" if tensor.layout == torch.strided else f"has layout {tensor.layout}; pass tensor.to_dense()"


def check_settings(problems: Problems, mode: object, outputs: object, backend: object) -> None:
    """Each must be one of its words, and official mode exists for softmax outputs only."""
    words = (("mode", mode, Mode), ("outputs", outputs, Outputs), ("backend", backend, Backend))
    for name, value, known in words:
        if not is_one_of(value, get_args(known)):
            problems.settings.append(_unknown(name, value, get_args(known)))
    if mode == "official" and outputs == "sigmoid":
        problems.settings.append(
            "mode='official' has no sigmoid outputs: the published code defines softmax only. "
            "Use mode='default' for region (sigmoid) models."
        )


def check_map(problems: Problems, name: str, value: object, *, channels: str = "K", minimum: int = 1) -> bool:
    """Check that a map is floating, (B, channels, *spatial) with 2 or 3 axes; return whether its shape is usable."""
    layout = f"(B, {channels}, H, W) or (B, {channels}, D, H, W)"
    found = f"{name} is {describe(value)}"
    if not isinstance(value, Tensor):
        problems.inputs.append(f"{found}; pass a floating tensor {layout}.")
        return False
    if not value.is_floating_point():
        problems.inputs.append(f"{found}; pass floating values as the network gives them, not class numbers.")
    if value.ndim not in (4, 5):
        problems.inputs.append(f"{found}; its shape must be {layout}.")
        return False
    if value.shape[1] < minimum or 0 in value.shape[1:]:
        problems.inputs.append(f"{found}; it needs at least {minimum} channel(s) and no empty spatial axis.")
        return False
    return True


def check_pair(
    problems: Problems, student: Tensor, teacher: Tensor, *, features: bool = False, minimum: int = 1
) -> bool:
    """Student and teacher must be maps on one device that agree in shape, but for the channels of features.

    Returns:
        Whether the shape of the student is usable for further checks.
    """
    suffix, channels = ("_features", "C") if features else ("", "K")
    usable = [
        check_map(problems, f"{name}{suffix}", value, channels=channels, minimum=minimum)
        for name, value in (("student", student), ("teacher", teacher))
    ]
    if all(usable):
        sizes = [(len(value), *value.shape[2 if features else 1 :]) for value in (student, teacher)]
        if sizes[0] != sizes[1]:
            problems.inputs.append(
                f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}; they must agree"
                f"{' apart from the channels' if features else ''}. Bring both to one resolution first."
            )
        if student.device != teacher.device:
            problems.inputs.append(f"student is on {student.device} and teacher on {teacher.device}; use one device.")
    return usable[0]


def check_labels(
    problems: Problems,
    labels: object,
    reference: Tensor,
    num_classes: int,
    *,
    kind: str,
    values: bool = True,
    ignore_index: object = None,
    advice: str = "pass ignore_index for voxels that belong to none",
) -> None:
    """Labels must fit ``reference`` (B, C, *spatial): class numbers (B, *spatial) or masks (B, K, *spatial).

    Class numbers are integers in 0..K-1, or bool for K = 2. Region masks hold 0 and 1 in any real dtype.

    Args:
        problems: collects what is wrong.
        labels: what the user passed.
        reference: logits or features, already checked, whose batch, space and device the labels must share.
        num_classes: K.
        kind: which layouts are allowed: ``"classes"``, ``"regions"`` or ``"either"``.
        values: whether to read the values, which waits for the device; never done while ``torch.compile`` traces.
        ignore_index: value that is always allowed; must be an integer or None.
        advice: what to do about voxels that belong to no class.
    """
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        problems.settings.append(f"ignore_index={ignore_index!r}, but it must be an integer or None.")
        ignore_index = None
    numbers, masks = (len(reference), *reference.shape[2:]), (len(reference), num_classes, *reference.shape[2:])
    wanted = {
        "classes": f"integers {numbers}",
        "regions": f"0/1 masks {masks}",
        "either": f"integers {numbers} or 0/1 masks {masks}",
    }[kind]
    found = f"labels are {describe(labels)}"
    if not isinstance(labels, Tensor):
        problems.inputs.append(f"{found}; pass {wanted}.")
        return
    if labels.device != reference.device:
        problems.inputs.append(f"labels are on {labels.device} and the maps on {reference.device}; use one device.")
    regions = kind != "classes" and labels.shape == masks
    if not regions and (kind == "regions" or labels.shape != numbers):
        problems.inputs.append(f"{found}; pass {wanted}.{_shape_hint(labels, reference, kind)}")
    elif regions and labels.is_complex():
        problems.inputs.append(f"{found}; region masks must be real.")
    elif not regions and labels.dtype == torch.bool and num_classes != 2:
        problems.inputs.append(f"labels are bool, which names 2 classes, but there are {num_classes}.")
    elif not regions and labels.dtype not in _CLASS_DTYPES:
        problems.inputs.append(
            f"{found}; class numbers must be uint8, int8, int16, int32 or int64. "
            "Use labels.long() if they hold whole numbers."
        )
    elif values and labels.dtype != torch.bool and not labels.is_meta and not torch.compiler.is_compiling():
        kept = labels if ignore_index is None else labels[labels.long() != ignore_index]
        if kept.numel() > 0:
            _check_values(problems, kept, num_classes, regions, advice)


def _shape_hint(labels: Tensor, reference: Tensor, kind: str) -> str:
    if kind == "regions" and labels.ndim == reference.ndim - 1:
        return " Class numbers do not say which regions they belong to: build one mask per region."
    if labels.ndim == reference.ndim and labels.shape[1] == 1:
        return " Drop the channel axis with labels[:, 0]."
    if labels.ndim == reference.ndim and kind == "classes":
        return " Turn one-hot labels into class numbers with labels.argmax(1)."
    return ""


def _check_values(problems: Problems, labels: Tensor, num_classes: int, regions: bool, advice: str) -> None:
    if regions:
        wrong = labels[(labels != 0) & (labels != 1)]
        if wrong.numel() > 0:
            problems.inputs.append(
                f"labels are region masks with values such as {wrong[0].item()}; threshold soft masks first."
            )
        return
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        problems.inputs.append(
            f"labels hold values from {low} to {high}, but {num_classes} classes are 0..{num_classes - 1}. "
            f"Renumber them without gaps (BraTS: 4 becomes 3); {advice}."
        )

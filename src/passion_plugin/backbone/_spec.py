"""BackboneSpec: how to talk to a backbone, as plain data and a few callables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor, nn

from passion_plugin._types import Outputs, StudentMode
from passion_plugin._validate import as_tuple, is_one_of
from passion_plugin.backbone._masks import MASK_FORMATS, MaskCodec
from passion_plugin.errors import raise_problems


def _is_argument(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(name, str) for name in value)


_CHOICES = {"outputs": get_args(Outputs), "mask_meaning": ("present", "missing"), "students": get_args(StudentMode)}

_KINDS: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("the name of a module", lambda value: isinstance(value, str) and value != "", ("classifier",)),
    ("a mapping from modality to names of modules", lambda value: isinstance(value, Mapping), ("encoders",)),
    ("a sequence of names of modules", _are_names, ("deep_supervision",)),
    (
        "a position, a name, or a sequence of them",
        lambda value: _is_argument(value) or (bool(as_tuple(value)) and all(map(_is_argument, value))),
        ("input_argument",),
    ),
    ("a position, a name or None", lambda value: value is None or _is_argument(value), ("mask_argument",)),
    (
        f"one of {MASK_FORMATS} or a MaskCodec",
        lambda value: isinstance(value, MaskCodec) or is_one_of(value, MASK_FORMATS),
        ("mask_format",),
    ),
    ("a sequence of modalities or None", lambda value: value is None or _are_names(value), ("mask_columns",)),
    ("a mapping or a function", lambda value: isinstance(value, Mapping) or callable(value), ("student_mode",)),
    ("a mapping", lambda value: isinstance(value, Mapping), ("student_kwargs",)),
    (
        "a function or None",
        lambda value: value is None or callable(value),
        ("fill_missing", "forward_fn", "unimodal_outputs"),
    ),
    (
        "True or False",
        lambda value: isinstance(value, bool),
        ("per_sample_masks", "copy_features", "can_skip_encoders"),
    ),
    *((f"one of {choices}", partial(is_one_of, choices=choices), (name,)) for name, choices in _CHOICES.items()),
)
"""What a field may be, in words and as a question, and the fields of that kind."""


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """How to talk to a multi-encoder segmentation backbone. The backbone itself is never edited.

    Module names are exact dotted names, or dotted suffixes that fit one module only; ``t1`` never matches
    ``t1ce``. They are resolved when the spec meets its backbone, and every wrong one is reported at once.

    Attributes:
        classifier: the module whose output are the logits (B, K, *spatial) of the fused prediction and whose
            input are the features that are compared.
        encoders: for each modality the modules of its private path: all that depends on it alone. Empty: no
            encoder is replayed.
        deep_supervision: modules whose outputs are coarse logits of the fused path (deep supervision), finest first;
            number ``j`` = 1, 2, … is distilled with weight ``2^-j``.
        outputs: ``"softmax"`` for exclusive classes, ``"sigmoid"`` for overlapping regions.
        input_argument: position or name of the images in the call; a tuple when each modality is an argument.
        mask_argument: position or name of the mask, or None when the backbone takes none. Then every call
            in training needs ``passion_presence=``.
        mask_format: ``"bool"``, ``"float"`` or ``"int"`` for a tensor (B, M); ``"indices"`` for a list of column
            numbers that holds for the whole batch; a :class:`MaskCodec` for anything else.
        mask_meaning: whether a 1 in the mask says ``"present"`` or ``"missing"``.
        mask_columns: modality that each mask column switches, when that is not the order of ``modalities``.
        per_sample_masks: whether the samples of one batch may have different masks.
        student_mode: what switches the auxiliary training outputs off in student passes: attributes to set, by
            dotted name (``{"is_training": False}``), or a function from the backbone to a context manager.
        student_kwargs: keyword arguments that student passes add or replace, for the same purpose.
        fill_missing: ``(x, mask) -> x``, what an absent modality looks like to this backbone; zeros when None.
        forward_fn: ``(backbone, x, mask) -> raw`` with a bool mask (B, M), replaces the call in student passes.
        unimodal_outputs: ``(raw) -> sequence of M tensors (B, K, *spatial)``, probabilities that a separate
            uni-modal decoder of the backbone put into its training output. Used by the official mode.
        students: how the backbone predicts from one modality alone. ``"replay"``: encoder outputs of the fused pass are
            used again. ``"mixed"``: those of the modality are, those of the others come from an absent input.
            ``"rerun"``: everything runs again on a blanked input. ``"heads"``: small heads on the encoder
            features, for backbones that cannot predict from a single modality. ``"auto"``: the first that the
            checks show to be exact. Anything else is taken at its word and not checked: ``"replay"`` is wrong
            for a backbone that does not mask features after encoding.
        copy_features: keep copies of encoder outputs, for backbones that change them in place.
        can_skip_encoders: whether an encoder need not run on rows that lack its modality: nothing that the backbone
            returns depends on their features; set by the checks.

    Raises:
        ConfigError: listing every field that is wrong.

    Example:
        >>> spec = BackboneSpec(
        ...     encoders={"t1": "t1_encoder", "t2": ("t2_encoder", "t2_transformer")},
        ...     classifier="decoder.seg_layer",
        ...     student_mode={"is_training": False},
        ... )
        >>> spec.encoders["t1"]
        ('t1_encoder',)
    """

    classifier: str
    encoders: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    deep_supervision: Sequence[str] = ()
    outputs: Outputs = "softmax"
    input_argument: int | str | Sequence[int | str] = 0
    mask_argument: int | str | None = 1
    mask_format: str | MaskCodec = "bool"
    mask_meaning: Literal["present", "missing"] = "present"
    mask_columns: Sequence[str] | None = None
    per_sample_masks: bool = True
    student_mode: Mapping[str, Any] | Callable[[nn.Module], AbstractContextManager[Any]] = field(default_factory=dict)
    student_kwargs: Mapping[str, Any] = field(default_factory=dict)
    fill_missing: Callable[[Any, Tensor], Any] | None = None
    forward_fn: Callable[[nn.Module, Any, Tensor], Any] | None = None
    unimodal_outputs: Callable[[Any], Sequence[Tensor]] | None = None
    students: StudentMode = "auto"
    copy_features: bool = False
    can_skip_encoders: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be {wanted}, got {getattr(self, name)!r}"
            for wanted, fits, names in _KINDS
            for name in names
            if not fits(getattr(self, name))
        ]
        raise_problems(problems, what="BackboneSpec")
        if self.students in ("replay", "mixed", "heads") and not self.encoders:
            problems.append(f"students={self.students!r} needs the names of the encoders")
        if self.students == "mixed" and self.fill_missing is not None:
            problems.append(
                "students='mixed' replays features of a zero input and cannot be combined with fill_missing="
            )
        if self.can_skip_encoders and not self.encoders:
            problems.append("can_skip_encoders=True needs the names of the encoders")
        for modality, names in self.encoders.items():
            if not isinstance(names, str) and not _are_names(names):
                problems.append(f"encoders[{modality!r}] must be a module name or a sequence of them, got {names!r}")
        raise_problems(problems, what="BackboneSpec")
        encoders = {
            modality: (names,) if isinstance(names, str) else tuple(names) for modality, names in self.encoders.items()
        }
        object.__setattr__(self, "encoders", encoders)
        object.__setattr__(self, "deep_supervision", tuple(self.deep_supervision))
        if self.mask_columns is not None:
            object.__setattr__(self, "mask_columns", tuple(self.mask_columns))

    def replaced(self, **changes: Any) -> BackboneSpec:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

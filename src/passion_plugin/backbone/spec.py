"""BackboneSpec: how to talk to a backbone, as plain data and a few callables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor, nn

from passion_plugin.backbone.masks import MASK_FORMATS, MaskCodec
from passion_plugin.errors import raise_problems
from passion_plugin.plain_values import is_one_of, members

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BackboneSpec", "Outputs", "Students"]

Outputs = Literal["softmax", "sigmoid"]
Students = Literal["auto", "replay", "mixed", "rerun", "heads"]


def _is_argument(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _are_names(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(name, str) for name in value)


def _one_of(choices: Sequence[str]) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {choices}", lambda value: is_one_of(value, choices)


_FUNCTION = "a function or None", lambda value: value is None or callable(value)
_FLAG = "True or False", lambda value: isinstance(value, bool)
_KINDS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("classifier", "the name of a module", lambda value: isinstance(value, str) and value != ""),
    ("encoders", "a mapping from modality to names of modules", lambda value: isinstance(value, Mapping)),
    ("coarse", "a sequence of names of modules", _are_names),
    ("outputs", *_one_of(get_args(Outputs))),
    (
        "input_argument",
        "a position, a name, or a sequence of them",
        lambda value: _is_argument(value) or (bool(members(value)) and all(map(_is_argument, value))),
    ),
    ("mask_argument", "a position, a name or None", lambda value: value is None or _is_argument(value)),
    (
        "mask_format",
        f"one of {MASK_FORMATS} or a MaskCodec",
        lambda value: isinstance(value, MaskCodec) or is_one_of(value, MASK_FORMATS),
    ),
    ("mask_meaning", *_one_of(("present", "missing"))),
    ("mask_columns", "a sequence of modalities or None", lambda value: value is None or _are_names(value)),
    ("mixed_masks", *_FLAG),
    ("light", "a mapping or a function", lambda value: isinstance(value, Mapping) or callable(value)),
    ("light_arguments", "a mapping", lambda value: isinstance(value, Mapping)),
    ("absent", *_FUNCTION),
    ("call", *_FUNCTION),
    ("unimodal_outputs", *_FUNCTION),
    ("students", *_one_of(get_args(Students))),
    ("copy_features", *_FLAG),
    ("stackable", *_FLAG),
    ("skippable", *_FLAG),
)
"""What each field may be: its name, in words, and as a question."""


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
        coarse: modules whose outputs are coarse logits of the fused path (deep supervision), finest first;
            number ``j`` = 1, 2, … is distilled with weight ``2^-j``.
        outputs: ``"softmax"`` for exclusive classes, ``"sigmoid"`` for overlapping regions.
        input_argument: position or name of the images in the call; a tuple when each modality is an argument.
        mask_argument: position or name of the mask, or None when the backbone takes none. Then every call
            in training needs ``passion_presence=``.
        mask_format: ``"bool"``, ``"float"`` or ``"int"`` for a tensor (B, M); ``"indices"`` for a list of column
            numbers that holds for the whole batch; a :class:`MaskCodec` for anything else.
        mask_meaning: whether a 1 in the mask says ``"present"`` or ``"missing"``.
        mask_columns: modality that each mask column switches, when that is not the order of ``modalities``.
        mixed_masks: whether the samples of one batch may have different masks.
        light: what switches the auxiliary training outputs off in student passes: attributes to set, by
            dotted name (``{"is_training": False}``), or a function from the backbone to a context manager.
        light_arguments: keyword arguments that student passes add or replace, for the same purpose.
        absent: ``(x, mask) -> x``, what an absent modality looks like to this backbone; zeros when None.
        call: ``(backbone, x, mask) -> raw`` with a bool mask (B, M), replaces the call in student passes.
        unimodal_outputs: ``(raw) -> sequence of M tensors (B, K, *spatial)``, probabilities that a separate
            uni-modal decoder of the backbone put into its training output. Used by the official mode.
        students: how one modality is let through alone. ``"replay"``: encoder outputs of the fused pass are
            used again. ``"mixed"``: those of the modality are, those of the others come from an absent input.
            ``"rerun"``: everything runs again on a blanked input. ``"heads"``: small heads on the encoder
            features, for backbones that cannot let a single modality through. ``"auto"``: the first that the
            checks show to be exact. Anything else is taken at its word and not checked: ``"replay"`` is wrong
            for a backbone that does not mask features after encoding.
        copy_features: keep copies of encoder outputs, for backbones that change them in place.
        stackable: whether several students may share one stacked batch; set by the checks.
        skippable: whether an encoder need not run on rows that lack its modality: nothing that the backbone
            returns depends on what it would put out for them; set by the checks.

    Raises:
        ConfigError: listing every field that is wrong.

    Example:
        >>> spec = BackboneSpec(
        ...     encoders={"t1": "t1_encoder", "t2": ("t2_encoder", "t2_transformer")},
        ...     classifier="decoder.seg_layer",
        ...     light={"is_training": False},
        ... )
        >>> spec.encoders["t1"]
        ('t1_encoder',)
    """

    classifier: str
    encoders: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    coarse: Sequence[str] = ()
    outputs: Outputs = "softmax"
    input_argument: int | str | Sequence[int | str] = 0
    mask_argument: int | str | None = 1
    mask_format: str | MaskCodec = "bool"
    mask_meaning: Literal["present", "missing"] = "present"
    mask_columns: Sequence[str] | None = None
    mixed_masks: bool = True
    light: Mapping[str, Any] | Callable[[nn.Module], AbstractContextManager[Any]] = field(default_factory=dict)
    light_arguments: Mapping[str, Any] = field(default_factory=dict)
    absent: Callable[[Any, Tensor], Any] | None = None
    call: Callable[[nn.Module, Any, Tensor], Any] | None = None
    unimodal_outputs: Callable[[Any], Sequence[Tensor]] | None = None
    students: Students = "auto"
    copy_features: bool = False
    stackable: bool = False
    skippable: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be {wanted}, got {getattr(self, name)!r}"
            for name, wanted, fits in _KINDS
            if not fits(getattr(self, name))
        ]
        raise_problems(problems, what="BackboneSpec")
        if self.students in ("replay", "mixed", "heads") and not self.encoders:
            problems.append(f"students={self.students!r} needs the names of the encoders")
        if self.students == "mixed" and self.absent is not None:
            problems.append("students='mixed' replays features of a zero input and cannot be combined with absent=")
        if self.skippable and not self.encoders:
            problems.append("skippable=True needs the names of the encoders")
        if self.stackable and (not self.mixed_masks or self.mask_format == "indices"):
            problems.append("stackable=True needs a backbone that takes different masks in one batch")
        for modality, names in self.encoders.items():
            if not isinstance(names, str) and not _are_names(names):
                problems.append(f"encoders[{modality!r}] must be a module name or a sequence of them, got {names!r}")
        raise_problems(problems, what="BackboneSpec")
        encoders = {
            modality: (names,) if isinstance(names, str) else tuple(names) for modality, names in self.encoders.items()
        }
        object.__setattr__(self, "encoders", encoders)
        object.__setattr__(self, "coarse", tuple(self.coarse))
        if self.mask_columns is not None:
            object.__setattr__(self, "mask_columns", tuple(self.mask_columns))

    def replaced(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    @classmethod
    def detect(
        cls,
        backbone: nn.Module,
        example_input: Any,
        example_mask: Any = None,
        *,
        modalities: Sequence[str] | None = None,
        **known: Any,
    ) -> BackboneSpec:
        """Find encoders and classifier of ``backbone``, check what holds for it, and return its spec.

        Encoders are found by perturbation: the outermost modules whose every call depends on exactly one
        modality. The classifier is found by value: the last layer whose output is the prediction as it is,
        or after softmax, sigmoid or interpolation. The random state, the mode and the buffers of the backbone
        are what they were afterwards.

        Args:
            backbone: any module.
            example_input: images as the backbone takes them, all modalities with content; a few voxels and a
                batch of 1 or 2 are enough.
            example_mask: a mask as the backbone takes it; None when it takes none.
            modalities: names; ``("0", "1", …)`` when None.
            **known: fields of the spec that are known already and are not to be detected.

        Returns:
            A spec with ``students`` decided.

        Raises:
            BackboneError: listing everything that was not found or does not hold, and what to pass by hand.
        """
        from passion_plugin.backbone.report import examine

        return examine(backbone, example_input, example_mask, modalities=modalities, **known).accepted()

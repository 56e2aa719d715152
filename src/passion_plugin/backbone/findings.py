"""The report: everything that was found out about a backbone, and how it reads."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from passion_plugin.backbone.anatomy import Anatomy
from passion_plugin.backbone.checks import EFFECT, BatchBehaviour, MaskBehaviour
from passion_plugin.backbone.classifier import Match
from passion_plugin.backbone.spec import BackboneSpec
from passion_plugin.errors import BackboneError, raise_problems
from passion_plugin.notices import warn_user

__all__ = ["Report"]

_WIDTH = 110
_STUDENTS = {
    "replay": "encoder outputs of the fused pass are replayed",
    "mixed": "the modality's encoder outputs are replayed, the others' come from an absent input",
    "rerun": "the whole network runs again on an input with everything else blanked",
    "heads": "small heads on the encoder features: one modality alone cannot be let through",
    "auto": "not decided",
}


@dataclass
class Report:
    """What :func:`~passion_plugin.inspect` found out about a backbone.

    Attributes:
        backbone: its class.
        modalities: names, in the order of the mask columns.
        spec: how to talk to it, with ``students`` decided; None when it cannot be wrapped.
        problems: what makes it impossible to wrap, and what to do about it.
        warnings: what to know before training.
        aloud: those of them that are given as PassionWarning too when the spec is taken from this report.
        searched: encoders and classifier were looked for.
        encoders: modules that depend on one modality alone.
        shared: modules that are called for one modality after the other.
        match: how the prediction follows from the output of the classifier; None when it was given and the
            prediction does not follow from it.
        convention: how images and mask are passed, in words.
        mask: what the mask alone does; None when there is none or it was not tried.
        batch: how samples of one batch relate.
        alone: for each modality, whether it alone gives a finite prediction.
        alone_effect: for each modality, relative change of that prediction when its content changes.
        replay_errors: relative difference between students and true runs, by what was tried.
        replay_failures: the exceptions of what could not even be tried to the end.
        stacking_error: relative difference between stacked and separate students; None when not tried.
        skipping_error: relative difference, of all outputs and gradients, between runs with and without the
            encoders of missing modalities; None when not tried.
        anatomy: layers and parameters.
        lazy: parameters that had no shape before this examination.
    """

    backbone: str
    modalities: tuple[str, ...] = ()
    spec: BackboneSpec | None = None
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    aloud: tuple[str, ...] = ()
    searched: bool = False
    encoders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    match: Match | None = None
    convention: str = ""
    mask: MaskBehaviour | None = None
    batch: BatchBehaviour | None = None
    alone: dict[str, bool] = field(default_factory=dict)
    alone_effect: dict[str, float] = field(default_factory=dict)
    replay_errors: dict[str, float] = field(default_factory=dict)
    replay_failures: dict[str, str] = field(default_factory=dict)
    stacking_error: float | None = None
    skipping_error: float | None = None
    anatomy: Anatomy | None = None
    lazy: tuple[str, ...] = ()

    def raise_problems(self) -> None:
        """Raise one error with every problem; do nothing when there is none.

        Raises:
            BackboneError: the backbone cannot be wrapped as it is.
        """
        raise_problems(self.problems, what=f"{self.backbone} cannot be wrapped as it is", error=BackboneError)

    def accepted(self) -> BackboneSpec:
        """Return the spec, with a PassionWarning for what silently goes on in training.

        Raises:
            BackboneError: the backbone cannot be wrapped as it is.
        """
        self.raise_problems()
        for text in self.aloud:
            warn_user(f"{self.backbone}: {text}")
        assert self.spec is not None
        return self.spec

    def problem(self, text: str) -> None:
        """Add a problem."""
        self.problems += (text,) if text not in self.problems else ()

    def warn(self, text: str, *, aloud: bool = False) -> None:
        """Add a warning, to be given by :meth:`accepted` too if ``aloud``."""
        self.warnings += (text,) if text not in self.warnings else ()
        self.aloud += (text,) if aloud and text not in self.aloud else ()

    def __str__(self) -> str:
        rows = [(label, text) for label, text in self._rows() if text]
        lines = [f"{self.backbone} with {len(self.modalities)} modalities: {', '.join(self.modalities)}", ""]
        for label, text in rows:
            indent = " " * 18
            body = "\n".join(
                textwrap.fill(line, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
                for line in text.splitlines()
            )
            lines.append(f"{label:<18}{body.lstrip()}")
        return "\n".join(lines)

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "verdict", self._verdict()
        yield "problems", _numbered(self.problems)
        yield "warnings", _numbered(self.warnings)
        yield "encoders", self._encoders()
        yield "shared", f"one modality after the other: {', '.join(self.shared)}" if self.shared else ""
        yield "classifier", self._classifier()
        yield "call", self.convention
        yield "mask columns", self._columns()
        yield "one alone", self._alone()
        yield "students", self._students()
        yield "batch", self._batch()
        yield "layers", self._layers()

    def _verdict(self) -> str:
        if self.problems:
            return f"cannot be wrapped as it is: {len(self.problems)} problem{'s' * (len(self.problems) > 1)}"
        return "can be wrapped" + (f": {_STUDENTS[self.spec.students]}" if self.spec else "")

    def _encoders(self) -> str:
        if not self.encoders:
            return "none found: no module belongs to one modality alone" if self.searched else ""
        return "\n".join(f"{name}: {_several(modules)}" for name, modules in self.encoders.items())

    def _classifier(self) -> str:
        name = self.match.name if self.match else self.spec.classifier if self.spec else ""
        if not name:
            return "not found" if self.searched else ""
        text = f"{name}"
        if self.match:
            text += f", {self.match.classes} classes; its output is the prediction"
            text += f" after {self.match.relation}" if self.match.relation else " as it is"
        return text + (f"; outputs={self.spec.outputs!r}" if self.spec else "")

    def _columns(self) -> str:
        if self.mask is None:
            return ""
        lines = []
        numbers = zip(self.modalities, self.mask.own, self.mask.leak, strict=False)
        for k, (name, own, leak) in enumerate(numbers):
            shown = [self.modalities[m] for m in self.mask.columns.get(k, ())] or [name] * (not own <= EFFECT)
            line = f"column {k} switches {', '.join(shown) or 'nothing'}"
            lines.append(f"{line} (effect of own content {_number(own)}, of hidden content {_number(leak)})")
        if not self.mask.has_effect and lines:
            lines.append("the mask has no effect at all")
        return "\n".join([*lines, self.mask.failure] if self.mask.failure else lines)

    def _alone(self) -> str:
        bad = [name for name, finite in self.alone.items() if not finite]
        if bad:
            return f"NOT finite for {', '.join(bad)}"
        return "finite for every modality" if self.alone else ""

    def _students(self) -> str:
        lines = []
        for what, error in self.replay_errors.items():
            verdict = "exact" if error <= 1e-3 else "NOT exact"
            reason = f", but {self.replay_failures[what]}" if what in self.replay_failures else ""
            lines.append(f"{what}: {verdict}, relative difference from a true run {_number(error)}{reason}")
        lines += [
            f"{what}: {reason}" for what, reason in self.replay_failures.items() if what not in self.replay_errors
        ]
        return "\n".join(lines if len(lines) <= 5 else [*lines[:4], f"{len(lines) - 5} more", lines[-1]])

    def _batch(self) -> str:
        if self.batch is None:
            return ""
        parts = []
        if self.batch.mixing is not None:
            independent = self.batch.mixing <= EFFECT
            parts.append("samples are independent" if independent else f"samples mix ({_number(self.batch.mixing)})")
        if self.spec is not None:
            parts.append(f"masks {'may' if self.spec.mixed_masks else 'must not'} differ within a batch")
            parts.append(f"students {'may' if self.spec.stackable else 'must not'} be stacked")
            parts.append(f"encoders of missing modalities {'can' if self.spec.skippable else 'cannot'} be skipped")
        if self.batch.repeatable:
            parts.append(f"two runs in evaluation mode differ by {_number(self.batch.repeatable)}")
        parts += [text for text in (self.batch.single, self.batch.reason) if text]
        return "; ".join(parts)

    def _layers(self) -> str:
        if self.anatomy is None:
            return ""
        found = self.anatomy
        norms = ", ".join(f"{count} {kind}" for kind, count in found.normalisation.items())
        lines = [f"normalisation: {norms or 'none'}; dropout layers: {found.dropout}"]
        lines.append(f"frozen parameters: {_some(found.frozen)}")
        lines.append(f"shared parameters: {_some([' = '.join(group) for group in found.shared])}")
        lines.append(f"in-place modules: {_some(found.in_place)}")
        if self.lazy:
            lines.append(f"parameters that had no shape before: {_some(self.lazy)}")
        return "\n".join([*lines, *found.wrappers])


def _numbered(texts: tuple[str, ...]) -> str:
    return "\n".join(f"{number}. {' '.join(text.split())}" for number, text in enumerate(texts, start=1))


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _several(names: tuple[str, ...]) -> str:
    if len(names) <= 8:
        return ", ".join(names) or "none"
    return f"{', '.join(names[:6])} and {len(names) - 6} more"


def _some(names: list[str] | tuple[str, ...]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} ({', '.join(names[:3])}{rest})" if names else "none"

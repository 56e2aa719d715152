"""The report: everything that was found out about a backbone, and how it reads."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from passion_plugin.backbone import BackboneSpec
from passion_plugin.detection._classifier import Match
from passion_plugin.detection._probe import EFFECT
from passion_plugin.errors import BackboneError, listed, raise_problems, warn_user

_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)

_WIDTH, _INDENT = 110, 18

_STUDENTS = {
    "replay": "encoder outputs of the fused pass are replayed",
    "mixed": "the modality's encoder outputs are replayed, the others' come from an absent input",
    "rerun": "the whole network runs again on an input with everything else blanked",
    "heads": "small heads on the encoder features: the backbone cannot predict from one modality",
    "auto": "not decided",
}


def batch_norms(backbone: nn.Module) -> list[nn.Module]:
    """Return the layers that give a sample something else in training when other samples are not there."""
    return [module for module in backbone.modules() if isinstance(module, _BatchNorm)]


def dropout_layers(backbone: nn.Module) -> list[_DropoutNd]:
    """Return the layers of torch that draw random numbers in training."""
    return [module for module in backbone.modules() if isinstance(module, _DropoutNd)]


def module_summary(backbone: nn.Module) -> list[str]:
    """Return lines about layers and parameters that a student pass could disturb."""
    names = defaultdict(list)
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    norms = Counter(type(module).__name__ for module in backbone.modules() if isinstance(module, _NORMS))
    counted = ", ".join(f"{count} {kind}" for kind, count in norms.items()) or "none"
    dropout = sum(layer.p > 0 for layer in dropout_layers(backbone))
    found = {
        "frozen parameters": [name for name, parameter in backbone.named_parameters() if not parameter.requires_grad],
        "shared parameters": [" = ".join(group) for group in names.values() if len(group) > 1],
        "in-place modules": [name for name, module in backbone.named_modules() if vars(module).get("inplace") is True],
    }
    lines = [f"{what}: {f'{len(names)} ({listed(names, 3)})' if names else 'none'}" for what, names in found.items()]
    return [f"normalisation: {counted}; dropout layers: {dropout}", *lines]


@dataclass
class BatchBehaviour:
    """How samples of one batch relate.

    Attributes:
        noise: relative difference of two runs from different random states.
        coupling: relative change of a sample when the content of its neighbour changes; None when not tried.
        mixed_masks: relative difference between different masks in one batch and the same masks apart; None when
            that is not possible at all.
        single_failure: what a batch of one raises.
        failure: what a batch of two, or different masks in it, raise.
    """

    noise: float = 0.0
    coupling: float | None = None
    mixed_masks: float | None = None
    single_failure: str = ""
    failure: str = ""


@dataclass
class MaskBehaviour:
    """What a mask with one modality alone does, nothing blanked; numbers in order of modality.

    Attributes:
        effect: relative change of the prediction against that with everything present.
        own: relative change when the content of the modality itself changes.
        leak: relative change when the content of all the others changes.
        columns: for a column that does not show its own modality: the numbers of those that it shows.
        failure: the exception that one of these masks raised.
    """

    effect: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    leak: list[float] = field(default_factory=list)
    columns: dict[int, tuple[int, ...]] = field(default_factory=dict)
    failure: str = ""

    @property
    def has_effect(self) -> bool:
        """Whether any mask changed the prediction."""
        return any(not effect <= EFFECT for effect in self.effect)

    def permutation(self) -> tuple[int, ...] | None:
        """Return which modality each column switches, when that is a permutation other than the identity."""
        order = tuple(self.columns[k][0] if len(self.columns.get(k, ())) == 1 else k for k in range(len(self.effect)))
        clean = all(len(shown) == 1 for shown in self.columns.values())
        return order if self.columns and clean and sorted(order) == list(range(len(order))) else None


@dataclass
class BackboneReport:
    """What :func:`~passion_plugin.inspect_backbone` found out about a backbone.

    Attributes:
        backbone: its class.
        modalities: names, in the order of the mask columns.
        spec: how to talk to it, with ``students`` decided; None when it cannot be wrapped.
        problems: what makes it impossible to wrap, and what to do about it.
        warnings: what to know before training.
        emitted: those of them that :meth:`accepted` emits as PassionWarning.
        searched: encoders and classifier were looked for.
        encoders: modules that depend on one modality alone.
        shared: modules that are called for one modality after the other.
        match: how the prediction follows from the output of the classifier; None when it was given and the
            prediction does not follow from it.
        convention: how images and mask are passed, in words.
        mask: what the mask alone does; None when there is none or it was not tried.
        batch: how samples of one batch relate.
        alone: for each modality, whether it alone gives a finite prediction.
        replay_errors: relative difference between students and true runs, by what was tried.
        replay_failures: the exceptions of what could not even be tried to the end.
        layers: layers and parameters that a student pass could disturb, in words.
    """

    backbone: str
    modalities: tuple[str, ...] = ()
    spec: BackboneSpec | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    emitted: list[str] = field(default_factory=list)
    searched: bool = False
    encoders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    match: Match | None = None
    convention: str = ""
    mask: MaskBehaviour | None = None
    batch: BatchBehaviour | None = None
    alone: dict[str, bool] = field(default_factory=dict)
    replay_errors: dict[str, float] = field(default_factory=dict)
    replay_failures: dict[str, str] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)

    @property
    def noisy(self) -> bool:
        """Whether the backbone draws random numbers in evaluation mode too."""
        return self.batch is not None and self.batch.noise > EFFECT

    def raise_problems(self) -> None:
        """Raise one error with every problem; do nothing when there is none.

        Raises:
            BackboneError: the backbone cannot be wrapped as it is.
        """
        raise_problems(self.problems, what=f"{self.backbone} cannot be wrapped as it is", error=BackboneError)

    def accepted(self) -> BackboneSpec:
        """Return the spec, with a PassionWarning for what goes on unseen in training.

        Raises:
            BackboneError: the backbone cannot be wrapped as it is.
        """
        self.raise_problems()
        for text in self.emitted:
            warn_user(f"{self.backbone}: {text}")
        assert self.spec is not None
        return self.spec

    def __str__(self) -> str:
        lines = [f"{self.backbone} with {len(self.modalities)} modalities: {', '.join(self.modalities)}", ""]
        indent = " " * _INDENT
        for label, texts in _rows(self):
            body = "\n".join(
                textwrap.fill(line, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
                for line in texts
            )
            lines += [f"{label:<{_INDENT}}{body.lstrip()}"] if body else []
        return "\n".join(lines)


def _rows(report: BackboneReport) -> Iterator[tuple[str, list[str]]]:
    spec = report.spec
    if report.problems:
        count = len(report.problems)
        yield "verdict", [f"cannot be wrapped as it is: {count} problem{'s' * (count > 1)}"]
    else:
        yield "verdict", [f"can be wrapped: {_STUDENTS[spec.students]}" if spec else "can be wrapped"]
    yield "problems", _numbered(report.problems)
    yield "warnings", _numbered(report.warnings)
    encoders = [f"{name}: {listed(modules, 8) or 'none'}" for name, modules in report.encoders.items()]
    nothing = ["none found: no module belongs to one modality alone"] if report.searched else []
    yield "encoders", encoders or nothing
    yield "shared", [f"one modality after the other: {', '.join(report.shared)}"] if report.shared else []
    yield "classifier", _classifier(report)
    yield "call", [report.convention] if report.convention else []
    yield "mask columns", _mask_columns(report.mask, report.modalities) if report.mask else []
    infinite = [name for name, finite in report.alone.items() if not finite]
    finite = ["finite for every modality"] if report.alone else []
    yield "one alone", [f"NOT finite for {', '.join(infinite)}"] if infinite else finite
    yield "students", _students(report.replay_errors, report.replay_failures)
    yield "batch", ["; ".join(_batch(report.batch, spec))] if report.batch else []
    yield "layers", report.layers


def _classifier(report: BackboneReport) -> list[str]:
    match, spec = report.match, report.spec
    if match is None and spec is None:
        return ["not found"] if report.searched else []
    text = match.name if match else spec.classifier if spec else ""
    if match:
        relation = f"after {match.relation}" if match.relation else "as it is"
        text += f", {match.classes} classes; its output is the prediction {relation}"
    return [text + (f"; outputs={spec.outputs!r}" if spec else "")]


def _mask_columns(mask: MaskBehaviour, modalities: tuple[str, ...]) -> list[str]:
    lines = []
    for k, (name, own, leak) in enumerate(zip(modalities, mask.own, mask.leak, strict=False)):
        shown = [modalities[m] for m in mask.columns.get(k, ())] or [name] * (not own <= EFFECT)
        line = f"column {k} switches {', '.join(shown) or 'nothing'}"
        lines.append(f"{line} (effect of own content {_number(own)}, of hidden content {_number(leak)})")
    if lines and not mask.has_effect:
        lines.append("the mask has no effect at all")
    return [*lines, mask.failure] if mask.failure else lines


def _students(errors: Mapping[str, float], failures: Mapping[str, str]) -> list[str]:
    lines = []
    for what, error in errors.items():
        verdict = "exact" if error <= 1e-3 else "NOT exact"
        reason = f", but {failures[what]}" if what in failures else ""
        lines.append(f"{what}: {verdict}, relative difference from a true run {_number(error)}{reason}")
    lines += [f"{what}: {reason}" for what, reason in failures.items() if what not in errors]
    return lines if len(lines) <= 5 else [*lines[:4], f"{len(lines) - 5} more", lines[-1]]


def _batch(batch: BatchBehaviour, spec: BackboneSpec | None) -> Iterator[str]:
    if batch.coupling is not None:
        yield "samples are independent" if batch.coupling <= EFFECT else f"samples mix ({_number(batch.coupling)})"
    if spec is not None:
        yield f"masks {'may' if spec.per_sample_masks else 'must not'} differ within a batch"
        yield f"encoders of missing modalities {'can' if spec.can_skip_encoders else 'cannot'} be skipped"
    if batch.noise:
        yield f"two runs in evaluation mode differ by {_number(batch.noise)}"
    yield from (text for text in (batch.single_failure, batch.failure) if text)


def _numbered(texts: list[str]) -> list[str]:
    return [f"{number}. {' '.join(text.split())}" for number, text in enumerate(texts, start=1)]


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"

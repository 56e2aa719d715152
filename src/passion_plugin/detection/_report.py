"""The report: everything that was found out about a backbone, and how it reads."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from passion_plugin.backbone import BackboneSpec
from passion_plugin.detection._classifier import Match
from passion_plugin.errors import BackboneError, raise_problems, warn_user

__all__ = [
    "BackboneReport",
    "BatchBehaviour",
    "MaskBehaviour",
    "ModuleSummary",
    "batch_layers",
    "dropout_layers",
    "module_summary",
]

_PARALLEL = "DataParallel is not supported: wrap its .module, and use DistributedDataParallel around the wrapper"

_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class ModuleSummary:
    """Static properties.

    Attributes:
        normalisation: number of layers by class name.
        batch_statistics: batch normalisation layers, whose statistics couple the samples in training.
        no_running: those of them that use batch statistics in evaluation too.
        dropout: number of dropout layers with a rate above zero.
        frozen: names of parameters that do not require gradient.
        shared: groups of names of one parameter.
        in_place: modules that work in place.
        parallel: remark on a DataParallel, empty when there is none.
        wrappers: remarks on compiled, scripted and distributed modules.
    """

    normalisation: dict[str, int]
    batch_statistics: int
    no_running: int
    dropout: int
    frozen: tuple[str, ...]
    shared: tuple[tuple[str, ...], ...]
    in_place: tuple[str, ...]
    parallel: str
    wrappers: tuple[str, ...]


def module_summary(backbone: nn.Module) -> ModuleSummary:
    """Count and name what a student pass could disturb."""
    modules = dict(backbone.named_modules())
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    batch = batch_layers(backbone)
    norms = [type(module).__name__ for module in modules.values() if isinstance(module, _NORMS)]
    return ModuleSummary(
        normalisation=dict(Counter(norms)),
        batch_statistics=len(batch),
        no_running=sum(layer.running_mean is None for layer in batch),
        dropout=sum(layer.p > 0 for layer in dropout_layers(backbone)),
        frozen=tuple(name for name, parameter in backbone.named_parameters() if not parameter.requires_grad),
        shared=tuple(tuple(group) for group in names.values() if len(group) > 1),
        in_place=tuple(name for name, module in modules.items() if vars(module).get("inplace") is True),
        parallel=_PARALLEL if any(isinstance(module, nn.DataParallel) for module in modules.values()) else "",
        wrappers=tuple(_wrappers(modules)),
    )


def batch_layers(backbone: nn.Module) -> list[nn.Module]:
    """Return the layers that give a sample something else in training when other samples are not there."""
    return [module for module in backbone.modules() if isinstance(module, _BatchNorm)]


def dropout_layers(backbone: nn.Module) -> list[_DropoutNd]:
    """Return the layers of torch that draw random numbers in training."""
    return [module for module in backbone.modules() if isinstance(module, _DropoutNd)]


def _wrappers(modules: dict[str, nn.Module]) -> list[str]:
    remarks = []
    for name, module in modules.items():
        kind, where = type(module).__name__, repr(name) if name else "the backbone"
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            remarks.append(f"{where} is a {kind}: wrap the bare network, and put {kind} around the wrapper")
        elif isinstance(module, torch.jit.ScriptModule):
            remarks.append(f"{where} is a ScriptModule, whose parts cannot be listened to: pass the module")
            break
        elif kind == "OptimizedModule":
            remarks.append(f"{where} is compiled; listening to its parts will compile some of them again")
    return remarks


EFFECT = 1e-5
"""Relative change of the prediction from which on content or a mask counts as having an effect."""


@dataclass
class BatchBehaviour:
    """How samples of one batch relate.

    Attributes:
        repeatable: two runs from different random states agree.
        single: a batch of one runs; otherwise the message of its exception.
        mixing: relative change of a sample when the content of its neighbour changes; None when not tried.
        mixed: relative difference between different masks in one batch and the same masks apart; None when
            that is not possible at all.
        reason: why a batch of two or different masks are not possible.
    """

    repeatable: float = 0.0
    single: str = ""
    mixing: float | None = None
    mixed: float | None = None
    reason: str = ""


@dataclass
class MaskBehaviour:
    """What letting one modality through by the mask alone does, nothing blanked; numbers in order of modality.

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

    @property
    def leaks(self) -> bool:
        """Whether hidden content changed the prediction."""
        return any(leak > EFFECT for leak in self.leak)

    def permutation(self) -> tuple[int, ...] | None:
        """Return which modality each column switches, when that is a permutation other than the identity."""
        order = tuple(self.columns[k][0] if len(self.columns.get(k, ())) == 1 else k for k in range(len(self.effect)))
        clean = all(len(shown) == 1 for shown in self.columns.values())
        return order if self.columns and clean and sorted(order) == list(range(len(order))) else None


_WIDTH = 110

_STUDENTS = {
    "replay": "encoder outputs of the fused pass are replayed",
    "mixed": "the modality's encoder outputs are replayed, the others' come from an absent input",
    "rerun": "the whole network runs again on an input with everything else blanked",
    "heads": "small heads on the encoder features: one modality alone cannot be let through",
    "auto": "not decided",
}


@dataclass
class BackboneReport:
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
        skipping_error: relative difference, of all outputs and gradients, between runs with and without the
            encoders of missing modalities; None when not tried.
        module_summary: layers and parameters.
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
    skipping_error: float | None = None
    module_summary: ModuleSummary | None = None
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
            parts.append(f"masks {'may' if self.spec.per_sample_masks else 'must not'} differ within a batch")
            parts.append(
                f"encoders of missing modalities {'can' if self.spec.can_skip_encoders else 'cannot'} be skipped"
            )
        if self.batch.repeatable:
            parts.append(f"two runs in evaluation mode differ by {_number(self.batch.repeatable)}")
        parts += [text for text in (self.batch.single, self.batch.reason) if text]
        return "; ".join(parts)

    def _layers(self) -> str:
        if self.module_summary is None:
            return ""
        found = self.module_summary
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

"""Which way of letting one modality through is exact: the rungs of the ladder compared with true runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from passion_plugin.backbone import BackboneSpec, Prediction, StudentInput, fused_pass, student_pass
from passion_plugin.detection._checks import equality_tolerance
from passion_plugin.detection._gradients import gradient_difference, student_mode_difference, true_student
from passion_plugin.detection._probe import Probe, relative_difference
from passion_plugin.detection._report import EFFECT
from passion_plugin.detection._sandbox import reseed
from passion_plugin.errors import PassionError, short

__all__ = [
    "StudentModeChoice",
    "TrueRuns",
    "choose_student_mode",
    "reasons_against_one_alone",
    "true_runs",
    "with_student_mode",
]


@dataclass
class TrueRuns:
    """True runs with one modality alone: blanked input, one-hot mask, nothing replayed.

    Attributes:
        tables: masks (B, M) of fused passes whose students are compared.
        alone: for every table and modality the prediction of the rows that have it.
        finite: for each modality, whether logits and features are finite.
        own: for each modality, relative change of the logits when its content changes.
        failures: for each modality, the exception that its run raised.
        seen: modalities whose runs depend on the content of others, which a wrong ``absent`` leaves there.
    """

    tables: list[Tensor]
    alone: list[dict[str, Prediction]] = field(default_factory=list)
    finite: dict[str, bool] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)


@dataclass
class StudentModeChoice:
    """The way up the ladder.

    Attributes:
        spec: with ``students`` decided, or None when no rung holds.
        errors: relative difference from the true runs, by description of what was tried.
        reasons: exceptions, by description of what was tried.
    """

    spec: BackboneSpec | None = None
    errors: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def true_runs(probe: Probe, spec: BackboneSpec, *, mixed: bool) -> TrueRuns:
    """Run every modality alone.

    Args:
        probe: the backbone, in a sandbox.
        spec: how to talk to it.
        mixed: whether the samples of one batch may have different masks.
    """
    found = TrueRuns(_tables(probe.batch, len(probe.modalities), mixed))
    for table in found.tables:
        found.alone.append({})
        for student_input in StudentInput.singles(probe.modalities, table):
            (name,) = student_input.modalities
            m = probe.modalities.index(name)
            if name in found.failures or any(name in earlier for earlier in found.alone[:-1]):
                continue
            try:
                alone = true_student(probe, spec, table, student_input)
                changed = true_student(probe, spec, table, student_input, m)
            except Exception as error:
                found.failures[name] = short(error)
                continue
            found.finite[name] = all(bool(torch.isfinite(tensor).all()) for tensor in alone.tensors())
            found.own[name] = relative_difference(changed.logits, alone.logits)
            found.alone[-1][name] = alone
            if spec.fill_missing is not None:
                others = [number for number in range(len(probe.modalities)) if number != m]
                leaking = true_student(probe, spec, table, student_input, *others)
                if relative_difference(leaking.logits, alone.logits) > EFFECT:
                    found.seen.append(name)
    return found


def choose_student_mode(
    probe: Probe,
    spec: BackboneSpec,
    truth: TrueRuns,
    alternatives: Sequence[Mapping[str, tuple[str, ...]]] = (),
    *,
    noisy: bool = False,
) -> StudentModeChoice:
    """Return the first rung on which students equal the true runs.

    Args:
        probe: the backbone, in a sandbox.
        spec: what is known; a spec whose ``students`` is decided is only checked.
        truth: the true runs.
        alternatives: other sets of encoder modules, to try where those of the spec cannot be replayed.
        noisy: the backbone draws random numbers, so that students must start where the encoders ended.
    """
    result = StudentModeChoice()
    for what, candidate in _candidates(spec, alternatives):
        for trial in (candidate, candidate.replaced(copy_features=True)):
            label = f"{what}, features copied" if trial.copy_features else what
            try:
                error = _error(probe, trial, truth, noisy)
            except Exception as failure:
                result.reasons[label] = short(failure)
                if not isinstance(failure, PassionError) or "copy_features" not in str(failure):
                    break
                continue
            result.errors[label] = error
            exact = error <= _tolerance(truth)
            reason = _wrong_gradient(probe, trial, 10 * _tolerance(truth)) if exact and not noisy else ""
            if reason:
                result.reasons[label] = reason
            elif exact:
                result.spec = trial
                return result
            break
    return result


def with_student_mode(probe: Probe, spec: BackboneSpec) -> BackboneSpec:
    """Return the spec with ``is_training`` switched off for students, where that changes no prediction.

    Most public multi-encoder networks compute their auxiliary outputs when an attribute of this name is set.
    """
    for owner, prefix in ((probe.backbone, ""), (getattr(probe.backbone, "_orig_mod", None), "_orig_mod.")):
        if owner is None or not isinstance(vars(owner).get("is_training"), bool):
            continue
        light = spec.replaced(student_mode={f"{prefix}is_training": False})
        table = probe.presence()
        student_input = StudentInput.singles(probe.modalities, table)[0]
        try:
            full, lean = (true_student(probe, how, table, student_input) for how in (spec, light))
            tolerance = 10 * equality_tolerance(full.logits)
            kept = _difference(lean, full) <= 1e-6 and student_mode_difference(probe, spec, light) <= tolerance
        except Exception:
            continue
        if kept:
            return light
    return spec


def _tables(batch: int, count: int, mixed: bool) -> list[Tensor]:
    """Return partial masks: together they show every modality in a row that lacks another one."""
    everything = torch.ones(batch, count, dtype=torch.bool)
    if count == 2:
        table = everything.clone()
        if mixed and batch > 1:
            table[-1, -1] = False
        return [table]
    if mixed and batch > 1:
        table = everything.clone()
        for row in range(batch):
            table[row, (row + 1) % count] = False
        return [table]
    without_last, without_first = everything.clone(), everything.clone()
    without_last[:, -1] = False
    without_first[:, 0] = False
    return [without_last, without_first]


def _candidates(
    spec: BackboneSpec, alternatives: Sequence[Mapping[str, tuple[str, ...]]]
) -> Iterator[tuple[str, BackboneSpec]]:
    if spec.students != "auto":
        yield spec.students, spec
        return
    for encoders in (spec.encoders, *alternatives):
        if encoders:
            some = "" if encoders is spec.encoders else f" of {_listed(encoders)}"
            if spec.mask_argument is not None or spec.forward_fn is not None:
                yield f"replay{some}", spec.replaced(encoders=encoders, students="replay")
            if spec.fill_missing is None:
                yield f"mixed replay{some}", spec.replaced(encoders=encoders, students="mixed")
    yield "re-run", spec.replaced(students="rerun")
    if spec.encoders:
        yield "re-run without naming encoders", spec.replaced(encoders={}, students="rerun")


def _error(probe: Probe, spec: BackboneSpec, truth: TrueRuns, noisy: bool) -> float:
    adapter = probe.bind(spec)
    worst = 0.0
    for table, alone in zip(truth.tables, truth.alone, strict=True):
        reseed()
        keep = noisy and spec.students in ("replay", "mixed")
        fused = fused_pass(adapter, probe.arguments(probe.images(), table), table, keep_rng_state=keep)
        for student_input in StudentInput.singles(probe.modalities, table):
            (name,) = student_input.modalities
            if name not in alone:
                continue
            reseed()
            student = student_pass(adapter, fused, student_input)
            worst = max(worst, _difference(student, alone[name]))
            if worst > _tolerance(truth):
                return worst
    return worst


def _wrong_gradient(probe: Probe, spec: BackboneSpec, tolerance: float) -> str:
    """Say what is wrong with the gradient of the students, if anything is."""
    try:
        difference = gradient_difference(probe, spec)
    except Exception as error:
        return f"in backward: {short(error)}"
    return "" if difference <= tolerance else f"gradients differ from those of true runs by {difference:.1e}"


def _difference(student: Prediction, reference: Prediction) -> float:
    pairs = zip(student.tensors(), reference.tensors(), strict=True)
    return max(relative_difference(value, wanted) for value, wanted in pairs)


def _tolerance(truth: TrueRuns) -> float:
    logits = [prediction.logits for alone in truth.alone for prediction in alone.values()]
    return equality_tolerance(logits[0]) if logits else 0.0


def _listed(encoders: Mapping[str, Any]) -> str:
    names = [name for group in encoders.values() for name in group]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def reasons_against_one_alone(truth: TrueRuns) -> list[str]:
    """Say why a single modality cannot be let through; nothing when it can."""
    reasons = [f"only {name!r}: {text}" for name, text in truth.failures.items()]
    reasons += [f"only {name!r}: not finite" for name, finite in truth.finite.items() if not finite]
    reasons += [
        f"only {name!r}: its content does not reach the prediction"
        for name, own in truth.own.items()
        if own <= EFFECT and truth.finite[name]
    ]
    return reasons

"""Pick the cheapest student mode whose outputs match a full single-modality forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from passion_plugin.backbone import BackboneSpec, Prediction, StudentInput, student_pass
from passion_plugin.detection._checks import different_masks
from passion_plugin.detection._encoders import Encoders
from passion_plugin.detection._gradients import gradient_difference, student_mode_difference, true_student
from passion_plugin.detection._probe import EFFECT, Probe, equality_tolerance, reason_of, relative_difference
from passion_plugin.detection._report import BackboneReport
from passion_plugin.detection._sandbox import reseed
from passion_plugin.errors import BackboneError, PassionError, listed


@dataclass
class TrueRuns:
    """True runs with one modality alone: blanked input, one-hot mask, nothing replayed.

    Attributes:
        tables: masks (B, M) of fused passes whose students are compared.
        alone: for every table and modality the prediction of the rows that have it.
        reasons_against: why the backbone cannot predict from a single modality; empty when it can.
    """

    tables: list[Tensor]
    alone: list[dict[str, Prediction]] = field(default_factory=list)
    reasons_against: list[str] = field(default_factory=list)

    @property
    def tolerance(self) -> float:
        """Relative difference up to which a student counts as equal to a true run."""
        dtypes = [prediction.logits.dtype for alone in self.alone for prediction in alone.values()]
        return equality_tolerance(dtypes[0]) if dtypes else 0.0


def true_runs(probe: Probe, report: BackboneReport, spec: BackboneSpec) -> TrueRuns:
    """Run every modality alone; the report gets which are finite, and whether ``fill_missing`` hides the others."""
    mixed = spec.per_sample_masks and not report.noisy and probe.batch > 1
    found = TrueRuns(_tables(probe.batch, len(probe.modalities), mixed))
    tried: set[str] = set()
    unhidden = []
    for table in found.tables:
        found.alone.append({})
        for student_input in StudentInput.singles(probe.modalities, table):
            (name,) = student_input.modalities
            if name in tried:
                continue
            tried.add(name)
            m = probe.modalities.index(name)
            try:
                alone = true_student(probe, spec, student_input, table)
                changed = true_student(probe, spec, student_input, table, changed=[m])
            except PassionError as error:
                found.reasons_against.append(f"only {name!r}: {reason_of(error)}")
                continue
            found.alone[-1][name] = alone
            report.alone[name] = all(bool(torch.isfinite(tensor).all()) for tensor in alone.tensors())
            if not report.alone[name]:
                found.reasons_against.append(f"only {name!r}: not finite")
            elif relative_difference(changed.logits, alone.logits) <= EFFECT:
                found.reasons_against.append(f"only {name!r}: its content does not reach the prediction")
            if spec.fill_missing is not None:
                others = [number for number in range(len(probe.modalities)) if number != m]
                leaking = true_student(probe, spec, student_input, table, changed=others)
                if relative_difference(leaking.logits, alone.logits) > EFFECT:
                    unhidden.append(name)
    if unhidden:
        report.warnings.append(
            f"fill_missing= does not hide content: with only {', '.join(unhidden)} kept, the content of the others "
            f"still changes the prediction"
        )
    return found


def choose_student_mode(
    probe: Probe, report: BackboneReport, spec: BackboneSpec, truth: TrueRuns, alternatives: Sequence[Encoders]
) -> BackboneSpec:
    """Return the first candidate whose students equal the true runs.

    A spec whose ``students`` is decided is only checked. The ``alternatives`` are tried where the encoders of the spec
    cannot be replayed. The report gets the differences and exceptions of everything that was tried.

    Raises:
        BackboneError: there is none.
    """
    for what, candidate in _candidates(spec, alternatives):
        for trial in (candidate, candidate.replaced(copy_features=True)):
            label = f"{what}, features copied" if trial.copy_features else what
            try:
                error = report.replay_errors[label] = _largest_difference(probe, trial, truth, report.noisy)
            except PassionError as failure:
                report.replay_failures[label] = reason_of(failure)
                if "copy_features" in str(failure):
                    continue
                break
            if error <= truth.tolerance:
                reason = "" if report.noisy else _wrong_gradient(probe, trial, 10 * truth.tolerance)
                if not reason:
                    return trial
                report.replay_failures[label] = reason
            break
    tried = [f"{what}: {reason}" for what, reason in report.replay_failures.items()]
    tried += [f"{what}: relative difference {error:.1e}" for what, error in report.replay_errors.items()]
    raise BackboneError(f"no student mode gives what a true run gives ({'; '.join(tried[:2])})")


def with_student_mode(probe: Probe, spec: BackboneSpec) -> BackboneSpec:
    """Return the spec with ``is_training`` switched off for students, where that changes no prediction.

    Most public multi-encoder networks compute their auxiliary outputs when an attribute of this name is set.
    """
    for owner, prefix in ((probe.backbone, ""), (getattr(probe.backbone, "_orig_mod", None), "_orig_mod.")):
        if owner is None or not isinstance(vars(owner).get("is_training"), bool):
            continue
        changed = spec.replaced(student_mode={f"{prefix}is_training": False})
        try:
            full, lean = (true_student(probe, how) for how in (spec, changed))
            tolerance = 10 * equality_tolerance(full.logits.dtype)
            kept = _difference(lean, full) <= 1e-6 and student_mode_difference(probe, spec, changed) <= tolerance
        except PassionError:
            continue
        if kept:
            return changed
    return spec


def _tables(batch: int, count: int, mixed: bool) -> list[Tensor]:
    """Return partial masks: together they show every modality in a row that misses another one."""
    if count == 2:
        everything = torch.ones(batch, count, dtype=torch.bool)
        if mixed:
            everything[-1, -1] = False
        return [everything]
    if mixed:
        return [different_masks(batch, count)]
    columns = torch.arange(count).expand(batch, -1)
    return [columns != count - 1, columns != 0]


def _candidates(spec: BackboneSpec, alternatives: Sequence[Encoders]) -> Iterator[tuple[str, BackboneSpec]]:
    if spec.students != "auto":
        yield spec.students, spec
        return
    for encoders in (spec.encoders, *alternatives):
        if encoders:
            names = [name for group in encoders.values() for name in group]
            some = "" if encoders is spec.encoders else f" of {listed(names)}"
            if spec.mask_argument is not None or spec.forward_fn is not None:
                yield f"replay{some}", spec.replaced(encoders=encoders, students="replay")
            if spec.fill_missing is None:
                yield f"mixed replay{some}", spec.replaced(encoders=encoders, students="mixed")
    yield "re-run", spec.replaced(students="rerun")
    if spec.encoders:
        yield "re-run without naming encoders", spec.replaced(encoders={}, students="rerun")


def _largest_difference(probe: Probe, spec: BackboneSpec, truth: TrueRuns, noisy: bool) -> float:
    """Compare students with the true runs; those of a noisy backbone must start where the encoders ended."""
    adapter = probe.bind(spec)
    worst = 0.0
    for table, alone in zip(truth.tables, truth.alone, strict=True):
        fused = probe.fused(adapter, table, keep_rng_state=noisy and spec.students in ("replay", "mixed"))
        for student_input in StudentInput.singles(probe.modalities, table):
            (name,) = student_input.modalities
            if name not in alone:
                continue
            reseed()
            student = student_pass(adapter, fused, student_input)
            worst = max(worst, _difference(student, alone[name]))
            if worst > truth.tolerance:
                return worst
    return worst


def _wrong_gradient(probe: Probe, spec: BackboneSpec, tolerance: float) -> str:
    """Say what is wrong with the gradient of the students, if anything is."""
    try:
        difference = gradient_difference(probe, spec)
    except PassionError as error:
        return f"in backward: {reason_of(error)}"
    return "" if difference <= tolerance else f"gradients differ from those of true runs by {difference:.1e}"


def _difference(student: Prediction, reference: Prediction) -> float:
    pairs = zip(student.tensors(), reference.tensors(), strict=True)
    return max(relative_difference(value, wanted) for value, wanted in pairs)

"""The order in which a backbone is asked questions, and how the answers become a spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from passion_plugin.backbone import PREDICTION_KEYS, BackboneSpec, MaskCodec, rival_predictions
from passion_plugin.detection._checks import (
    mask_behaviour,
    mask_meaning,
    probe_batching,
    report_batch,
    report_buffers,
    report_idle_mask,
    report_layers,
    report_mask,
)
from passion_plugin.detection._encoders import Detection, Encoders, detect, uneven_channels
from passion_plugin.detection._gradients import gradient_paths, moved_buffers, skipping_difference, training_problems
from passion_plugin.detection._probe import CallConvention, Probe
from passion_plugin.detection._report import EFFECT, BackboneReport, batch_layers
from passion_plugin.detection._student_modes import (
    TrueRuns,
    choose_student_mode,
    reasons_against_one_alone,
    true_runs,
    with_student_mode,
)

__all__ = ["Inspector"]

# Relative differences. Convolutions over another number of rows add up in another order.
_SAME, _SAME_BUT_FOR_ROUNDING = 1e-6, 1e-4


class Inspector:
    """Asks, and writes what it finds into a report.

    Args:
        report: to be filled; its ``module_summary`` is there already.
        probe: the backbone, in a sandbox.
        convention: how its user calls it (the probe may go through the user's ``call``).
        known: fields of the spec that were given.
        searching: whether encoders and classifier are to be found; otherwise ``known`` is a whole spec.
    """

    def __init__(
        self,
        report: BackboneReport,
        probe: Probe,
        convention: CallConvention,
        known: Mapping[str, Any],
        *,
        searching: bool,
    ) -> None:
        assert report.module_summary is not None
        self.report = report
        self.layers = report.module_summary
        self.probe = probe
        self.convention = convention
        self.known = dict(known)
        self.searching = searching
        self.alternatives: list[Encoders] = []
        self.noisy = False

    def run(self) -> None:
        """Ask everything, as far as the answers allow."""
        report, probe = self.report, self.probe
        report_layers(report, self.layers)
        if self.searching and "classifier" not in self.known and self._has_rivals():
            return
        meaning = mask_meaning(probe)
        if self.searching and not probe.through_call and "mask_meaning" not in self.known:
            self._set_convention(replace(self.convention, mask_meaning=meaning))
        report.convention = self._convention()
        report.batch = probe_batching(probe)
        self.noisy = report.batch.repeatable > EFFECT
        may_mix = self.known.get("per_sample_masks", True)
        self.known["per_sample_masks"] = (
            report_batch(report, report.batch, self.layers, one_mask=not may_mix) and may_mix
        )
        if probe.convention.mask_argument is not None:
            self._examine_mask(meaning)
        if problem := uneven_channels(probe):
            report.problem(problem)
        spec = self._searched() if self.searching else BackboneSpec(**self.known)
        if spec is None or report.problems:
            return
        decided = self._decided(spec)
        report.spec = None if report.problems else decided

    def _has_rivals(self) -> bool:
        """BackboneReport a dictionary whose prediction cannot be told from the rest: answers would be about any of them."""
        rivals = rival_predictions(self.probe.run(self.probe.images(), self.probe.presence()))
        if rivals:
            self.report.problem(
                f"the backbone returns a dictionary in which {_quoted(rivals)} may each be the prediction (none is "
                f"called one of {_quoted(list(PREDICTION_KEYS))}). Name the last layer of the fused prediction as "
                f"classifier="
            )
        return bool(rivals)

    def _set_convention(self, convention: CallConvention) -> None:
        self.convention = convention
        self.probe.set_convention(convention)

    def _examine_mask(self, meaning: str) -> None:
        found = mask_behaviour(self.probe)
        self.report.mask = found
        if found.failure or found.has_effect:
            wrong_way = meaning != self.probe.convention.mask_meaning
            through_call = self.probe.through_call or self.convention.forward_fn is not None
            report_mask(self.report, found, "missing" if wrong_way else "present", through_call=through_call)
            return
        kind = self.convention.mask_format
        bool_helps = False
        if self.searching and kind in ("int", "float") and not self.probe.through_call:
            self._set_convention(replace(self.convention, mask_format="bool"))
            with_bool = mask_behaviour(self.probe)
            bool_helps = with_bool.has_effect and not with_bool.failure
            self._set_convention(replace(self.convention, mask_format=kind))
        report_idle_mask(self.report, str(kind), bool_helps=bool_helps)

    def _searched(self) -> BackboneSpec | None:
        report, known = self.report, self.known
        detection = detect(self.probe)
        report.searched = True
        report.encoders, report.shared = detection.encoders, detection.shared
        if "encoders" not in known:
            known["encoders"] = detection.encoders
            self.alternatives = detection.alternatives()
        if "classifier" in known:
            named = [match for match in detection.classifier.matches if match.name == known["classifier"]]
            report.match = named[-1] if named else None
        else:
            self._choose_classifier(detection)
        if "classifier" in known and "outputs" not in known:
            known["outputs"] = self._outputs()
        if "classifier" not in known:
            return None
        inferred = {
            name: value
            for name, value in ((f.name, getattr(self.convention, f.name)) for f in fields(CallConvention))
            if value is not None or name == "mask_argument"
        }
        spec = BackboneSpec(**{**inferred, **known})
        return spec if "student_mode" in known else with_student_mode(self.probe, spec)

    def _choose_classifier(self, detection: Detection) -> None:
        search, match = detection.classifier, detection.classifier.best()
        self.report.match = match
        if match is None:
            likely = list(dict.fromkeys(search.candidates))[-5:]
            hint = f"; layers with that many output channels: {', '.join(likely)}" if likely else ""
            self.report.problem(
                f"no layer's output is the prediction, as it is or after softmax, sigmoid or interpolation. Name "
                f"the last layer of the fused prediction as classifier={hint}. A backbone that pads its images has to "
                f"undo that before this layer"
            )
        elif match.channels_last:
            self.report.problem(
                f"the prediction is the output of {match.name!r}, which has the classes in its last dimension; "
                f"logits must be (batch, classes, *spatial). Use a 1×1 convolution as classifier"
            )
        elif search.calls[match.name] != 1:
            self.report.problem(
                f"the prediction is the output of the layer {match.name!r}, which runs {search.calls[match.name]} "
                f"times in one pass. The classifier must run once: give the fused prediction a layer of its own, "
                f"or switch the other outputs off, and name it as classifier="
            )
        else:
            self.known["classifier"] = match.name
            if getattr(self.probe.backbone.get_submodule(match.name), "in_channels", 0) == match.classes:
                self.report.warn(
                    f"what enters {match.name!r}, the last layer, has one channel for each class: it may refine logits "
                    f"(a learned up-sampling?), which would then be compared as features. If so, name the layer that "
                    f"makes them as classifier="
                )

    def _outputs(self) -> str:
        match = self.report.match
        if match is not None and ("sigmoid" in match.relation or match.classes == 1):
            return "sigmoid"
        if match is None or "softmax" not in match.relation:
            what = "returns logits" if match else "returns something else than its classifier's output"
            self.report.warn(
                f"the backbone {what}, which does not say whether classes exclude each other: "
                f"outputs='softmax' is assumed. Pass outputs='sigmoid' for regions that may overlap"
            )
        return "softmax"

    def _decided(self, spec: BackboneSpec) -> BackboneSpec | None:
        report = self.report
        # Before anything is compared: a pass in training mode moves running statistics.
        spec = self._with_gradient(spec)
        if report.problems:
            return None
        truth = true_runs(self.probe, spec, mixed=spec.per_sample_masks and not self.noisy)
        report.alone, report.alone_effect = truth.finite, truth.own
        if truth.seen:
            report.warn(
                f"fill_missing= does not hide content: with only {', '.join(truth.seen)} kept, the content of the "
                f"others still changes the prediction"
            )
        against = reasons_against_one_alone(truth)
        heads = spec.students == "heads" or bool(against)
        decided = self._with_heads(spec, against) if heads else self._with_student_mode(spec, truth)
        if decided is None:
            return None
        report.encoders = {name: tuple(found) for name, found in decided.encoders.items()}
        problems, warnings = training_problems(self.probe, decided)
        for text in problems:
            report.problem(text)
        for text in warnings:
            report.warn(text)
        report_buffers(report, moved_buffers(self.probe, decided))
        return decided.replaced(can_skip_encoders=spec.can_skip_encoders or self._can_skip_encoders(decided))

    def _with_gradient(self, spec: BackboneSpec) -> BackboneSpec:
        """Return the spec without encoder modules through which no gradient goes."""
        paths = gradient_paths(self.probe, spec)
        if paths.failure:
            self.report.warn(f"a pass in training mode raised {paths.failure}")
        if paths.reentrant:
            self.report.problem(paths.reentrant)
        if not paths.cut or spec.students not in ("auto", "replay", "mixed"):
            return spec
        text = f"{_quoted(paths.cut)} can learn but runs without gradient (no_grad, or a detach)"
        if spec.students != "auto":
            self.report.problem(f"{text}; leave it out of encoders=, or set students='rerun'")
            return spec
        self.report.warn(f"{text}; it is not replayed")
        self.alternatives = [_without(encoders, paths.cut) for encoders in self.alternatives]
        return spec.replaced(encoders=_without(spec.encoders, paths.cut))

    def _with_student_mode(self, spec: BackboneSpec, truth: TrueRuns) -> BackboneSpec | None:
        result = choose_student_mode(self.probe, spec, truth, self.alternatives, noisy=self.noisy)
        self.report.replay_errors = result.errors
        self.report.replay_failures = result.reasons
        if result.spec is None:
            tried = [f"{what}: {reason}" for what, reason in result.reasons.items()]
            tried += [f"{what}: relative difference {error:.1e}" for what, error in result.errors.items()]
            self.report.problem(
                f"no way of letting one modality through gives what a true run gives ({'; '.join(tried[:2])})"
            )
        return result.spec

    def _with_heads(self, spec: BackboneSpec, against: list[str]) -> BackboneSpec | None:
        complete = all(spec.encoders.get(name) for name in self.probe.modalities)
        if complete and spec.students in ("auto", "heads"):
            if against:
                self.report.warn(
                    f"one modality alone cannot be let through ({'; '.join(against)}): students are heads on the "
                    f"encoder features, which distil into the encoders but not into the decoder"
                )
            return spec.replaced(students="heads")
        self.report.problem(
            f"one modality alone cannot be let through ({'; '.join(against) or 'not tried'}), and heads on encoder "
            f"features need encoders for every modality: name them as encoders= (with students='auto' or "
            f"'heads'), or correct the fusion (a variance of one modality? use unbiased=False)"
        )
        return None

    def _can_skip_encoders(self, spec: BackboneSpec) -> bool:
        if not spec.encoders or spec.students == "mixed" or self.noisy or self.report.problems:
            return False
        # Without a mask among its arguments, nothing makes a network hide in the fused pass what is not there; features
        # of a blank image may be zero now and not after training.
        if spec.mask_argument is None:
            return False
        adapter = self.probe.bind(spec)
        if any(batch_layers(module) for modules in adapter.encoders.values() for module in modules):
            return False
        try:
            absent = skipping_difference(self.probe, spec, "absent")
            rows = (
                skipping_difference(self.probe, spec, "rows") if spec.per_sample_masks and self.probe.batch > 1 else 0.0
            )
        except Exception:
            return False
        self.report.skipping_error = max(absent, rows)
        return absent <= _SAME and rows <= _SAME_BUT_FOR_ROUNDING

    def _convention(self) -> str:
        how = self.convention
        if self.probe.through_call:
            return "through the given call, with a bool mask, 1 = present"
        images = f"images: argument {how.input_argument!r}"
        if how.mask_argument is None:
            return f"{images}; no mask"
        kind = "given codec" if isinstance(how.mask_format, MaskCodec) else how.mask_format
        return f"{images}; mask: argument {how.mask_argument!r}, {kind}, 1 = {how.mask_meaning}"


def _without(encoders: Mapping[str, Any], names: list[str]) -> dict[str, tuple[str, ...]]:
    left = {modality: tuple(name for name in found if name not in names) for modality, found in encoders.items()}
    return left if any(left.values()) else {}


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names))

"""The order in which a backbone is asked questions, and what the answers mean for wrapping it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from passion_plugin.backbone.checks import (
    EFFECT,
    equality_tolerance,
    mask_behaviour,
    mask_meaning,
    settle_batch,
)
from passion_plugin.backbone.detection import Detection, detect
from passion_plugin.backbone.findings import Report
from passion_plugin.backbone.ladder import (
    References,
    climb,
    references,
    stacking_difference,
    with_light_mode,
)
from passion_plugin.backbone.masks import MaskCodec
from passion_plugin.backbone.probe import Interface, Probe
from passion_plugin.backbone.spec import BackboneSpec
from passion_plugin.backbone.training import gradient_paths, training_problems

__all__ = ["Examination"]


class Examination:
    """Asks, and writes what it finds into a report.

    Args:
        report: to be filled.
        probe: the backbone, in a sandbox.
        interface: how its user calls it (the probe may go through the user's ``call``).
        known: fields of the spec that were given.
        searching: whether encoders and classifier are to be found; otherwise ``known`` is a whole spec.
    """

    def __init__(
        self, report: Report, probe: Probe, interface: Interface, known: Mapping[str, Any], *, searching: bool
    ) -> None:
        self.report = report
        self.probe = probe
        self.interface = interface
        self.known = dict(known)
        self.searching = searching
        self.alternatives: list[Mapping[str, tuple[str, ...]]] = []
        self.noisy = False

    def run(self) -> None:
        """Ask everything, as far as the answers allow."""
        report, probe = self.report, self.probe
        if self.searching and probe.forward is None and "mask_meaning" not in self.known:
            self._reinterpret(replace(self.interface, mask_meaning=mask_meaning(probe)))
        report.convention = self._convention()
        self._examine_batch()
        if probe.interface.mask_argument is not None:
            self._examine_mask()
        spec = self._searched() if self.searching else BackboneSpec(**self.known)
        if spec is None or report.problems:
            return
        decided = self._decided(self._with_light_mode(spec))
        if decided is not None and not report.problems:
            report.spec = decided
        self._warn_about_layers()

    def _reinterpret(self, interface: Interface) -> None:
        self.interface = interface
        self.probe.reinterpret(interface)

    def _examine_batch(self) -> None:
        report, probe = self.report, self.probe
        report.batch = found = settle_batch(probe)
        tolerance = equality_tolerance(torch.empty(0, dtype=torch.get_default_dtype()))
        self.noisy = found.repeatable > EFFECT
        if self.noisy:
            report.warn(
                f"two runs in evaluation mode differ by {found.repeatable:.1e}: dropout or sampling that is always on. "
                f"Teacher and students see different noise"
            )
        if found.single:
            report.problem(
                f"{found.single}, while a batch of two runs. Students run on the rows of a batch that have their "
                f"modality, often on one: is the mask used as an index (an integer mask, or .long() of it, picks rows "
                f"instead of masking), or something squeezed?"
            )
        layers = report.anatomy
        if found.mixing is not None and found.mixing > EFFECT:
            if layers is not None and layers.no_running:
                report.warn(
                    "batch normalisation without running statistics couples the samples of a batch also in evaluation"
                )
            else:
                report.problem(
                    f"the samples of a batch are not independent: the prediction of one changes by {found.mixing:.1e} "
                    f"when the content of its neighbour changes (a softmax or a mean over the batch axis?). Students "
                    f"run on some rows of the batch and would not see what the teacher saw; make the samples "
                    f"independent in the backbone"
                )
        can_mix = found.mixed is not None and found.mixed <= tolerance
        if self.known.get("mixed_masks") and not can_mix and self.probe.batch > 1 and not self.searching:
            why = found.reason or f"they differ from separate batches by {found.mixed or 0:.1e}"
            report.warn(f"masks that differ within a batch are not right in this backbone ({why})")
        self.known.setdefault("mixed_masks", can_mix)
        if not can_mix:
            self.known["mixed_masks"] = False

    def _examine_mask(self) -> None:
        report, names = self.report, self.probe.modalities
        report.mask = found = mask_behaviour(self.probe)
        order = found.permutation()
        if found.failure:
            report.warn(found.failure)
        elif order is not None:
            columns = tuple(names[m] for m in order)
            switched = "; ".join(f"mask column {k} switches {names[m]!r}" for k, m in enumerate(order))
            report.problem(
                f"the columns of the mask do not have the order of the images: {switched}. Pass mask_columns={columns!r}, "
                f"or give modalities and images in the order of the mask"
            )
        elif found.columns:
            for k, shown in found.columns.items():
                listed = ", ".join(repr(names[m]) for m in shown) or "nothing"
                report.problem(
                    f"mask column {k} is expected to let {names[k]!r} through, but the content that then reaches the "
                    f"prediction is that of {listed}. Pass mask_columns= with the modality of each column, or "
                    f"mask_meaning='missing' if a 1 hides"
                )
        elif not found.has_effect:
            self._explain_idle_mask()
        elif found.leaks:
            worst = max(range(len(names)), key=lambda m: found.leak[m])
            report.warn(
                f"content of masked modalities leaks into the prediction (by {found.leak[worst]:.1e} with only "
                f"{names[worst]!r} present): the mask alone does not hide it. Students get a blanked input; keep "
                f"missing channels blank in your data too"
            )

    def _explain_idle_mask(self) -> None:
        kind = self.interface.mask_format
        if kind in ("int", "float") and self.searching:
            self._reinterpret(replace(self.interface, mask_format="bool"))
            try:
                helps = mask_behaviour(self.probe).has_effect
            except Exception:
                helps = False
            self._reinterpret(replace(self.interface, mask_format=kind))
            if helps:
                self.report.problem(
                    f"the example mask is of type {kind} and hides nothing, while a torch.bool mask does: the "
                    f"backbone indexes with it. Pass mask.bool()"
                )
                return
        self.report.warn(
            "the mask has no effect on the prediction; only a blank input hides a modality. Students get a blanked "
            "input; keep missing channels blank in your data too"
        )

    def _searched(self) -> BackboneSpec | None:
        report, known = self.report, self.known
        detection = detect(self.probe)
        report.encoders, report.shared = detection.encoders, detection.shared
        if "encoders" not in known:
            known["encoders"] = detection.encoders
            self.alternatives = detection.alternatives()
        if "classifier" in known:
            report.match = next(
                (m for m in detection.classifier.matches if m.name == known["classifier"]), None
            )
        else:
            self._choose_classifier(detection)
        if report.match is not None and "outputs" not in known:
            known["outputs"] = self._outputs()
        if "classifier" not in known:
            return None
        names = {field.name for field in fields(BackboneSpec)}
        inferred = {f.name: getattr(self.interface, f.name) for f in fields(Interface) if f.name in names}
        inferred = {
            name: value for name, value in inferred.items() if value is not None or name == "mask_argument"
        }
        return BackboneSpec(**{**inferred, **known})

    def _choose_classifier(self, detection: Detection) -> None:
        search, match = detection.classifier, detection.classifier.best()
        self.report.match = match
        if match is None:
            likely = list(dict.fromkeys(search.candidates))[-5:]
            self.report.problem(
                "no layer's output is the prediction, as it is or after softmax, sigmoid or interpolation. Name the "
                "last layer of the fused prediction as classifier="
                + (f"; layers with an output of that many channels: {', '.join(likely)}" if likely else "")
            )
        elif match.channels_last:
            self.report.problem(
                f"the prediction is the output of {match.name!r}, which has the classes in its last dimension; logits "
                f"must be (batch, classes, *spatial). Use a 1×1 convolution as classifier"
            )
        elif search.calls[match.name] != 1:
            self.report.problem(
                f"the prediction is the output of the layer {match.name!r}, which runs {search.calls[match.name]} times "
                f"in one pass. The classifier must run once: give the fused prediction a layer of its own, or switch "
                f"the other outputs off (light= and the call of your loop) and name it as classifier="
            )
        else:
            self.known["classifier"] = match.name

    def _outputs(self) -> str:
        match = self.report.match
        assert match is not None
        if "sigmoid" in match.relation or match.classes == 1:
            return "sigmoid"
        if "softmax" not in match.relation and not self.report.problems:
            self.report.warn(
                "the backbone returns logits, which do not say whether classes exclude each other: outputs='softmax' is "
                "assumed. Pass outputs='sigmoid' for regions that may overlap"
            )
        return "softmax"

    def _with_light_mode(self, spec: BackboneSpec) -> BackboneSpec:
        return with_light_mode(self.probe, spec) if self.searching and "light" not in self.known else spec

    def _decided(self, spec: BackboneSpec) -> BackboneSpec | None:
        report = self.report
        spec = self._with_gradient(spec)
        if report.problems:
            return None
        truth = references(self.probe, spec, mixed=spec.mixed_masks and not self.noisy)
        report.alone, report.alone_effect = truth.finite, truth.own
        if spec.students == "heads" or not truth.usable:
            decided = self._heads_or_refusal(spec, truth)
        else:
            decided = self._climbed(spec, truth)
        if decided is None:
            return None
        problems, warnings = training_problems(self.probe, decided)
        for text in problems:
            report.problem(text)
        for text in warnings:
            report.warn(text)
        return decided.replaced(stackable=self._stackable(decided))

    def _with_gradient(self, spec: BackboneSpec) -> BackboneSpec:
        """Return the spec without encoder modules through which no gradient goes.

        Asked before anything is compared: a pass in training mode may move running statistics.
        """
        paths = gradient_paths(self.probe, spec)
        if paths.failure:
            self.report.warn(f"a pass in training mode raised {paths.failure}")
        if paths.reentrant:
            self.report.problem(
                f"reentrant activation checkpointing around {_quoted(paths.reentrant)}: these modules run without "
                f"gradient and once more in backward, so that what they put out cannot be recorded and replayed. Call "
                f"torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        if not paths.cut or spec.students not in ("auto", "replay", "mixed"):
            return spec
        text = f"{_quoted(paths.cut)} can learn but runs without gradient (no_grad, or a detach)"
        if spec.students != "auto":
            self.report.problem(f"{text}; leave it out of encoders=, or set students='rerun'")
            return spec
        self.report.warn(f"{text}; it is not replayed")
        self.alternatives = [_without(encoders, paths.cut) for encoders in self.alternatives]
        return spec.replaced(encoders=_without(spec.encoders, paths.cut))

    def _climbed(self, spec: BackboneSpec, truth: References) -> BackboneSpec | None:
        result = climb(self.probe, spec, truth, self.alternatives, noisy=self.noisy)
        self.report.replay_errors.update(result.errors)
        self.report.replay_failures.update(result.reasons)
        if result.spec is None:
            tried = [f"{what}: relative difference {error:.1e}" for what, error in result.errors.items()]
            tried = [f"{what}: {reason}" for what, reason in result.reasons.items()] or tried
            self.report.problem(
                f"no way of letting one modality through gives what a true run gives ({'; '.join(tried[:2])})"
            )
        elif result.spec.encoders:
            self.report.encoders = {name: tuple(found) for name, found in result.spec.encoders.items()}
        return result.spec

    def _heads_or_refusal(self, spec: BackboneSpec, truth: References) -> BackboneSpec | None:
        reasons = [f"only {name!r}: {text}" for name, text in truth.failures.items()]
        reasons += [f"only {name!r}: not finite" for name, finite in truth.finite.items() if not finite]
        reasons += [
            f"only {name!r}: its content does not reach the prediction"
            for name, own in truth.own.items()
            if own <= EFFECT and truth.finite[name]
        ]
        complete = spec.encoders and all(spec.encoders.get(name) for name in self.probe.modalities)
        if complete and spec.students in ("auto", "heads"):
            if reasons:
                self.report.warn(
                    f"one modality alone cannot be let through ({'; '.join(reasons)}): students are heads on the "
                    f"encoder features, which distil into the encoders but not into the decoder"
                )
            return spec.replaced(students="heads")
        self.report.problem(
            f"one modality alone cannot be let through ({'; '.join(reasons) or 'unknown reason'}), and heads on encoder "
            f"features need encoders for every modality: name them as encoders=, or correct the fusion (a variance of "
            f"one modality? use unbiased=False)"
        )
        return None

    def _stackable(self, spec: BackboneSpec) -> bool:
        layers = self.report.anatomy
        coupled = layers is None or layers.batch_statistics > 0
        if not spec.mixed_masks or self.noisy or coupled or spec.students == "heads":
            return False
        try:
            self.report.stacking_error = stacking_difference(self.probe, spec)
        except Exception:
            return False
        return self.report.stacking_error <= 1e-3

    def _warn_about_layers(self) -> None:
        layers = self.report.anatomy
        assert layers is not None
        if layers.batch_statistics:
            self.report.warn(
                f"{layers.batch_statistics} batch normalisation layers: their running statistics follow the fused pass "
                f"only, and students cannot be stacked"
            )
        for remark in layers.wrappers:
            self.report.warn(remark)

    def _convention(self) -> str:
        how = self.interface
        if self.probe.forward is not None:
            return "through the given call, with a bool mask, 1 = present"
        images = f"images: argument {how.input_argument!r}"
        if how.mask_argument is None:
            return f"{images}; no mask"
        kind = "given codec" if isinstance(how.mask_format, MaskCodec) else how.mask_format
        return f"{images}; mask: argument {how.mask_argument!r}, {kind}, 1 = {how.mask_meaning}"


def _without(encoders: Mapping[str, Any], names: list[str]) -> dict[str, tuple[str, ...]]:
    left = {
        modality: tuple(name for name in found if name not in names) for modality, found in encoders.items()
    }
    return left if any(left.values()) else {}


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names))

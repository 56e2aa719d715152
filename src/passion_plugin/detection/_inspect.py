"""Find out how a backbone can be wrapped: the ways in, the order of the questions, the answers as a spec."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from passion_plugin.backbone import PREDICTION_KEYS, BackboneCall, BackboneSpec, rival_predictions
from passion_plugin.detection._checks import check_batch, check_mask, check_modules, mask_meaning
from passion_plugin.detection._classifier import ClassifierSearch
from passion_plugin.detection._convention import CallConvention, example_call, infer_call_convention, infer_modalities
from passion_plugin.detection._encoders import Encoders, find_modules, uneven_channels
from passion_plugin.detection._gradients import check_buffers, check_training, cut_off_encoders, skipping_difference
from passion_plugin.detection._probe import BackboneRunError, Probe
from passion_plugin.detection._report import BackboneReport, batch_norms, module_summary
from passion_plugin.detection._sandbox import lazy_parameters, sandbox
from passion_plugin.detection._student_modes import choose_student_mode, true_runs, with_student_mode
from passion_plugin.errors import BackboneError, ConfigError, PassionError, listed, quoted, suggest

# Relative differences. Convolutions over another number of rows add up in another order.
_SAME, _SAME_BUT_FOR_ROUNDING = 1e-6, 1e-4


def inspect_backbone(
    backbone: nn.Module,
    example_input: Any,
    example_mask: Any = None,
    *,
    modalities: Sequence[str] | None = None,
    **known: Any,
) -> BackboneReport:
    """Find out how a backbone can be wrapped, and print it; arguments are those of :func:`detect_spec`.

    A backbone that cannot be wrapped does not raise; the report says so and why.

    Returns:
        The report, with the ``spec`` if the backbone can be wrapped.

    Raises:
        ConfigError: ``known`` holds something that is not a field of the spec.
    """
    report = _inspect_example(backbone, example_input, example_mask, modalities, known)
    print(report)
    return report


def detect_spec(
    backbone: nn.Module,
    example_input: Any,
    example_mask: Any = None,
    *,
    modalities: Sequence[str] | None = None,
    **known: Any,
) -> BackboneSpec:
    """Find encoders and classifier of a backbone, check what holds for it, and return its spec.

    Encoders are found by perturbation: the outermost modules whose every call depends on exactly one modality. The
    classifier is found by value: the last layer whose output is the prediction as it is, or after softmax, sigmoid or
    interpolation.

    Args:
        backbone: any module. Afterwards it is what it was: parameters, buffers, modes, attributes.
        example_input: images as the backbone takes them, all modalities with content; only shapes, types and range
            matter. A few voxels and a batch of 1 or 2 are enough.
        example_mask: a mask as the backbone takes it; None when it takes none.
        modalities: names; keys of a mapping, or ``("0", "1", …)`` when None.
        **known: fields of :class:`BackboneSpec` that are not to be detected.

    Returns:
        A spec with ``students`` decided.

    Raises:
        BackboneError: listing everything that was not found or does not hold, and what to pass by hand.
        ConfigError: ``known`` holds something that is not a field of the spec.
    """
    return _inspect_example(backbone, example_input, example_mask, modalities, known).accepted()


def inspect_call(
    backbone: nn.Module, call: BackboneCall, modalities: Sequence[str], *, spec: BackboneSpec | None = None
) -> BackboneReport:
    """Find out how a backbone can be wrapped, with the arguments of a real call; with a ``spec``, only check that."""
    report = BackboneReport(type(backbone).__name__, tuple(modalities))
    known = {} if spec is None else vars(spec)
    return _inspect(report, backbone, call, known, searching=spec is None)


def _inspect_example(
    backbone: nn.Module, example_input: Any, example_mask: Any, modalities: Sequence[str] | None, known: dict[str, Any]
) -> BackboneReport:
    names = {field.name for field in fields(BackboneSpec)}
    for name in known:
        if name not in names:
            raise ConfigError(f"BackboneSpec has no field {name!r}.{suggest(name, names)}")
    known = {"mask_argument": None if example_mask is None else 1, **known}
    report = BackboneReport(type(backbone).__name__)
    try:
        inferred = infer_modalities(example_input, example_mask) if modalities is None else modalities
        report.modalities = tuple(inferred)
        if known.get("forward_fn") is not None:
            call = BackboneCall((example_input, example_mask), {})
        else:
            where = known.get("input_argument", 0), known["mask_argument"]
            call = example_call(backbone, example_input, example_mask, *where)
    except PassionError as error:
        report.problems.append(str(error))
        return report
    return _inspect(report, backbone, call, known, searching=True)


def _inspect(
    report: BackboneReport, backbone: nn.Module, call: BackboneCall, known: Mapping[str, Any], *, searching: bool
) -> BackboneReport:
    """Fill the report; when searching with a ``forward_fn`` that is known, the call is ``(images, mask)`` for it."""
    if len(report.modalities) < 2:
        report.problems.append(f"there must be at least two modalities, got {report.modalities}: pass modalities=")
        return report
    hint = ""
    try:
        convention = infer_call_convention(backbone, call, report.modalities, known)
        through_call = searching and convention.forward_fn is not None
        classifier = known.get("classifier")
        probe = Probe(backbone, call, report.modalities, convention, through_call=through_call, classifier=classifier)
        hint = probe.vector_hint()
        lazy = lazy_parameters(backbone)
        if lazy:
            probe.initialize()
        report.layers = module_summary(backbone)
        report.layers += [f"parameters that had no shape before: {len(lazy)} ({listed(lazy, 3)})"] if lazy else []
        with sandbox(backbone):
            _Inspector(report, probe, convention, known, searching).run()
    except BackboneRunError as error:
        raised = error.__cause__
        assert raised is not None
        frame = traceback.extract_tb(raised.__traceback__)[-1]
        report.problems.append(
            f"the backbone could not be run: {type(raised).__name__}: {raised} (line {frame.lineno} of "
            f"{frame.filename}). Is it called as it should be? See input_argument=, mask_argument=, "
            f"mask_format= and forward_fn={hint}"
        )
    except PassionError as error:
        report.problems.append(str(error))
    return report


@dataclass
class _Inspector:
    """Asks all questions about a backbone (in a sandbox), and writes the answers into a report.

    The ``convention`` is that of its user (the probe may go through the user's ``forward_fn``). When not ``searching``
    for encoders and classifier, ``known`` is a whole spec.
    """

    report: BackboneReport
    probe: Probe
    convention: CallConvention
    known: Mapping[str, Any]
    searching: bool

    def run(self) -> None:
        """Ask everything, as far as the answers allow; raise what leaves nothing to ask."""
        report, probe, known = self.report, self.probe, self.known
        check_modules(probe.backbone, report)
        if self.searching and "classifier" not in known:
            self._check_rivals()
        meaning = mask_meaning(probe)
        if self.searching and not probe.through_call and "mask_meaning" not in known:
            self.convention = replace(self.convention, mask_meaning=meaning)
            probe.set_convention(self.convention)
        through = "through the given call, with a bool mask, 1 = present"
        report.convention = through if probe.through_call else str(self.convention)
        one_mask = not known.get("per_sample_masks", True)
        per_sample_masks = check_batch(probe, report, one_mask=one_mask) and not one_mask
        how = probe.convention
        if how.mask_argument is not None:
            try_bool = self.searching and not probe.through_call and how.mask_format in ("int", "float")
            check_mask(probe, report, inverted=meaning != how.mask_meaning, try_bool=try_bool)
        if problem := uneven_channels(probe):
            report.problems.append(problem)
        if self.searching:
            spec, alternatives = self._found_spec(per_sample_masks)
        else:
            spec, alternatives = BackboneSpec(**{**known, "per_sample_masks": per_sample_masks}), []
        if not report.problems:
            decided = self._decided(spec, alternatives)
            report.spec = None if report.problems else decided

    def _check_rivals(self) -> None:
        """Raise where the prediction cannot be told from the rest of a dictionary: answers would be about any of it."""
        rivals = rival_predictions(self.probe.run())
        if rivals:
            raise BackboneError(
                f"the backbone returns a dictionary in which {quoted(rivals, 20)} may each be the prediction (none is "
                f"called one of {quoted(PREDICTION_KEYS, 20)}). Name the last layer of the fused prediction as "
                f"classifier="
            )

    def _found_spec(self, per_sample_masks: bool) -> tuple[BackboneSpec, list[Encoders]]:
        """Return the spec, and sets of encoder modules to try instead of its own."""
        report = self.report
        found = find_modules(self.probe)
        report.searched = True
        report.encoders, report.shared = found.encoders, found.shared
        fields = {**vars(self.convention), "encoders": found.encoders, **self.known}
        fields["per_sample_masks"] = per_sample_masks
        if "classifier" in fields:
            named = [match for match in found.classifier.matches if match.name == fields["classifier"]]
            report.match = named[-1] if named else None
        else:
            report.match = found.classifier.best()
            fields["classifier"] = self._classifier(found.classifier)
        if "outputs" not in fields:
            fields["outputs"] = self._outputs()
        spec = BackboneSpec(**fields)
        alternatives = [] if "encoders" in self.known else found.alternatives()
        return spec if "student_mode" in self.known else with_student_mode(self.probe, spec), alternatives

    def _classifier(self, search: ClassifierSearch) -> str:
        match = self.report.match
        if match is None:
            likely = list(dict.fromkeys(search.candidates))[-5:]
            hint = f"; layers with that many output channels: {', '.join(likely)}" if likely else ""
            raise BackboneError(
                f"no layer's output is the prediction, as it is or after softmax, sigmoid or interpolation. Name "
                f"the last layer of the fused prediction as classifier={hint}. A backbone that pads its images has to "
                f"undo that before this layer"
            )
        if match.channels_last:
            raise BackboneError(
                f"the prediction is the output of {match.name!r}, which has the classes in its last dimension; "
                f"logits must be (batch, classes, *spatial). Use a 1×1 convolution as classifier"
            )
        if search.calls[match.name] != 1:
            raise BackboneError(
                f"the prediction is the output of the layer {match.name!r}, which runs {search.calls[match.name]} "
                f"times in one pass. The classifier must run once: give the fused prediction a layer of its own, "
                f"or switch the other outputs off, and name it as classifier="
            )
        if getattr(self.probe.backbone.get_submodule(match.name), "in_channels", 0) == match.classes:
            self.report.warnings.append(
                f"what enters {match.name!r}, the last layer, has one channel for each class: it may refine logits "
                f"(a learned up-sampling?), which would then be compared as features. If so, name the layer that "
                f"makes them as classifier="
            )
        return match.name

    def _outputs(self) -> str:
        match = self.report.match
        if match is not None and ("sigmoid" in match.relation or match.classes == 1):
            return "sigmoid"
        if match is None or "softmax" not in match.relation:
            what = "returns logits" if match else "returns something else than its classifier's output"
            self.report.warnings.append(
                f"the backbone {what}, which does not say whether classes exclude each other: "
                f"outputs='softmax' is assumed. Pass outputs='sigmoid' for regions that may overlap"
            )
        return "softmax"

    def _decided(self, spec: BackboneSpec, alternatives: list[Encoders]) -> BackboneSpec:
        """Return the spec with its student mode, after the checks of what happens in training."""
        report, probe = self.report, self.probe
        # Before anything is compared: a pass in training mode moves running statistics.
        cut = cut_off_encoders(probe, report, spec)
        if cut and spec.students in ("auto", "replay", "mixed"):
            text = f"{quoted(cut, 8)} can learn but runs without gradient (no_grad, or a detach)"
            if spec.students != "auto":
                raise BackboneError(f"{text}; leave it out of encoders=, or set students='rerun'")
            report.warnings.append(f"{text}; it is not replayed")
            spec = spec.replaced(encoders=_without(spec.encoders, cut))
            alternatives = [_without(group, cut) for group in alternatives]
        truth = true_runs(probe, report, spec)
        if spec.students == "heads" or truth.reasons_against:
            decided = self._with_heads(spec, truth.reasons_against)
        else:
            decided = choose_student_mode(probe, report, spec, truth, alternatives)
        report.encoders = {name: tuple(found) for name, found in decided.encoders.items()}
        check_training(probe, report, decided)
        check_buffers(probe, report, decided)
        return decided.replaced(can_skip_encoders=spec.can_skip_encoders or self._can_skip_encoders(decided))

    def _with_heads(self, spec: BackboneSpec, against: list[str]) -> BackboneSpec:
        complete = all(spec.encoders.get(name) for name in self.probe.modalities)
        if not complete or spec.students not in ("auto", "heads"):
            raise BackboneError(
                f"the backbone cannot predict from one modality alone ({'; '.join(against) or 'not tried'}), and heads "
                f"on encoder features need encoders for every modality: name them as encoders= (with students='auto' "
                f"or 'heads'), or correct the fusion (a variance of one modality? use unbiased=False)"
            )
        if against:
            self.report.warnings.append(
                f"the backbone cannot predict from one modality alone ({'; '.join(against)}): students are heads "
                f"on the encoder features, which distil into the encoders but not into the decoder"
            )
        return spec.replaced(students="heads")

    def _can_skip_encoders(self, spec: BackboneSpec) -> bool:
        # Without a mask among its arguments, nothing makes a network hide in the fused pass what is not there; features
        # of a blank image may be zero now and not after training.
        if not spec.encoders or spec.students == "mixed" or spec.mask_argument is None:
            return False
        if self.report.noisy or self.report.problems:
            return False
        adapter = self.probe.bind(spec)
        if any(batch_norms(module) for modules in adapter.encoders.values() for module in modules):
            return False
        by_rows = spec.per_sample_masks and self.probe.batch > 1
        try:
            absent = skipping_difference(self.probe, spec, "absent")
            rows = skipping_difference(self.probe, spec, "rows") if by_rows else 0.0
        except PassionError:
            return False
        return absent <= _SAME and rows <= _SAME_BUT_FOR_ROUNDING


def _without(encoders: Mapping[str, Any], names: Sequence[str]) -> Encoders:
    left = {modality: tuple(name for name in found if name not in names) for modality, found in encoders.items()}
    return left if any(left.values()) else {}

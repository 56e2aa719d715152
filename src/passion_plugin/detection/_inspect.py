"""Find out how a backbone can be wrapped: the ways in."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from passion_plugin.backbone import BackboneCall, BackboneSpec
from passion_plugin.detection._convention import example_call, infer_call_convention, infer_modalities
from passion_plugin.detection._inspector import Inspector
from passion_plugin.detection._probe import BackboneRunError, Probe
from passion_plugin.detection._report import BackboneReport, module_summary
from passion_plugin.detection._sandbox import lazy_parameters, sandbox
from passion_plugin.errors import ConfigError, PassionError, listed, suggest


def inspect_backbone(
    backbone: nn.Module,
    example_input: Any,
    example_mask: Any = None,
    *,
    modalities: Sequence[str] | None = None,
    **known: Any,
) -> BackboneReport:
    """Find out how a backbone can be wrapped, and print it.

    A backbone that cannot be wrapped does not raise; the report says so and why.

    Args:
        backbone: any module. Afterwards it is what it was: parameters, buffers, modes, attributes.
        example_input: images as the backbone takes them; only shapes, types and range matter.
        example_mask: a mask as the backbone takes it; None when it takes none.
        modalities: names; keys of a mapping, or ``("0", "1", …)`` when None.
        **known: fields of :class:`BackboneSpec` that are not to be detected.

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
        example_input: images as the backbone takes them, all modalities with content; a few voxels and a batch of 1
            or 2 are enough.
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
    """Find out how a backbone can be wrapped, with the arguments of a real call.

    Args:
        backbone: any module.
        call: arguments of a forward; presence of modalities in it does not matter.
        modalities: names, in the order of the mask columns.
        spec: what is known; then nothing is searched for, and only what it says is checked.
    """
    report = BackboneReport(type(backbone).__name__, tuple(modalities))
    known = {} if spec is None else vars(spec)
    return _inspect(report, backbone, call, known, searching=spec is None, through_call=False)


def _inspect_example(
    backbone: nn.Module, example_input: Any, example_mask: Any, modalities: Sequence[str] | None, known: dict[str, Any]
) -> BackboneReport:
    names = {field.name for field in fields(BackboneSpec)}
    for name in known:
        if name not in names:
            raise ConfigError(f"BackboneSpec has no field {name!r}.{suggest(name, names)}")
    known = {"mask_argument": None if example_mask is None else 1, **known}
    report = BackboneReport(type(backbone).__name__)
    through_call = known.get("forward_fn") is not None
    try:
        inferred = infer_modalities(example_input, example_mask) if modalities is None else modalities
        report.modalities = tuple(inferred)
        if through_call:
            call = BackboneCall((example_input, example_mask), {})
        else:
            where = known.get("input_argument", 0), known["mask_argument"]
            call = example_call(backbone, example_input, example_mask, *where)
    except PassionError as error:
        report.problems.append(str(error))
        return report
    return _inspect(report, backbone, call, known, searching=True, through_call=through_call)


def _inspect(
    report: BackboneReport,
    backbone: nn.Module,
    call: BackboneCall,
    known: Mapping[str, Any],
    *,
    searching: bool,
    through_call: bool,
) -> BackboneReport:
    """Fill the report; with ``through_call`` the call is ``(images, mask)`` for the ``forward_fn`` that is known."""
    if len(report.modalities) < 2:
        report.problems.append(f"there must be at least two modalities, got {report.modalities}: pass modalities=")
        return report
    hint = ""
    try:
        convention = infer_call_convention(backbone, call, report.modalities, known)
        classifier = known.get("classifier")
        probe = Probe(backbone, call, report.modalities, convention, through_call=through_call, classifier=classifier)
        hint = probe.vector_hint()
        lazy = lazy_parameters(backbone)
        if lazy:
            probe.initialize()
        report.layers = module_summary(backbone)
        report.layers += [f"parameters that had no shape before: {len(lazy)} ({listed(lazy, 3)})"] if lazy else []
        with sandbox(backbone):
            Inspector(report, probe, convention, known, searching=searching).run()
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

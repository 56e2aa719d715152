"""Examining a backbone: detection, checks, decision; everything that is wrong is collected, not raised."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from passion_plugin.backbone.anatomy import anatomy
from passion_plugin.backbone.calls import BackboneCall
from passion_plugin.backbone.examination import Examination
from passion_plugin.backbone.findings import Report
from passion_plugin.backbone.interface import example_call, infer_interface, infer_modalities
from passion_plugin.backbone.probe import Interface, Probe
from passion_plugin.backbone.sandbox import lazy_parameters, sandbox, untouched_modes
from passion_plugin.backbone.spec import BackboneSpec
from passion_plugin.errors import ConfigError, PassionError, suggest

__all__ = ["Report", "examine", "examine_call", "inspect"]


def examine(
    backbone: nn.Module,
    example_input: Any,
    example_mask: Any = None,
    *,
    modalities: Sequence[str] | None = None,
    **known: Any,
) -> Report:
    """Find out how a backbone can be wrapped, with an example of what it is called with.

    Args:
        backbone: any module. Afterwards it is what it was: parameters, buffers, modes, attributes.
        example_input: images as the backbone takes them; only shapes, types and range matter.
        example_mask: a mask as the backbone takes it; None when it takes none.
        modalities: names; keys of a mapping, or ``("0", "1", …)`` when None.
        **known: fields of :class:`BackboneSpec` that are not to be detected.

    Returns:
        The report; its ``problems`` say why the backbone cannot be wrapped, if it cannot.

    Raises:
        ConfigError: ``known`` holds something that is not a field of the spec.
    """
    _check_known(known)
    images = known.get("input_argument", 0)
    mask_argument = known.get("mask_argument", None if example_mask is None else 1)
    report = Report(type(backbone).__name__)
    through_call = known.get("call") is not None
    try:
        names = tuple(modalities) if modalities is not None else infer_modalities(example_input, example_mask)
        report.modalities = names
        if through_call:
            call = BackboneCall((example_input, example_mask), {})
        else:
            call = example_call(backbone, example_input, example_mask, images, mask_argument)
    except PassionError as error:
        report.problem(str(error))
        return report
    known["mask_argument"] = mask_argument
    return _examine(report, backbone, call, known, searching=True, through_call=through_call)


def examine_call(
    backbone: nn.Module,
    call: BackboneCall,
    modalities: Sequence[str],
    *,
    spec: BackboneSpec | None = None,
    known: Mapping[str, Any] | None = None,
) -> Report:
    """Find out how a backbone can be wrapped, with the arguments of a real call.

    Args:
        backbone: any module.
        call: arguments of a forward; presence of modalities in it does not matter.
        modalities: names, in the order of the mask columns.
        spec: what is known; then nothing is searched for, and only what it says is checked.
        known: without a spec: its fields that are not to be detected.
    """
    _check_known(known or {})
    report = Report(type(backbone).__name__, tuple(modalities))
    if spec is not None:
        known = {field.name: getattr(spec, field.name) for field in fields(BackboneSpec)}
    return _examine(report, backbone, call, dict(known or {}), searching=spec is None)


def inspect(
    backbone: nn.Module,
    example_input: Any,
    example_mask: Any = None,
    *,
    modalities: Sequence[str] | None = None,
    **known: Any,
) -> Report:
    """Print what was found out about a backbone; the arguments are those of :func:`examine`.

    A backbone that cannot be wrapped does not raise; the report says so and why.

    Returns:
        The report.

    Raises:
        ConfigError: ``known`` holds something that is not a field of the spec.
    """
    report = examine(backbone, example_input, example_mask, modalities=modalities, **known)
    print(report)
    return report


def _check_known(known: Mapping[str, Any]) -> None:
    names = {field.name for field in fields(BackboneSpec)}
    for name in known:
        if name not in names:
            raise ConfigError(f"BackboneSpec has no field {name!r}.{suggest(name, names)}")


def _examine(
    report: Report,
    backbone: nn.Module,
    call: BackboneCall,
    known: dict[str, Any],
    *,
    searching: bool,
    through_call: bool = False,
) -> Report:
    if len(report.modalities) < 2:
        report.problem(f"there must be at least two modalities, got {report.modalities}: pass modalities=")
        return report
    report.anatomy = anatomy(backbone)
    hint = ""
    try:
        interface, unclear = infer_interface(backbone, call, report.modalities, known)
        for text in unclear:
            report.problem(text)
        if unclear:
            return report
        called = Interface(absent=interface.absent, call=interface.call) if through_call else interface
        classifier = known.get("classifier")
        probe = Probe(backbone, call, report.modalities, called, through_call=through_call, classifier=classifier)
        hint = probe.vector_hint()
        report.lazy = tuple(lazy_parameters(backbone))
        if report.lazy:
            with untouched_modes(backbone), torch.no_grad():
                known["call"](backbone, *call.args) if through_call else backbone(*call.args, **call.kwargs)
        with sandbox(backbone):
            Examination(report, probe, interface, known, searching=searching).run()
    except PassionError as error:
        report.problem(str(error))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        report.problem(
            f"the backbone could not be run: {type(error).__name__}: {error} (line {frame.lineno} of "
            f"{frame.filename}). Is it called as it should be? See input_argument=, mask_argument=, "
            f"mask_format= and call={hint}"
        )
    return report

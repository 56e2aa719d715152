"""Examining a backbone: detection, checks, decision; everything that is wrong is collected, not raised."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
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
from passion_plugin.backbone.sandbox import lazy_parameters, sandbox
from passion_plugin.backbone.spec import BackboneSpec
from passion_plugin.errors import ConfigError, PassionError, suggest
from passion_plugin.taps import random_state, set_random_state

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
        backbone: any module. Afterwards it is what it was: parameters, buffers, modes, attributes, random state.
        example_input: images as the backbone takes them. Their content does not matter, only shapes and types.
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
    forward = None
    try:
        names = tuple(modalities) if modalities is not None else infer_modalities(example_input, example_mask)
        report.modalities = names
        if known.get("call") is not None and example_mask is not None:
            call = BackboneCall((example_input, example_mask), {})
            forward = _through(backbone, known["call"])
        else:
            call = example_call(backbone, example_input, example_mask, images, mask_argument)
    except PassionError as error:
        report.problem(str(error))
        return report
    known["mask_argument"] = mask_argument
    return _examine(report, backbone, call, known, searching=True, forward=forward)


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


def _through(backbone: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, mask: call(backbone, x, mask)


def _examine(
    report: Report,
    backbone: nn.Module,
    call: BackboneCall,
    known: dict[str, Any],
    *,
    searching: bool,
    forward: Callable[..., Any] | None = None,
) -> Report:
    if len(report.modalities) < 2:
        report.problem(f"there must be at least two modalities, got {report.modalities}: pass modalities=")
        return report
    report.anatomy = anatomy(backbone)
    try:
        interface, unclear = infer_interface(backbone, call, report.modalities, known)
        for text in unclear:
            report.problem(text)
        if unclear:
            return report
        report.lazy = tuple(lazy_parameters(backbone))
        if report.lazy:
            _materialise(backbone, call, forward)
        own_call = Interface(absent=interface.absent) if forward is not None else interface
        probe = Probe(backbone, call, report.modalities, own_call, forward)
        with sandbox(backbone):
            Examination(report, probe, interface, known, searching=searching).run()
    except PassionError as error:
        report.problem(str(error))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        report.problem(
            f"the backbone could not be run: {type(error).__name__}: {error} (at {frame.name}, line {frame.lineno} of "
            f"{frame.filename}). Is it called as it should be? See input_argument=, mask_argument=, mask_format= and call="
        )
    return report


@torch.no_grad()
def _materialise(backbone: nn.Module, call: BackboneCall, forward: Callable[..., Any] | None) -> None:
    """Run lazy modules once, from the user's random state, which decides their initial weights."""
    modes = [(module, module.training) for module in backbone.modules()]
    state = random_state()
    try:
        backbone.eval()
        (forward or backbone)(*call.args, **call.kwargs)
    finally:
        set_random_state(state)
        for module, mode in modes:
            module.training = mode

"""From what the user gave to a backbone that can be trained: preset, detection, checks, heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from passion_plugin.backbone.binding import BoundBackbone
from passion_plugin.backbone.calls import BackboneCall
from passion_plugin.backbone.presets import find_preset, preset
from passion_plugin.backbone.report import examine_call
from passion_plugin.backbone.spec import BackboneSpec
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError
from passion_plugin.heads import build_heads
from passion_plugin.modulation import tied_encoders
from passion_plugin.passes import fused_pass

__all__ = ["example_heads", "initial_spec", "settled_backbone"]


def initial_spec(
    backbone: nn.Module, modalities: Sequence[str], spec: BackboneSpec | str | None
) -> BackboneSpec | None:
    """Return the spec that is known before any data was seen: the given one, a preset, or None."""
    if isinstance(spec, str):
        return preset(spec, backbone, modalities)
    return find_preset(backbone, modalities) if spec is None else spec


def settled_backbone(
    backbone: nn.Module,
    call: BackboneCall,
    modalities: Sequence[str],
    spec: BackboneSpec | None,
    config: PassionConfig,
    forward: Callable[..., Any] | None = None,
) -> BoundBackbone:
    """Detect what is not known and check what was not checked, with the arguments of a real call.

    Args:
        backbone: the module.
        call: arguments of a forward.
        modalities: names.
        spec: what is known; a spec whose ``students`` is not ``"auto"`` is taken at its word.
        config: what students must be able to do.
        forward: what to call to run the backbone, when that is not the backbone itself.

    Raises:
        BackboneError: listing what was not found or does not hold.
        ConfigError: the configuration asks for something that this backbone cannot do.
    """
    if spec is None or spec.students == "auto":
        report = examine_call(backbone, call, modalities, spec=spec)
        report.raise_problems()
        spec = report.spec
        assert spec is not None
    if config.stack_students and not spec.stackable:
        raise ConfigError(
            "stack_students=True, but the checks did not show that this backbone gives the same numbers for "
            "stacked students; use the loop, or set BackboneSpec(stackable=True) if you know better"
        )
    bound = BoundBackbone(backbone, spec, modalities, forward)
    if config.modulation == "encoder":
        if not bound.encoders:
            raise ConfigError("modulation='encoder' needs BackboneSpec.encoders, and none were given or found")
        tied_encoders(bound.encoders)
    return bound


@torch.no_grad()
def example_heads(bound: BoundBackbone, call: BackboneCall) -> nn.ModuleDict:
    """Build the heads that fit what the encoders put out for an example."""
    everything = torch.ones(bound.batch_of(call), len(bound.modalities), dtype=torch.bool)
    with torch.random.fork_rng():
        fused = fused_pass(bound, call, everything)
        features = {modality: fused.record.features(modality) for modality in bound.modalities}
        return build_heads(features, fused.prediction)

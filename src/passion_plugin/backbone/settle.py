"""From what the user gave to a backbone that can be trained: preset, detection, checks, heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from passion_plugin.backbone import interface
from passion_plugin.backbone.binding import BoundBackbone, resting_buffers
from passion_plugin.backbone.calls import BackboneCall
from passion_plugin.backbone.detection import uneven_channels
from passion_plugin.backbone.inputs import channel_share
from passion_plugin.backbone.presets import find_preset, preset
from passion_plugin.backbone.probe import Interface, Probe
from passion_plugin.backbone.report import examine_call
from passion_plugin.backbone.sandbox import lazy_parameters, resting_attributes, sandbox, untouched_modes
from passion_plugin.backbone.spec import BackboneSpec
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError, ConfigError, raise_problems
from passion_plugin.heads import build_heads
from passion_plugin.parallel import is_sharded
from passion_plugin.passes import fused_pass

__all__ = ["check_setup", "example_call", "example_heads", "initial_spec", "settled_backbone"]

# Sizes to try for the checks; half of the smaller one leaves a single voxel at the bottom of a network of five
# levels, which instance normalisation refuses.
_CHECK_SIZES = (32, 64)

# They run collective calls around every forward, and students are forwards.
_OUTER = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def check_setup(backbone: Any, modalities: tuple[Any, ...], config: Any) -> None:
    """Check what needs no data.

    Raises:
        ConfigError: listing everything that is wrong.
    """
    problems = []
    if not isinstance(backbone, nn.Module):
        problems.append(f"the backbone must be a torch.nn.Module, got {type(backbone).__name__}")
    elif type(backbone).__name__ in _OUTER:
        problems.append(
            f"the backbone is a {type(backbone).__name__}: give its .module, and put DistributedDataParallel around "
            f"the wrapper (DataParallel is not supported; for shards use fully_shard)"
        )
    if len(modalities) < 2 or not all(isinstance(name, str) and name for name in modalities):
        problems.append(f"modalities must be at least two names, got {modalities!r}")
    elif len(set(modalities)) != len(modalities):
        problems.append(f"modalities must be different names, got {modalities!r}")
    if not isinstance(config, PassionConfig):
        problems.append(f"config must be a PassionConfig, got {type(config).__name__}")
    raise_problems(problems, what="Passion")


def initial_spec(
    backbone: nn.Module, modalities: Sequence[str], spec: BackboneSpec | str | None
) -> BackboneSpec | None:
    """Return the spec that is known before any data was seen: the given one, a preset, or None."""
    if spec is not None and not isinstance(spec, (BackboneSpec, str)):
        raise ConfigError(f"spec must be a BackboneSpec, the name of a preset or None, got {type(spec).__name__}")
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
        spec: what is known; a spec whose ``students`` is not ``"auto"`` is taken at its word, but for the channels.
        config: what students must be able to do.
        forward: what to call to run the backbone, when that is not the backbone itself.

    Raises:
        BackboneError: listing what was not found or does not hold.
        ConfigError: the configuration asks for something that this backbone cannot do.
    """
    examined = spec is None or spec.students == "auto"
    if spec is None or spec.students == "auto":
        if is_sharded(backbone):
            raise BackboneError(
                "a sharded backbone cannot be examined: pass example_input= and example_mask= when you wrap it and "
                "call fully_shard afterwards, or give a spec that says how students are run"
            )
        spec = examine_call(backbone, _smaller(backbone, call), modalities, spec=spec).accepted()
    if config.stack_students and not spec.stackable:
        raise ConfigError(
            "stack_students=True, but the checks did not show that this backbone gives the same numbers for "
            "stacked students; use the loop, or set BackboneSpec(stackable=True) if you know better"
        )
    if config.skip_missing_encoders is True and not spec.skippable:
        raise ConfigError(
            "skip_missing_encoders=True, but the checks did not show that nothing depends on what the encoders of "
            "missing modalities put out (auxiliary outputs? batch normalisation in an encoder? activation "
            "checkpointing round more than the encoder?); use 'auto', or set "
            "BackboneSpec(skippable=True) if you know better"
        )
    bound = BoundBackbone(backbone, spec, modalities, forward)
    if not examined and (problem := _uneven_channels(bound, call)):
        raise BackboneError(f"{type(backbone).__name__} cannot be wrapped as it is: {problem}")
    return bound


def example_call(backbone: nn.Module, example_input: Any, example_mask: Any, spec: BackboneSpec | None) -> BackboneCall:
    """Return the call that an example stands for, with images and mask where the spec says that they belong.

    Raises:
        InputError: an argument between them is missing, or images.
    """
    images, mask = (0, 1) if spec is None else (spec.input_argument, spec.mask_argument)
    return interface.example_call(backbone, example_input, example_mask, images, mask)


def _uneven_channels(bound: BoundBackbone, call: BackboneCall) -> str:
    """Look for the one thing that is wrong with the images whatever a spec says: not as many channels of each modality.

    Empty where that cannot be found out: a spec that is taken at its word is for backbones that cannot be examined.
    """
    backbone, spec, modalities = bound.backbone, bound.spec, bound.modalities
    if spec.absent is not None or channel_share(bound.input_of(call), modalities) < 2:
        return ""
    if is_sharded(backbone) or lazy_parameters(backbone):
        return ""
    interface = Interface(**{field.name: getattr(spec, field.name) for field in fields(Interface)})
    try:
        with sandbox(backbone):
            return uneven_channels(Probe(backbone, _smaller(backbone, call), modalities, interface))
    except Exception:  # What is wrong with this call, the pass that follows will say.
        return ""


def _smaller(backbone: nn.Module, call: BackboneCall) -> BackboneCall:
    """Return the call with its images cropped, if the backbone takes that: the checks need some forty passes."""
    leaves = [leaf for leaf in tree_flatten((call.args, dict(call.kwargs)))[0] if isinstance(leaf, Tensor)]
    spatial = max((tuple(leaf.shape[2:]) for leaf in leaves if leaf.ndim > 3), key=len, default=())

    def crop(leaf: Any, size: int) -> Any:
        if not isinstance(leaf, Tensor) or tuple(leaf.shape[2:]) != spatial:
            return leaf
        for axis in range(2, leaf.ndim):
            leaf = leaf.narrow(axis, 0, min(size, leaf.shape[axis]))
        return leaf

    for size in _CHECK_SIZES:
        if not spatial or max(spatial) <= size:
            break
        args, kwargs = tree_map(partial(crop, size=size), (call.args, dict(call.kwargs)))
        try:
            with sandbox(backbone):
                backbone(*args, **kwargs)
        except Exception:  # whatever a backbone raises for a size it was not made for
            continue
        return BackboneCall(args, kwargs)
    return call


@torch.no_grad()
def example_heads(bound: BoundBackbone, call: BackboneCall) -> nn.ModuleList:
    """Build the heads that fit what the encoders put out for an example."""
    backbone = bound.backbone
    if lazy_parameters(backbone):
        with untouched_modes(backbone):
            bound.run(call)
    everything = torch.ones(bound.batch_of(call), len(bound.modalities), dtype=torch.bool)
    with torch.random.fork_rng(), resting_buffers(backbone), resting_attributes(backbone):
        fused = fused_pass(bound, call, everything)
        features = {modality: fused.record.features(modality) for modality in bound.modalities}
        # Autocast keeps weights that it has cast, and PyTorch 2.5 those that were cast without gradient too.
        torch.clear_autocast_cache()
        dtypes = [p.dtype for p in backbone.parameters() if p.is_floating_point()]
        return build_heads(features, fused.prediction, dtypes[0] if dtypes else torch.get_default_dtype())

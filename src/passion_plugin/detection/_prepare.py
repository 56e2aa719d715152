"""What the engine needs of a backbone when it is wrapped, and at the first batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from passion_plugin._validate import as_tuple, modality_problems
from passion_plugin.backbone import (
    BackboneAdapter,
    BackboneCall,
    BackboneSpec,
    ModuleState,
    build_heads,
    channel_share,
    find_preset,
    fused_pass,
    is_sharded,
    preset,
)
from passion_plugin.config import PassionConfig
from passion_plugin.detection._convention import CallConvention
from passion_plugin.detection._encoders import uneven_channels
from passion_plugin.detection._inspect import inspect_call
from passion_plugin.detection._probe import BackboneRunError, Probe, backbone_errors
from passion_plugin.detection._sandbox import lazy_parameters, preserved_modes, sandbox
from passion_plugin.errors import BackboneError, ConfigError, PassionError, raise_problems

# Sizes to try for the checks; half of the smaller one leaves a single voxel at the bottom of a network of five
# levels, which instance normalisation refuses.
_CHECK_SIZES = (32, 64)

# They run collective calls around every forward, and students are forwards.
_OUTER = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def check_setup(backbone: Any, modalities: Any, config: Any) -> tuple[str, ...]:
    """Check what needs no data; return the names of the modalities.

    Raises:
        ConfigError: listing everything that is wrong.
    """
    names = as_tuple(modalities) or ()
    problems = modality_problems(names or modalities, least=2)
    if not isinstance(backbone, nn.Module):
        problems.append(f"the backbone must be a torch.nn.Module, got {type(backbone).__name__}")
    elif type(backbone).__name__ in _OUTER:
        problems.append(
            f"the backbone is a {type(backbone).__name__}: give its .module, and put DistributedDataParallel around "
            f"the wrapper (DataParallel is not supported; for shards use fully_shard)"
        )
    if not isinstance(config, PassionConfig):
        problems.append(f"config must be a PassionConfig, got {type(config).__name__}")
    raise_problems(problems, what="PassionEngine")
    return names


def initial_spec(
    backbone: nn.Module, modalities: Sequence[str], spec: BackboneSpec | str | None
) -> BackboneSpec | None:
    """Return the spec that is known before any data was seen: the given one, a preset, or None."""
    if spec is not None and not isinstance(spec, (BackboneSpec, str)):
        raise ConfigError(f"spec must be a BackboneSpec, the name of a preset or None, got {type(spec).__name__}")
    if isinstance(spec, str):
        return preset(spec, backbone, modalities)
    return find_preset(backbone, modalities) if spec is None else spec


def prepare_backbone(
    backbone: nn.Module,
    call: BackboneCall,
    modalities: Sequence[str],
    spec: BackboneSpec | None,
    config: PassionConfig,
    forward: Callable[..., Any] | None = None,
) -> BackboneAdapter:
    """Detect what is not known and check what was not checked, with the arguments of a real call.

    A spec whose ``students`` is not ``"auto"`` is taken at its word, but for the channels. To run the backbone,
    ``forward`` is called, when that is not the backbone itself.

    Raises:
        BackboneError: listing what was not found or does not hold.
        ConfigError: the configuration asks for something that this backbone cannot do.
    """
    trusted = spec is not None and spec.students != "auto"
    if spec is None or not trusted:
        if is_sharded(backbone):
            raise BackboneError(
                "a sharded backbone cannot be examined: pass example_input= and example_mask= when you wrap it and "
                "call fully_shard afterwards, or give a spec that says how students are run"
            )
        spec = inspect_call(backbone, _smaller(backbone, call), modalities, spec=spec).accepted()
    if config.skip_missing_encoders is True and not spec.can_skip_encoders:
        raise ConfigError(
            "skip_missing_encoders=True, but the checks did not show that nothing depends on what the encoders of "
            "missing modalities output (auxiliary outputs? batch normalisation in an encoder? activation "
            "checkpointing round more than the encoder?); use 'auto', or set "
            "BackboneSpec(can_skip_encoders=True) if you know better"
        )
    adapter = BackboneAdapter(backbone, spec, modalities, forward)
    if trusted and (problem := _uneven_channels(adapter, call)):
        raise BackboneError(f"{type(backbone).__name__} cannot be wrapped as it is: {problem}")
    return adapter


def _uneven_channels(adapter: BackboneAdapter, call: BackboneCall) -> str:
    """Look for the one thing that is wrong with the images whatever a spec says: not as many channels of each modality.

    Empty where that cannot be found out: a spec that is taken at its word is for backbones that cannot be examined.
    """
    backbone, spec, modalities = adapter.backbone, adapter.spec, adapter.modalities
    if spec.fill_missing is not None or channel_share(adapter.input_of(call), modalities) < 2:
        return ""
    if is_sharded(backbone) or lazy_parameters(backbone):
        return ""
    try:
        with sandbox(backbone):
            return uneven_channels(Probe(backbone, _smaller(backbone, call), modalities, CallConvention.of(vars(spec))))
    except PassionError:  # What is wrong with this call, the pass that follows will say.
        return ""


def _smaller(backbone: nn.Module, call: BackboneCall) -> BackboneCall:
    """Return the call with its images cropped, if the backbone takes that: the checks need some forty passes."""
    leaves = [leaf for leaf in tree_leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Tensor)]
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
            with sandbox(backbone), backbone_errors():
                backbone(*args, **kwargs)
        except BackboneRunError:  # A backbone may refuse a size that it was not made for.
            continue
        return BackboneCall(args, kwargs)
    return call


@torch.no_grad()
def example_heads(adapter: BackboneAdapter, call: BackboneCall) -> nn.ModuleList:
    """Build the heads that fit the encoder outputs of an example."""
    backbone = adapter.backbone
    if lazy_parameters(backbone):
        with preserved_modes(backbone):
            adapter.run(call)
    everything = torch.ones(adapter.batch_of(call), len(adapter.modalities), dtype=torch.bool)
    with torch.random.fork_rng(), ModuleState(backbone).preserved():
        fused = fused_pass(adapter, call, everything)
        features = {modality: fused.features.features(modality) for modality in adapter.modalities}
        # Autocast keeps weights that it has cast, and PyTorch 2.5 those that were cast without gradient too.
        torch.clear_autocast_cache()
        dtypes = [p.dtype for p in backbone.parameters() if p.is_floating_point()]
        return build_heads(features, fused.prediction, dtypes[0] if dtypes else torch.get_default_dtype())

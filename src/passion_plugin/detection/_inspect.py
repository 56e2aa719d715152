"""Find out how a backbone can be wrapped: presets, detection, checks."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from passion_plugin._validate import as_tuple, modality_problems
from passion_plugin.backbone import (
    BackboneAdapter,
    BackboneCall,
    BackboneSpec,
    MaskCodec,
    ModuleState,
    batch_size,
    build_heads,
    channel_share,
    find_preset,
    fused_pass,
    is_sharded,
    locate_argument,
    preset,
)
from passion_plugin.config import PassionConfig
from passion_plugin.detection._encoders import uneven_channels
from passion_plugin.detection._inspector import Inspector
from passion_plugin.detection._probe import CallConvention, Probe
from passion_plugin.detection._report import BackboneReport, module_summary
from passion_plugin.detection._sandbox import lazy_parameters, preserved_modes, sandbox
from passion_plugin.errors import BackboneError, ConfigError, InputError, PassionError, raise_problems, suggest

__all__ = [
    "check_setup",
    "detect_spec",
    "example_call",
    "example_heads",
    "infer_call_convention",
    "infer_modalities",
    "initial_spec",
    "inspect_backbone",
    "inspect_call",
    "inspect_example",
    "prepare_backbone",
]


def example_call(
    backbone: nn.Module,
    example_input: Any,
    example_mask: Any,
    input_argument: int | str | Sequence[int | str] = 0,
    mask_argument: int | str | None = 1,
) -> BackboneCall:
    """Return the call that passes an example input and mask where they belong.

    Raises:
        InputError: an argument between the given ones is missing.
    """
    several = not isinstance(input_argument, (int, str))
    keys = list(input_argument) if several else [input_argument]  # type: ignore[arg-type]
    values = list(example_input) if several else [example_input]
    if len(keys) != len(values):
        raise InputError(f"input_argument names {len(keys)} arguments, example_input has {len(values)} entries")
    if mask_argument is not None and example_mask is not None:
        keys.append(mask_argument)
        values.append(example_mask)
    positional = {key: value for key, value in zip(keys, values, strict=True) if isinstance(key, int)}
    named = {key: value for key, value in zip(keys, values, strict=True) if isinstance(key, str)}
    args: list[Any] = []
    while len(args) in positional:
        args.append(positional.pop(len(args)))
    for position, value in positional.items():
        name = locate_argument(backbone, position).name
        if name is None:
            raise InputError(
                f"nothing was given for argument {len(args)} of the backbone, only for argument {position}: "
                f"pass forward_fn= (a function of backbone, images and bool mask) that fills in the rest"
            )
        named[name] = value
    return BackboneCall(tuple(args), named)


def infer_modalities(images: Any, mask: Any) -> tuple[str, ...]:
    """Return names for the modalities of an example: the keys of a mapping, otherwise ``("0", "1", …)``.

    Raises:
        InputError: their number cannot be read off the example.
    """
    if isinstance(images, Mapping):
        return tuple(str(key) for key, value in images.items() if isinstance(value, Tensor))
    if isinstance(mask, Tensor) and mask.ndim == 2:
        count = mask.shape[1]
    elif isinstance(images, (list, tuple)):
        count = len(images)
    elif isinstance(images, Tensor) and images.ndim >= 3:
        count = images.shape[1]
    else:
        raise InputError(
            f"cannot tell how many modalities an input of type {type(images).__name__} has: pass modalities="
        )
    return tuple(map(str, range(count)))


def infer_call_convention(
    backbone: nn.Module, call: BackboneCall, modalities: Sequence[str], known: Mapping[str, Any]
) -> tuple[CallConvention, list[str]]:
    """Return how the backbone is called, and what is unclear about it.

    Args:
        backbone: the module.
        call: a call of it.
        modalities: names.
        known: fields of the spec that need not be inferred.
    """
    names = {field.name for field in fields(CallConvention)}
    given = {name: value for name, value in known.items() if name in names}
    images = given.get("input_argument", 0)
    problems: list[str] = []
    if "mask_argument" not in given:
        given["mask_argument"] = _mask_argument(backbone, call, images, modalities)
    key = given["mask_argument"]
    raw = None if key is None else call.get(locate_argument(backbone, key))
    if raw is not None and "mask_format" not in given:
        given["mask_format"], problem = _mask_format(raw, len(modalities))
        problems += [problem] if problem else []
    return CallConvention(**given), problems


def _mask_argument(
    backbone: nn.Module,
    call: BackboneCall,
    images: int | str | Sequence[int | str],
    modalities: Sequence[str],
) -> int | str | None:
    """Return where the mask is: the first bool tensor (B, M), else the second argument, if there is one."""
    used = [images] if isinstance(images, (int, str)) else list(images)
    taken = {locate_argument(backbone, key) for key in used}
    batch = batch_size(call.get(locate_argument(backbone, used[0])), modalities)
    everything: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    free = [(key, value) for key, value in everything if locate_argument(backbone, key) not in taken]
    for key, value in free:
        if isinstance(value, Tensor) and value.dtype == torch.bool and value.shape == (batch, len(modalities)):
            return key
    second = locate_argument(backbone, 1)
    return 1 if second not in taken and call.get(second) is not None else None


def _mask_format(raw: Any, count: int) -> tuple[str | MaskCodec, str]:
    if isinstance(raw, Tensor) and raw.ndim == 2 and raw.shape[1] == count:
        if raw.dtype == torch.bool:
            return "bool", ""
        if bool(((raw == 0) | (raw == 1)).all()):
            return ("float" if raw.is_floating_point() else "int"), ""
        return "bool", "the example mask must hold only 0 and 1"
    if isinstance(raw, (list, tuple)) and all(type(entry) is int and 0 <= entry < count for entry in raw):
        return "indices", ""
    shape = f" of shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else ""
    images = isinstance(raw, Tensor) and raw.ndim > 2
    return "bool", (
        f"the example mask is a {type(raw).__name__}{shape}, expected a tensor (batch, {count}) or a list of "
        f"column numbers. If the backbone takes something else, pass mask_format=MaskCodec(encode, decode); "
        f"if this is not the mask, mask_argument= (None when there is none)"
        + (f"; if every modality is an argument, input_argument={tuple(range(count))} too" if images else "")
    )


def inspect_example(
    backbone: nn.Module,
    example_input: Any,
    example_mask: Any = None,
    *,
    modalities: Sequence[str] | None = None,
    **known: Any,
) -> BackboneReport:
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
    report = BackboneReport(type(backbone).__name__)
    through_call = known.get("forward_fn") is not None
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
    return _inspect(report, backbone, call, known, searching=True, through_call=through_call)


def inspect_call(
    backbone: nn.Module,
    call: BackboneCall,
    modalities: Sequence[str],
    *,
    spec: BackboneSpec | None = None,
    known: Mapping[str, Any] | None = None,
) -> BackboneReport:
    """Find out how a backbone can be wrapped, with the arguments of a real call.

    Args:
        backbone: any module.
        call: arguments of a forward; presence of modalities in it does not matter.
        modalities: names, in the order of the mask columns.
        spec: what is known; then nothing is searched for, and only what it says is checked.
        known: without a spec: its fields that are not to be detected.
    """
    _check_known(known or {})
    report = BackboneReport(type(backbone).__name__, tuple(modalities))
    if spec is not None:
        known = {field.name: getattr(spec, field.name) for field in fields(BackboneSpec)}
    return _inspect(report, backbone, call, dict(known or {}), searching=spec is None)


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
    report = inspect_example(backbone, example_input, example_mask, modalities=modalities, **known)
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
    return inspect_example(backbone, example_input, example_mask, modalities=modalities, **known).accepted()


def _check_known(known: Mapping[str, Any]) -> None:
    names = {field.name for field in fields(BackboneSpec)}
    for name in known:
        if name not in names:
            raise ConfigError(f"BackboneSpec has no field {name!r}.{suggest(name, names)}")


def _inspect(
    report: BackboneReport,
    backbone: nn.Module,
    call: BackboneCall,
    known: dict[str, Any],
    *,
    searching: bool,
    through_call: bool = False,
) -> BackboneReport:
    if len(report.modalities) < 2:
        report.problem(f"there must be at least two modalities, got {report.modalities}: pass modalities=")
        return report
    report.module_summary = module_summary(backbone)
    hint = ""
    try:
        convention, unclear = infer_call_convention(backbone, call, report.modalities, known)
        for text in unclear:
            report.problem(text)
        if unclear:
            return report
        called = (
            CallConvention(fill_missing=convention.fill_missing, forward_fn=convention.forward_fn)
            if through_call
            else convention
        )
        classifier = known.get("classifier")
        probe = Probe(backbone, call, report.modalities, called, through_call=through_call, classifier=classifier)
        hint = probe.vector_hint()
        report.lazy = tuple(lazy_parameters(backbone))
        if report.lazy:
            with preserved_modes(backbone), torch.no_grad():
                known["forward_fn"](backbone, *call.args) if through_call else backbone(*call.args, **call.kwargs)
        with sandbox(backbone):
            Inspector(report, probe, convention, known, searching=searching).run()
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
        spec = inspect_call(backbone, _smaller(backbone, call), modalities, spec=spec).accepted()
    if config.skip_missing_encoders is True and not spec.can_skip_encoders:
        raise ConfigError(
            "skip_missing_encoders=True, but the checks did not show that nothing depends on what the encoders of "
            "missing modalities put out (auxiliary outputs? batch normalisation in an encoder? activation "
            "checkpointing round more than the encoder?); use 'auto', or set "
            "BackboneSpec(can_skip_encoders=True) if you know better"
        )
    adapter = BackboneAdapter(backbone, spec, modalities, forward)
    if not examined and (problem := _uneven_channels(adapter, call)):
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
    convention = CallConvention(**{field.name: getattr(spec, field.name) for field in fields(CallConvention)})
    try:
        with sandbox(backbone):
            return uneven_channels(Probe(backbone, _smaller(backbone, call), modalities, convention))
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
def example_heads(adapter: BackboneAdapter, call: BackboneCall) -> nn.ModuleList:
    """Build the heads that fit what the encoders put out for an example."""
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

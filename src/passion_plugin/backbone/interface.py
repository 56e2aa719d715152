"""From what a user gave to a call: where images and mask sit, what the mask looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from passion_plugin.backbone.calls import BackboneCall, locate_argument
from passion_plugin.backbone.inputs import batch_size
from passion_plugin.backbone.masks import MaskCodec
from passion_plugin.backbone.probe import Interface
from passion_plugin.errors import InputError

__all__ = ["example_call", "infer_interface", "infer_modalities"]


def example_call(
    backbone: nn.Module,
    example_input: Any,
    example_mask: Any,
    input_argument: int | str | Sequence[int | str],
    mask_argument: int | str | None,
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
                f"pass call= (a function of backbone, images and bool mask) that fills in the rest"
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


def infer_interface(
    backbone: nn.Module, call: BackboneCall, modalities: Sequence[str], known: Mapping[str, Any]
) -> tuple[Interface, list[str]]:
    """Return how the backbone is called, and what is unclear about it.

    Args:
        backbone: the module.
        call: a call of it.
        modalities: names.
        known: fields of the spec that need not be inferred.
    """
    names = {field.name for field in fields(Interface)}
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
    return Interface(**given), problems


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

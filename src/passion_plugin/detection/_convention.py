"""How a backbone is called: where images and mask are among the arguments, and what the mask looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from passion_plugin._validate import as_tuple
from passion_plugin.backbone import BackboneCall, MaskCodec, batch_size, locate_argument
from passion_plugin.errors import BackboneError, InputError


@dataclass(frozen=True)
class CallConvention:
    """The part of a spec that says how the backbone is called: needed before there is a spec."""

    input_argument: int | str | Sequence[int | str] = 0
    mask_argument: int | str | None = 1
    mask_format: str | MaskCodec = "bool"
    mask_meaning: str = "present"
    mask_columns: Sequence[str] | None = None
    fill_missing: Callable[[Any, Tensor], Any] | None = None
    forward_fn: Callable[[nn.Module, Any, Tensor], Any] | None = None

    def __str__(self) -> str:
        images = f"images: argument {self.input_argument!r}"
        if self.mask_argument is None:
            return f"{images}; no mask"
        kind = "given codec" if isinstance(self.mask_format, MaskCodec) else self.mask_format
        return f"{images}; mask: argument {self.mask_argument!r}, {kind}, 1 = {self.mask_meaning}"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> CallConvention:
        """Take those fields that there are from fields of a spec."""
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


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
    several = as_tuple(input_argument)
    keys = [input_argument] if several is None else [*several]
    values = [example_input] if several is None else [*example_input]
    if len(keys) != len(values):
        raise InputError(f"input_argument names {len(keys)} arguments, example_input has {len(values)} entries")
    if mask_argument is not None and example_mask is not None:
        keys.append(mask_argument)
        values.append(example_mask)
    given = dict(zip(keys, values, strict=True))
    args: list[Any] = []
    while len(args) in given:
        args.append(given.pop(len(args)))
    kwargs: dict[str, Any] = {}
    for key, value in given.items():
        name = locate_argument(backbone, key).name if isinstance(key, int) else key
        if name is None:
            raise InputError(
                f"nothing was given for argument {len(args)} of the backbone, only for argument {key}: "
                f"pass forward_fn= (a function of backbone, images and bool mask) that fills in the rest"
            )
        kwargs[str(name)] = value
    return BackboneCall(tuple(args), kwargs)


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
) -> CallConvention:
    """Return how the backbone is called: ``known`` fields of the spec, the rest inferred from a call of it.

    Raises:
        BackboneError: the mask is of no known format.
    """
    given = dict(known)
    if "mask_argument" not in given:
        given["mask_argument"] = _mask_argument(backbone, call, given.get("input_argument", 0), modalities)
    key = given["mask_argument"]
    raw = None if key is None else call.get(locate_argument(backbone, key))
    if raw is not None and "mask_format" not in given:
        given["mask_format"] = _mask_format(raw, len(modalities))
    return CallConvention.of(given)


def _mask_argument(
    backbone: nn.Module, call: BackboneCall, images: int | str | Sequence[int | str], modalities: Sequence[str]
) -> int | str | None:
    """Return where the mask is: the first bool tensor (B, M), else the second argument, if there is one."""
    used = as_tuple(images) or (images,)
    taken = {locate_argument(backbone, key) for key in used}
    batch = batch_size(call.get(locate_argument(backbone, used[0])), modalities)
    everything: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    for key, value in everything:
        is_mask = isinstance(value, Tensor) and value.dtype == torch.bool and value.shape == (batch, len(modalities))
        if is_mask and locate_argument(backbone, key) not in taken:
            return key
    second = locate_argument(backbone, 1)
    return 1 if second not in taken and call.get(second) is not None else None


def _mask_format(raw: Any, count: int) -> str:
    if isinstance(raw, Tensor) and raw.ndim == 2 and raw.shape[1] == count:
        if raw.dtype == torch.bool:
            return "bool"
        if not bool(((raw == 0) | (raw == 1)).all()):
            raise BackboneError("the example mask must hold only 0 and 1")
        return "float" if raw.is_floating_point() else "int"
    if isinstance(raw, (list, tuple)) and all(type(entry) is int and 0 <= entry < count for entry in raw):
        return "indices"
    shape = f" of shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else ""
    several = f"; if every modality is an argument, input_argument={tuple(range(count))} too"
    raise BackboneError(
        f"the example mask is a {type(raw).__name__}{shape}, expected a tensor (batch, {count}) or a list of "
        f"column numbers. If the backbone takes something else, pass mask_format=MaskCodec(encode, decode); "
        f"if this is not the mask, mask_argument= (None when there is none)"
        f"{several if isinstance(raw, Tensor) and raw.ndim > 2 else ''}"
    )

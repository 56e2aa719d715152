"""Translate between our mask and the one that a backbone takes."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from passion_plugin._validate import unreadable
from passion_plugin.errors import InputError

MASK_FORMATS = ("bool", "float", "int", "indices")


@dataclass(frozen=True)
class MaskCodec:
    """A translation between our mask and the one a backbone takes.

    Attributes:
        encode: ``(mask) -> raw``, from a bool mask (B, M), True = present, to what the backbone takes.
        decode: ``(raw) -> mask``, the way back: bool (B, M), or (M,) for a mask that holds for the whole batch.

    Example: a bit code for the whole batch, bit ``m`` set when modality ``m`` is present.

        >>> codec = MaskCodec(
        ...     encode=lambda mask: sum(1 << m for m, here in enumerate(mask[0].tolist()) if here),
        ...     decode=lambda code: torch.tensor([bool(code >> m & 1) for m in range(4)]),
        ... )
        >>> codec.encode(torch.tensor([[True, False, True, False]]))
        5
    """

    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Tensor]


def codec_for(mask_format: str, meaning: str, columns: Sequence[str] | None, modalities: Sequence[str]) -> MaskCodec:
    """Return the codec of a built-in format; arguments as the fields of :class:`BackboneSpec`."""
    order = [modalities.index(name) for name in columns] if columns else list(range(len(modalities)))
    codec = _BuiltIn(mask_format, meaning == "missing", order)
    if mask_format == "indices":
        return MaskCodec(codec.encode_indices, codec.decode_indices)
    return MaskCodec(codec.encode_tensor, codec.decode_tensor)


def encoded_like(given: Any, codec: MaskCodec, mask: Tensor) -> Any:
    """Return what a backbone takes for ``mask``, in the number format of the mask that its user gave.

    The features of a network in bfloat16 become float32 under a float32 mask, which its next layer refuses.

    Example:
        >>> codec = codec_for("float", "present", None, ("t1", "t2"))
        >>> encoded_like(torch.ones(1, 2).half(), codec, torch.tensor([[True, False]]))
        tensor([[1., 0.]], dtype=torch.float16)
    """
    raw = codec.encode(mask)
    if not isinstance(raw, Tensor) or not isinstance(given, Tensor):
        return raw
    same_kind = raw.is_floating_point() == given.is_floating_point() and torch.bool not in (raw.dtype, given.dtype)
    return raw.to(given.dtype) if same_kind else raw


def check_mask(mask: Any, batch: int, modalities: Sequence[str], *, what: str) -> Tensor:
    """Return a bool mask (B, M), or (M,) for the whole batch, as (B, M) on the CPU; raise if anything is wrong."""
    count = len(modalities)
    if not isinstance(mask, Tensor):
        raise InputError(f"{what} must be a torch.bool tensor (batch, {count}), got {type(mask).__name__}")
    if reason := unreadable(mask):
        raise InputError(f"{what} {reason}")
    if mask.dtype != torch.bool:
        raise InputError(
            f"{what} must have dtype torch.bool, got {mask.dtype}: an integer mask indexes instead of masking "
            f"and silently hides nothing in many backbones. Pass mask.bool()"
        )
    if mask.ndim == 1:
        mask = mask.expand(batch, -1)
    if mask.shape != (batch, count):
        raise InputError(
            f"{what} must have shape ({batch}, {count}), one column for each of {tuple(modalities)}, "
            f"got {tuple(mask.shape)}"
        )
    if batch == 0:
        raise InputError(f"{what} is for an empty batch; skip batches without samples")
    mask = mask.detach().cpu()
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(f"{what}: every modality is missing in sample(s) {empty}. Leave such samples out")
    return mask


@dataclass(frozen=True)
class _BuiltIn:
    mask_format: str
    inverted: bool
    order: list[int]

    def encode_tensor(self, mask: Tensor) -> Tensor:
        dtype = {"bool": torch.bool, "float": torch.get_default_dtype(), "int": torch.int64}[self.mask_format]
        return (mask[:, self.order] ^ self.inverted).to(dtype)

    def decode_tensor(self, raw: Any) -> Tensor:
        if not isinstance(raw, Tensor):
            raise InputError(f"the mask must be a tensor of format {self.mask_format!r}, got {type(raw).__name__}")
        if reason := unreadable(raw):
            raise InputError(f"the mask {reason}")
        found = "bool" if raw.dtype == torch.bool else "float" if raw.is_floating_point() else "int"
        if found != self.mask_format or raw.is_complex():
            raise InputError(
                f"the mask must be a {self.mask_format} tensor for this backbone, got dtype {raw.dtype}: with "
                f"another dtype many backbones silently mask nothing. Convert it, or set BackboneSpec.mask_format"
            )
        if found != "bool" and not bool(((raw == 0) | (raw == 1)).all()):
            raise InputError("the mask must hold only 0 and 1")
        if raw.ndim != 2 or raw.shape[1] != len(self.order):
            raise InputError(f"the mask must have shape (batch, {len(self.order)}), got {tuple(raw.shape)}")
        return (raw.bool() ^ self.inverted)[:, self._inverse()]

    def encode_indices(self, mask: Tensor) -> list[int]:
        if not bool((mask == mask[0]).all()):
            raise InputError("a list of indices holds for the whole batch, but the samples have different masks")
        return (mask[0, self.order] ^ self.inverted).nonzero().flatten().tolist()

    def decode_indices(self, raw: Any) -> Tensor:
        if isinstance(raw, Tensor):
            if reason := unreadable(raw):
                raise InputError(f"the mask {reason}")
            raw = raw.tolist()
        count = len(self.order)
        # A bool is an int: [True, False] would be columns 1 and 0.
        whole = isinstance(raw, Sequence) and all(type(index) is int and 0 <= index < count for index in raw)
        if not whole or len(set(raw)) != len(raw):
            raise InputError(
                f"the mask must be a list of modality indices for the whole batch, each of 0..{count - 1} at most "
                f"once, got {reprlib.repr(raw)}"
            )
        listed = torch.tensor([column in raw for column in range(count)])
        return (listed ^ self.inverted)[self._inverse()]

    def _inverse(self) -> list[int]:
        return [self.order.index(m) for m in range(len(self.order))]

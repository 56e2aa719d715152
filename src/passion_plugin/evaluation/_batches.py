"""What a loader may yield, read into one form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from passion_plugin.data import blank_missing, shortlist
from passion_plugin.errors import InputError

__all__ = ["Batch", "read_batch"]


@dataclass(frozen=True)
class Batch:
    """One batch of a loader.

    Attributes:
        x: tensor (B, M, *spatial), or a mapping, list or tuple of tensors with B rows.
        label: (B, ...).
        presence: bool (B, M), which modalities each sample really has.
        ids: one name per sample.
        spacing: voxel size in mm per sample and axis, or None when it is unknown.
    """

    x: Any
    label: Tensor
    presence: Tensor
    ids: tuple[str, ...]
    spacing: tuple[tuple[float, ...], ...] | None

    def inputs(self, rows: Tensor, subset: Tensor, modalities: Sequence[str]) -> Any:
        """Rows of ``x`` in which every modality outside ``subset`` is zero, whatever was there.

        Args:
            rows: int (b,), the rows to take.
            subset: bool (M,), True = kept.
            modalities: names in mask order.

        Returns:
            ``x`` in its own structure. A mapping from modality names is blanked like a tensor, all tensors in an
            entry; other containers are handed on as they are, and the mask alone says what is absent.
        """
        # Taking rows copies, so a model that works in place cannot spoil the next subset.
        taken = _map_tensors(self.x, lambda tensor: tensor[rows])
        if isinstance(taken, Tensor):
            return blank_missing(taken, subset.expand(len(rows), -1))
        if isinstance(taken, Mapping):
            absent = {name for name, keep in zip(modalities, subset.tolist(), strict=True) if not keep}
            return {
                name: _map_tensors(part, torch.zeros_like) if name in absent else part for name, part in taken.items()
            }
        return taken


def read_batch(
    item: Any,
    modalities: Sequence[str],
    *,
    first: int,
    device: torch.device | str | None = None,
    spacing: Sequence[float] | None = None,
) -> Batch:
    """Read one item of a loader.

    Args:
        item: a mapping with ``"image"`` and ``"label"``, and optionally ``"mask"``, ``"id"`` and
            ``"spacing"``; or a tuple ``(x, label)`` or ``(x, mask, label)``.
        modalities: names in mask order.
        first: number of the first sample, which names samples that bring no id.
        device: where to move the tensors; None leaves them.
        spacing: voxel size in mm for all samples; goes before the batch's own.

    Returns:
        The batch.

    Raises:
        InputError: something is missing or does not fit.
    """
    fields = _fields(item)
    x = _map_tensors(fields["image"], lambda tensor: tensor.to(device))
    label = _as_tensor(fields["label"], "label", device)
    size = len(label) if label.ndim else 0
    if isinstance(x, Tensor) and (x.ndim < 3 or x.shape[0] != size or x.shape[1] != len(modalities)):
        raise InputError(
            f"image has shape {tuple(x.shape)}, label {tuple(label.shape)}; image must be (B, M, *spatial) "
            f"with the label's B and a channel for each of {', '.join(modalities)}."
        )
    if isinstance(x, Mapping):
        lacking = [name for name in modalities if name not in x]
        if 0 < len(lacking) < len(modalities):
            raise InputError(
                f"image has entries {shortlist(list(x))} and none for {shortlist(lacking)}; name an entry like each "
                "modality, so that what a subset lacks can be blanked, or none of them"
            )
    mask = fields.get("mask")
    presence = torch.ones(size, len(modalities)) if mask is None else _as_tensor(mask, "mask")
    if presence.shape != (size, len(modalities)) or not bool(((presence == 0) | (presence == 1)).all()):
        raise InputError(
            f"mask is {presence.dtype} of shape {tuple(presence.shape)}; it must be (B, M) = "
            f"({size}, {len(modalities)}), True where the sample has the modality."
        )
    ids = fields.get("id")
    ids = range(first, first + size) if ids is None else [ids] if isinstance(ids, str) else list(ids)
    if len(ids) != size:
        raise InputError(f"the batch has {size} samples and {len(ids)} ids; give one per sample.")
    names = tuple(str(name.item() if isinstance(name, Tensor) else name) for name in ids)
    if odd := [name for name in names if not name.isprintable()]:
        raise InputError(f"ids {shortlist(odd)} cannot be printed, nor read back from a table; rename them.")
    return Batch(
        x=x,
        label=label,
        presence=presence.bool().to(label.device),
        ids=names,
        spacing=_spacings(spacing if spacing is not None else fields.get("spacing"), size),
    )


def _fields(item: Any) -> Mapping[str, Any]:
    if isinstance(item, Mapping) and {"image", "label"} <= set(item):
        return item
    if isinstance(item, (tuple, list)) and len(item) in (2, 3):
        names = ("image", "label") if len(item) == 2 else ("image", "mask", "label")
        return dict(zip(names, item, strict=True))
    if isinstance(item, Mapping):
        found = f"a mapping with keys {sorted(map(str, item))}"
    else:
        found = f"a {type(item).__name__}" + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
    raise InputError(
        f"the loader yields {found}; it must yield a mapping with 'image' and 'label' (and 'mask', 'id', "
        "'spacing'), (x, label) or (x, mask, label). Pass batch=function to turn yours into one of these."
    )


def _spacings(spacing: Any, size: int) -> tuple[tuple[float, ...], ...] | None:
    if spacing is None:
        return None
    if isinstance(spacing, (list, tuple)) and any(isinstance(part, Tensor) and part.ndim == 1 for part in spacing):
        # Of a tuple of numbers in each item the default collate function makes a tensor (B,) for each axis.
        by_axis = all(len(part) == size for part in spacing)
        spacing = torch.stack([torch.as_tensor(part) for part in spacing], dim=1 if by_axis else 0)
    values = torch.as_tensor(spacing, dtype=torch.float64)
    if values.ndim == 1:
        values = values.expand(size, -1)
    if values.ndim != 2 or len(values) != size:
        raise InputError(f"spacing has shape {tuple(values.shape)}; give (axes,) for all samples or (B, axes), in mm.")
    return tuple(tuple(row) for row in values.tolist())


def _as_tensor(value: Any, name: str, device: torch.device | str | None = None) -> Tensor:
    try:
        return torch.as_tensor(value).to(device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is a {type(value).__name__} that is no tensor: {error}") from error


def _map_tensors(structure: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor in nested mappings, lists and tuples."""
    if isinstance(structure, Tensor):
        return function(structure)
    if isinstance(structure, Mapping):
        return {key: _map_tensors(value, function) for key, value in structure.items()}
    if isinstance(structure, (list, tuple)):
        parts = [_map_tensors(value, function) for value in structure]
        return parts if isinstance(structure, list) else tuple(parts)
    return structure

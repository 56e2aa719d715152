"""A data set that really lacks what it is said to lack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from passion_plugin._validate import describe, is_one_of
from passion_plugin.data._presence import PresenceTable
from passion_plugin.errors import ConfigError, InputError, raise_problems, suggest

__all__ = ["IncompleteDataset", "blank_missing"]

Fill = Literal["zeros", "nan"]

Visible = Tensor | NDArray[np.bool_]

_BITS_OF_UNSIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def blank_missing(images: Tensor, presence: Tensor, *, fill: Fill = "zeros") -> Tensor:
    """Return images in which absent modalities hold nothing of their content, whatever it was (NaN included).

    Args:
        images: (B, M, *spatial); channel k is modality k. Not modified.
        presence: (B, M) bool, True = present.
        fill: ``"zeros"``, or ``"nan"`` for debugging: whatever then looks at an absent modality becomes NaN.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        InputError: shapes that do not fit, ``presence`` not bool, or NaN asked for in integer images.
        ConfigError: unknown ``fill``.

    Example:
        >>> blank_missing(torch.ones(1, 2, 3), torch.tensor([[True, False]]))
        tensor([[[1., 1., 1.],
                 [0., 0., 0.]]])
    """
    _check_fill(fill)
    problems = [
        f"{name} is {describe(value)}; pass a tensor"
        for name, value in (("images", images), ("presence", presence))
        if not isinstance(value, Tensor)
    ]
    raise_problems(problems, what="blank_missing", error=InputError)
    if presence.dtype != torch.bool or presence.ndim != 2:
        problems.append(f"presence is {describe(presence)}; pass torch.bool of shape (B, M)")
    elif images.ndim < 3 or images.shape[:2] != presence.shape:
        problems.append(
            f"images have shape {tuple(images.shape)}, presence {tuple(presence.shape)}; need (B, M, "
            "*spatial) with the same B and M, one channel for each modality"
        )
    if fill == "nan" and not images.is_floating_point():
        problems.append(f"fill='nan' needs floating-point images, these are {images.dtype}; convert them first")
    raise_problems(problems, what="blank_missing", error=InputError)
    absent = ~presence.to(images.device)
    value = math.nan if fill == "nan" else 0
    absent = absent.reshape(*absent.shape, *[1] * (images.ndim - 2))
    if images.dtype in _BITS_OF_UNSIGNED:  # which PyTorch can store, and not fill
        return images.view(_BITS_OF_UNSIGNED[images.dtype]).masked_fill(absent, value).view(images.dtype)
    return images.masked_fill(absent, value)


class IncompleteDataset(Dataset[Any]):
    """Wrap a map-style data set: absent modalities are blanked and the presence mask is added to each item.

    Items may be

    * a dict with the image under ``image_key``: a copy comes back, with the mask under ``mask_key``;
    * a tuple or list that starts with the image: ``(image, mask, *rest)`` comes back, the order in which a
      training loop unpacks it: ``for x, mask, target in loader``;
    * the image itself: ``(image, mask)`` comes back.

    The image is (M, *spatial), a tensor or a numpy array, and stays what it is; the mask is a (M,) bool
    tensor. The wrapped data set's own tensors are never written to.

    An item may also be asked for as ``(index, visible)``, as :class:`~passion_plugin.missing.EvenSubsets` does; then
    only the modalities of ``visible``, (M,) bool, are left of what the sample has. Row ``index`` of the table must then
    belong to item ``index``.

    Anything computed from the complete image *inside* the wrapped data set (a crop around a brain mask of all
    modalities, a joint normalisation) has seen what is missing: keep such steps out, or after this wrapper.

    Args:
        dataset: has ``__len__`` and ``__getitem__``.
        table: presence of its samples.
        fill: ``"zeros"``, or ``"nan"`` for debugging, see :func:`blank_missing`.
        image_key: key of the image, for items that are dicts.
        mask_key: key the mask is put under.
        id_key: key of the sample id in items that are dicts. With it rows of the table are found by id and
            may be in any order; without it row i belongs to item i.

    Raises:
        ConfigError: not a map-style data set, a table of another length, or an unknown ``fill``.

    Example:
        >>> table = PresenceTable.from_array([[1, 0], [1, 1]], ("flair", "t1ce"))
        >>> data = IncompleteDataset([(torch.ones(2, 4), 0), (torch.ones(2, 4), 1)], table)
        >>> image, mask, label = data[0]
        >>> image.sum(1).tolist(), mask.tolist(), label
        ([4.0, 0.0], [True, False], 0)
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sequence[Any],
        table: PresenceTable,
        *,
        fill: Fill = "zeros",
        image_key: str = "image",
        mask_key: str = "mask",
        id_key: str | None = None,
    ) -> None:
        _check_fill(fill)
        if not isinstance(table, PresenceTable):
            raise ConfigError(f"IncompleteDataset: table is {describe(table)}; pass a PresenceTable")
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise ConfigError(
                f"IncompleteDataset: {type(dataset).__name__} has no items by number; pass a map-style data "
                "set, or call blank_missing on the batches of a stream"
            )
        try:
            length = len(dataset)  # type: ignore[arg-type]
        except TypeError:
            raise ConfigError(f"IncompleteDataset: {type(dataset).__name__} has no length") from None
        if id_key is None and length != len(table):
            raise ConfigError(
                f"IncompleteDataset: {length} items but {len(table)} rows in the table; select the rows with "
                "table.select(ids), or pass id_key to find them by id"
            )
        self.dataset = dataset
        self.table = table
        self.fill = fill
        self.image_key = image_key
        self.mask_key = mask_key
        self.id_key = id_key

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int | tuple[int, Visible]) -> Any:
        """Return item ``index``, blanked, with its mask; of an ``(index, visible)`` only what is visible.

        Raises:
            InputError: the item has no image of M channels, no id, or a mask already; ``visible`` shows what the
                sample lacks, or nothing, or was drawn for another sample.
        """
        index, visible = index if isinstance(index, tuple) else (index, None)
        item = self.dataset[index]
        if isinstance(item, Mapping):
            return self._from_mapping(index, item, visible)
        if isinstance(item, (tuple, list)):
            if not item:
                raise InputError(f"IncompleteDataset: item {index} is empty; need an image first")
            image, mask = self._blank(index, item[0], self._row(index, None, visible))
            return (image, mask, *item[1:])
        return self._blank(index, item, self._row(index, None, visible))

    def _from_mapping(self, index: int, item: Mapping[str, Any], visible: Visible | None) -> dict[str, Any]:
        problems = [
            f"no key {key!r}.{suggest(key, map(str, item))}"
            for key in (self.image_key, self.id_key)
            if key is not None and key not in item
        ]
        if self.mask_key in item:
            problems.append(f"the key {self.mask_key!r} is taken; pass another mask_key")
        raise_problems(problems, what=f"IncompleteDataset: item {index}", error=InputError)
        image, mask = self._blank(index, item[self.image_key], self._row(index, item, visible))
        return {**item, self.image_key: image, self.mask_key: mask}

    def _row(self, index: int, item: Mapping[str, Any] | None, visible: Visible | None) -> Tensor:
        if self.id_key is not None and item is None:
            raise InputError(
                f"IncompleteDataset: id_key={self.id_key!r} needs items that are dicts; pass id_key=None if "
                "row i of the table belongs to item i"
            )
        row = self.table.presence[index] if item is None or self.id_key is None else self.table[item[self.id_key]]
        present = torch.tensor(row)
        if visible is None:
            return present
        drawn = self.table.sample_ids[index]
        if item is not None and self.id_key is not None and item[self.id_key] != drawn:
            raise InputError(
                f"IncompleteDataset: row {index} of the table, which was drawn, is sample {drawn!r}, and item {index} "
                f"is {item[self.id_key]!r}; give both the table.select(ids) with the ids in the order of the items"
            )
        visible = torch.as_tensor(visible)
        if visible.dtype != torch.bool or visible.shape != present.shape:
            raise InputError(
                f"IncompleteDataset: visible is {visible.dtype} of shape {tuple(visible.shape)}; pass torch.bool of "
                f"shape ({len(present)},)"
            )
        if not visible.any() or bool((visible & ~present).any()):
            raise InputError(
                f"IncompleteDataset: visible={visible.tolist()} must show something that sample {index} has and "
                f"nothing that it lacks; it has {present.tolist()}"
            )
        return visible

    def _blank(self, index: int, image: Any, mask: Tensor) -> tuple[Any, Tensor]:
        tensor = _as_tensor(image) if isinstance(image, np.ndarray) else image
        if not isinstance(tensor, Tensor) or tensor.ndim < 2 or tensor.shape[0] != len(mask):
            found = tuple(image.shape) if hasattr(image, "shape") else type(image).__name__
            raise InputError(
                f"IncompleteDataset: the image of item {index} is {found}; need a tensor or array of shape "
                f"({len(mask)}, *spatial), one channel for each of {self.table.modalities}"
            )
        blanked = blank_missing(tensor[None], mask[None], fill=self.fill)[0]
        return (blanked.numpy() if isinstance(image, np.ndarray) else blanked), mask


def _as_tensor(image: NDArray[Any]) -> Tensor:
    """Share memory where torch can, copy where it cannot (read-only, reversed, foreign byte order)."""
    return torch.from_numpy(np.require(image, image.dtype.newbyteorder("="), ["C", "W"]))


def _check_fill(fill: str) -> None:
    if not is_one_of(fill, get_args(Fill)):
        raise ConfigError(f"fill={fill!r} is unknown.{suggest(str(fill), get_args(Fill))}")

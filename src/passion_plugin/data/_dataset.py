"""Data sets that hide what is missing, and a sampler that draws every combination of modalities equally often."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from einops import repeat
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

from passion_plugin._validate import describe, is_int, require_choice
from passion_plugin.data._presence import PresenceTable
from passion_plugin.data._subsets import all_subsets, subset_mask
from passion_plugin.errors import InputError, raise_problems, shortlist, suggest

Fill = Literal["zeros", "nan"]

Visible = Tensor | NDArray[np.bool_]

_BITS_OF_UNSIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def blank_missing(images: Tensor, presence: Tensor, *, fill: Fill = "zeros") -> Tensor:
    """Return images in which absent modalities hold nothing of their content, whatever it was (NaN included).

    Args:
        images: (B, M·C, *spatial); the C channels of a modality follow each other. Not modified.
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
    require_choice("fill", fill, get_args(Fill))
    problems = []
    if not isinstance(images, Tensor):
        problems.append(f"images is {describe(images)}; pass a tensor")
    if not isinstance(presence, Tensor) or presence.dtype != torch.bool or presence.ndim != 2 or not presence.shape[1]:
        problems.append(f"presence is {describe(presence)}; pass torch.bool of shape (B, M)")
    elif not problems and (images.ndim < 3 or len(images) != len(presence) or images.shape[1] % presence.shape[1] != 0):
        problems.append(
            f"images have shape {tuple(images.shape)}, presence {tuple(presence.shape)}; need (B, M·C, *spatial) and "
            "(B, M), C channels for each modality"
        )
    if fill == "nan" and isinstance(images, Tensor) and not images.is_floating_point():
        problems.append(f"fill='nan' needs floating-point images, these are {images.dtype}; convert them first")
    raise_problems(problems, what="blank_missing", error=InputError)
    channels = images.shape[1] // presence.shape[1]
    absent = repeat(~presence.to(images.device), "b m -> b (m c)", c=channels)
    absent = absent.reshape(*absent.shape, *[1] * (images.ndim - 2))
    if images.dtype in _BITS_OF_UNSIGNED:  # which PyTorch can store, and not fill
        return images.view(_BITS_OF_UNSIGNED[images.dtype]).masked_fill(absent, 0).view(images.dtype)
    return images.masked_fill(absent, math.nan if fill == "nan" else 0)


class IncompleteDataset(Dataset[Any]):
    """Wrap a map-style data set: absent modalities are blanked and the presence mask is added to each item.

    Items may be

    * a dict with the image under ``image_key``: a copy comes back, with the mask under ``mask_key``;
    * a tuple or list that starts with the image: ``(image, mask, *rest)`` comes back;
    * the image itself: ``(image, mask)`` comes back.

    The image is (M·C, *spatial), C channels for each modality, a tensor or a numpy array, and stays what it is; the
    mask is a (M,) bool tensor. The wrapped data set's own tensors are never written to. What it computes from the
    complete image (a crop around a brain mask of all modalities, a joint normalisation) has seen what is missing.

    An item may also be asked for as ``(index, visible)``, as :class:`EvenSubsets` does; then only the modalities of
    ``visible``, (M,) bool, are left of what the sample has, and row ``index`` of the table must belong to item
    ``index``.

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
        require_choice("fill", fill, get_args(Fill))
        problems = []
        if not isinstance(table, PresenceTable):
            problems.append(f"table is {describe(table)}; pass a PresenceTable")
        try:
            length = len(dataset)  # type: ignore[arg-type]
        except TypeError:
            length = None
        if length is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            problems.append(
                f"the data set {type(dataset).__name__} has no items by number or no length; pass a map-style data "
                "set, or call blank_missing on the batches of a stream"
            )
        if id_key is None and not problems and length != len(table):
            problems.append(
                f"{length} items but {len(table)} rows in the table; select the rows with table.select(ids), or pass "
                "id_key to find them by id"
            )
        raise_problems(problems, what="IncompleteDataset")
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
            InputError: the item has no image of M·C channels, no id, or a mask already; ``visible`` shows what the
                sample does not have, or nothing, or was drawn for another sample.
        """
        index, visible = index if isinstance(index, tuple) else (index, None)
        item = self.dataset[index]
        if isinstance(item, Mapping):
            problems = [
                f"no key {key!r}.{suggest(key, map(str, item))}"
                for key in (self.image_key, self.id_key)
                if key is not None and key not in item
            ]
            if self.mask_key in item:
                problems.append(f"the key {self.mask_key!r} is taken; pass another mask_key")
            raise_problems(problems, what=f"IncompleteDataset: item {index}", error=InputError)
            mask = self._mask(index, visible, None if self.id_key is None else item[self.id_key])
            return {**item, self.image_key: self._blank(index, item[self.image_key], mask), self.mask_key: mask}
        if self.id_key is not None:
            raise InputError(
                f"IncompleteDataset: id_key={self.id_key!r} needs items that are dicts; pass id_key=None if "
                "row i of the table belongs to item i"
            )
        parts = item if isinstance(item, (tuple, list)) else (item,)
        if not parts:
            raise InputError(f"IncompleteDataset: item {index} is empty; need an image first")
        mask = self._mask(index, visible, None)
        return (self._blank(index, parts[0], mask), mask, *parts[1:])

    def _mask(self, index: int, visible: Visible | None, sample_id: Any) -> Tensor:
        """Return what is left of item ``index``, (M,) bool."""
        present = torch.tensor(self.table.presence[index] if self.id_key is None else self.table[sample_id])
        if visible is None:
            return present
        drawn = self.table.sample_ids[index]
        if self.id_key is not None and sample_id != drawn:
            raise InputError(
                f"IncompleteDataset: row {index} of the table, which was drawn, is sample {drawn!r}, and item {index} "
                f"is {sample_id!r}; give both the table.select(ids) with the ids in the order of the items"
            )
        visible = torch.as_tensor(visible)
        fits = visible.dtype == torch.bool and visible.shape == present.shape
        if not fits or not visible.any() or bool((visible & ~present).any()):
            raise InputError(
                f"IncompleteDataset: visible is {visible.tolist()}; pass bool of shape ({len(present)},) that shows "
                f"something that sample {index} has and nothing that it lacks; it has {present.tolist()}"
            )
        return visible

    def _blank(self, index: int, image: Any, mask: Tensor) -> Any:
        tensor = image
        if isinstance(image, np.ndarray):
            # Shares memory where torch can; a read-only, reversed or foreign-endian array is copied.
            tensor = torch.from_numpy(np.require(image, image.dtype.newbyteorder("="), ["C", "W"]))
        if not isinstance(tensor, Tensor) or tensor.ndim < 2 or len(tensor) % len(mask) != 0:
            raise InputError(
                f"IncompleteDataset: the image of item {index} is {describe(tensor)}; need a tensor or array of shape "
                f"({len(mask)}·C, *spatial), C channels for each of {shortlist(self.table.modalities)}"
            )
        blanked = blank_missing(tensor[None], mask[None], fill=self.fill)[0]
        return blanked.numpy() if isinstance(image, np.ndarray) else blanked


class EvenSubsets(Sampler[tuple[int, NDArray[np.bool_]]]):
    """Draw each subset of the modalities equally often, and for it a sample that contains it.

    On data with missing modalities some combinations are rare and a loader shows them rarely; here all the
    2^M - 1 subsets take turns in random order, each turn with a sample drawn uniformly from those that have at least
    these modalities. This is the idea of HGA, the follow-up of PASSION by the same authors. Pass it as the sampler of a
    loader over an :class:`IncompleteDataset`, which shows of the sample only the subset. Row i of the table belongs to
    item i of the data.

    Args:
        table: who has what.
        seed: of the draws. Every pass over the sampler draws anew; :meth:`set_epoch` says which pass it is. Processes
            that train together need a seed each, or all of them draw the same samples: ``seed + rank``.
        length: draws in one pass; as many as there are samples when None.

    Attributes:
        subsets: the subsets that are drawn.
        left_out: the subsets that no sample contains.

    Raises:
        ConfigError: no table, a negative seed, a length below 1, or more than 16 modalities.

    Example:
        >>> table = PresenceTable.from_array([[1, 0, 1], [1, 1, 0]], ("flair", "t1ce", "t2"))
        >>> sampler = EvenSubsets(table, seed=0, length=5)
        >>> sampler.left_out
        (('t1ce', 't2'), ('flair', 't1ce', 't2'))
        >>> sorted(sum(mask.tolist()) for _, mask in sampler)
        [1, 1, 1, 2, 2]
    """

    def __init__(self, table: PresenceTable, seed: int = 0, *, length: int | None = None) -> None:
        problems = []
        if not isinstance(table, PresenceTable):
            problems.append(f"table must be a PresenceTable, got {describe(table)}")
        if not is_int(seed, least=0):
            problems.append(f"seed must be a whole number, 0 or more, got {seed!r}")
        if length is not None and not is_int(length, least=1):
            problems.append(f"length must be 1 or more, got {length!r}")
        raise_problems(problems, what="EvenSubsets")
        self.seed, self.length, self.epoch = seed, len(table) if length is None else length, 0
        subsets = all_subsets(table.modalities)
        self._masks = {subset: subset_mask(subset, table.modalities).numpy() for subset in subsets}
        self._holders = {s: np.flatnonzero(table.presence[:, self._masks[s]].all(axis=1)) for s in subsets}
        self.subsets = tuple(subset for subset in subsets if len(self._holders[subset]))
        self.left_out = tuple(subset for subset in subsets if not len(self._holders[subset]))

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """Yield ``(index, visible)``: number of a sample and a (M,) bool array, a subset of what the sample has."""
        generator = np.random.default_rng((self.seed, self.epoch))
        self.epoch += 1
        order: list[int] = []
        for _ in range(self.length):
            if not order:
                order = generator.permutation(len(self.subsets)).tolist()
            subset = self.subsets[order.pop()]
            # Not tensors: a loader with workers would share each by a file of its own.
            yield int(generator.choice(self._holders[subset])), self._masks[subset].copy()

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next pass, for a training that is resumed."""
        self.epoch = epoch

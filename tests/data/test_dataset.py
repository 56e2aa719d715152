"""IncompleteDataset and blank_missing: what is missing is gone."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from passion_plugin.data import EvenSubsets, IncompleteDataset, PresenceTable, blank_missing, draw_presence
from passion_plugin.errors import ConfigError, InputError

TABLE = PresenceTable.from_array([[1, 0, 1], [0, 1, 0], [1, 1, 1]], ("a", "b", "c"), ("p", "q", "r"))


class Samples(Dataset[Any]):
    """Three samples of 3 modalities, all ones, in one of several forms."""

    def __init__(self, form: str = "tuple", dtype: torch.dtype = torch.float32) -> None:
        self.form = form
        self.images = torch.ones(3, 3, 2, 2, dtype=dtype)
        self.labels = torch.arange(3)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        image, label = self.images[index], self.labels[index]
        return {
            "tuple": lambda: (image, label, "meta"),
            "list": lambda: [image, label, "meta"],
            "image": lambda: image,
            "dict": lambda: {"image": image, "label": label, "id": "pqr"[index]},
            "numpy": lambda: {"image": image.numpy(), "label": label.numpy()},
            "reversed": lambda: {"image": image.numpy()[:, ::-1].astype(">f4"), "label": label},
        }[self.form]()


@pytest.mark.parametrize("form", ["tuple", "list", "image", "dict", "numpy", "reversed"])
@pytest.mark.parametrize("index", [0, 1, 2, -1])
def test_absent_channels_are_zero_present_ones_untouched_and_the_mask_says_which(form: str, index: int) -> None:
    inner = Samples(form)
    item = IncompleteDataset(inner, TABLE)[index]
    if isinstance(item, dict):
        image, mask = item["image"], item["mask"]
        assert item["label"] == index % 3
        assert isinstance(image, np.ndarray) == (form in ("numpy", "reversed"))
    else:
        image, mask, *rest = item
        assert rest == ([] if form == "image" else [index % 3, "meta"])
    assert torch.as_tensor(image).amax((1, 2)).tolist() == TABLE.presence[index].astype(float).tolist()
    assert torch.as_tensor(image).dtype == torch.float32
    assert mask.dtype == torch.bool
    assert mask.tolist() == TABLE.presence[index].tolist()
    assert (inner.images == 1).all(), "the wrapped data set is never written to"


def test_changing_an_item_does_not_change_data_set_or_table() -> None:
    inner = Samples("dict")
    data = IncompleteDataset(inner, TABLE)
    item = data[2]
    item["image"].fill_(5)
    item["mask"].fill_(False)
    assert (inner.images == 1).all()
    assert data[2]["mask"].all()


def test_content_of_absent_channels_cannot_leak_even_if_it_is_nan() -> None:
    inner = Samples()
    inner.images[1, 0] = math.nan
    image, *_ = IncompleteDataset(inner, TABLE)[1]
    assert image[0].eq(0).all()


def test_nan_mode_marks_exactly_what_is_absent() -> None:
    image, mask, *_ = IncompleteDataset(Samples(), TABLE, fill="nan")[0]
    assert torch.equal(image.isnan().all((1, 2)), ~mask)
    assert torch.equal(image.isnan().any((1, 2)), ~mask)


def test_rows_are_found_by_id_whatever_their_order() -> None:
    shuffled = TABLE.select(["r", "p", "q"])
    by_id = IncompleteDataset(Samples("dict"), shuffled, id_key="id")
    for index, name in enumerate("pqr"):
        assert by_id[index]["mask"].tolist() == TABLE[name].tolist()


def test_what_was_drawn_for_one_sample_is_not_shown_of_another() -> None:
    names = [f"p{i}" for i in range(1, 13)]
    items = [{"image": torch.full((2, 3), float(i)), "id": name} for i, name in enumerate(names)]
    table = draw_presence(sorted(names), {"a": 0.3, "b": 0.3}, seed=0)
    data = IncompleteDataset(items, table, id_key="id")
    with pytest.raises(InputError, match=r"row 1 of the table, which was drawn, is sample 'p10', and item 1 is 'p2'"):
        data[1, table.presence[1]]
    matched = IncompleteDataset(items, table.select(names), id_key="id")
    for index, visible in EvenSubsets(matched.table, length=40):
        item = matched[index, visible]
        assert item["id"] == names[index]
        assert (item["image"][:, 0] == index * torch.tensor(visible)).all()


def test_other_keys_can_be_chosen() -> None:
    data = [{"volume": torch.ones(3, 2), "mask": "a segmentation"}] * 3
    item = IncompleteDataset(data, TABLE, image_key="volume", mask_key="presence")[0]
    assert item["mask"] == "a segmentation"
    assert item["presence"].tolist() == [True, False, True]


def test_loader_with_a_worker_gives_the_same_batches() -> None:
    data = pickle.loads(pickle.dumps(IncompleteDataset(Samples("dict"), TABLE)))
    (batch,) = DataLoader(data, batch_size=3)
    assert torch.equal(batch["mask"], torch.tensor(TABLE.presence))
    assert torch.equal(batch["image"].amax((2, 3)), batch["mask"].float())
    (other,) = DataLoader(data, batch_size=3, num_workers=1)
    assert torch.equal(other["image"], batch["image"])
    assert torch.equal(other["mask"], batch["mask"])


# --- bad input


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("data", "options", "match"),
    [
        ([1, 2], {}, "2 items but 3 rows"),
        (Stream(), {}, "Stream has no items by number"),
        (Samples(), {"fill": "zero"}, "Did you mean 'zeros'"),
    ],
)
def test_wrong_arguments_are_refused(data: Any, options: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        IncompleteDataset(data, TABLE, **options)


@pytest.mark.parametrize(
    ("item", "options", "match"),
    [
        ({"img": torch.ones(3, 2)}, {}, r"item 0: no key 'image'.*'img'"),
        ({"image": torch.ones(3, 2), "mask": 0}, {}, "'mask' is taken"),
        ({"image": torch.ones(2, 2)}, {}, r"\(2, 2\); need .* \(3·C, \*spatial\)"),
        ({"image": [1, 2, 3]}, {}, "is a list"),
        ((), {}, "empty"),
        ((torch.ones(3, 2, dtype=torch.int16), 0), {"fill": "nan"}, "floating-point"),
        ((torch.ones(3, 2), 0), {"id_key": "id"}, "id_key='id' needs items that are dicts"),
        ({"image": torch.ones(3, 2)}, {"id_key": "id"}, "no key 'id'"),
    ],
)
def test_items_that_cannot_be_blanked_are_refused(item: Any, options: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        IncompleteDataset([item] * 3, TABLE, **options)[0]


def test_id_that_is_not_in_the_table_is_named() -> None:
    data = [{"image": torch.ones(3, 2), "id": "s"}] * 3
    with pytest.raises(ConfigError, match="no sample 's'"):
        IncompleteDataset(data, TABLE, id_key="id")[0]


# --- batches


@pytest.mark.parametrize("spatial", [(5,), (4, 3), (2, 3, 4)])
def test_blank_missing_works_on_batches_of_any_dimension(spatial: tuple[int, ...]) -> None:
    images = torch.full((2, 3, *spatial), math.inf)
    presence = torch.tensor([[True, False, True], [False, True, False]])
    blanked = blank_missing(images, presence)
    assert torch.equal(blanked.flatten(2).amax(2), torch.where(presence, math.inf, 0.0))
    assert images.isinf().all()


def test_a_modality_may_have_several_channels() -> None:
    images = torch.ones(2, 6, 4)
    presence = torch.tensor([[True, False, True], [False, True, False]])
    assert torch.equal(blank_missing(images, presence)[:, :, 0].bool(), presence.repeat_interleave(2, dim=1))
    item, mask = IncompleteDataset(list(images), TABLE.select(["p", "r"]))[0]
    assert mask.tolist() == [True, False, True]
    assert item[:, 0].tolist() == [1, 1, 0, 0, 1, 1]
    array, _ = IncompleteDataset([image.numpy() for image in images], TABLE.select(["p", "r"]), fill="nan")[0]
    assert np.isnan(array[:, 0]).tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16])
def test_blank_missing_works_on_integers(dtype: torch.dtype) -> None:
    highest = torch.iinfo(dtype).max
    images = torch.tensor([[[1, highest], [2, highest]]], dtype=torch.int64 if highest < 1 << 63 else dtype).to(dtype)
    found = blank_missing(images, torch.tensor([[True, False]]))
    assert found.dtype == dtype
    assert found.tolist() == [[[1, highest], [0, 0]]]


def test_blank_missing_lets_no_gradient_into_absent_channels() -> None:
    images = torch.ones(1, 2, 3, requires_grad=True)
    blank_missing(images, torch.tensor([[True, False]])).sum().backward()
    assert images.grad is not None
    assert images.grad[0].tolist() == [[1.0] * 3, [0.0] * 3]


@pytest.mark.parametrize(
    ("images", "presence", "match"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 3), "float32"),
        (torch.ones(2, 3, 4), torch.ones(3, 2, dtype=torch.bool), r"\(2, 3, 4\), presence \(3, 2\)"),
        (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), "spatial"),
        (torch.ones(2, 4, 4), torch.ones(2, 3, dtype=torch.bool), "C channels for each modality"),
    ],
)
def test_blank_missing_refuses_what_does_not_fit(images: torch.Tensor, presence: torch.Tensor, match: str) -> None:
    with pytest.raises(InputError, match=match):
        blank_missing(images, presence)

"""Even drawing of combinations: every subset as often as any other, from samples that contain it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from passion_plugin.data import EvenSubsets, IncompleteDataset, PresenceTable
from passion_plugin.errors import ConfigError, InputError

M = ("flair", "t1ce", "t2")
# flair is everywhere, t2 rare; nobody has all three.
TABLE = PresenceTable.from_array([[1, 1, 0]] * 8 + [[1, 0, 1]] + [[1, 0, 0]] * 3, M)


def draws(sampler: EvenSubsets) -> list[tuple[int, tuple[bool, ...]]]:
    return [(index, tuple(mask.tolist())) for index, mask in sampler]


def test_subsets_are_drawn_equally_often_and_those_that_nobody_has_are_reported() -> None:
    sampler = EvenSubsets(TABLE, seed=3, length=50)
    assert sampler.left_out == (("t1ce", "t2"), M)
    assert sampler.subsets == (("flair",), ("t1ce",), ("t2",), ("flair", "t1ce"), ("flair", "t2"))
    counts = Counter(mask for _, mask in draws(sampler))
    assert set(counts.values()) == {10}
    assert len(counts) == 5


def test_any_part_of_a_pass_is_even_up_to_one() -> None:
    counts = Counter(mask for _, mask in draws(EvenSubsets(TABLE, seed=0, length=13)))
    assert sorted(counts.values()) == [2, 2, 3, 3, 3]


def test_samples_contain_what_is_shown_of_them_and_are_drawn_uniformly() -> None:
    found = draws(EvenSubsets(TABLE, seed=1, length=6000))
    for index, mask in found:
        assert all(has or not shown for has, shown in zip(TABLE.presence[index], mask, strict=True))
    flair_alone = Counter(index for index, mask in found if mask == (True, False, False))
    assert set(flair_alone) == set(range(12))
    assert max(flair_alone.values()) < 150
    assert min(flair_alone.values()) > 50
    assert {index for index, mask in found if mask[2]} == {8}


def test_passes_differ_and_are_reproduced_by_seed_and_epoch() -> None:
    sampler = EvenSubsets(TABLE, seed=5)
    first, second = draws(sampler), draws(sampler)
    assert len(first) == len(sampler) == len(TABLE)
    assert first != second
    resumed = EvenSubsets(TABLE, seed=5)
    resumed.set_epoch(1)
    assert draws(resumed) == second
    assert draws(EvenSubsets(TABLE, seed=6)) != first


def test_a_loader_shows_only_the_subset() -> None:
    images = [torch.full((3, 2, 2), 1.0 + number) for number in range(len(TABLE))]
    loader = DataLoader(IncompleteDataset(images, TABLE), batch_size=5, sampler=EvenSubsets(TABLE, length=10))
    found = [torch.cat(part) for part in zip(*loader, strict=True)]
    index, visible = zip(*EvenSubsets(TABLE, length=10), strict=True)
    wanted = torch.tensor(np.stack(visible))
    assert torch.equal(found[1], wanted)
    assert torch.equal(found[0][:, :, 0, 0], wanted * (1.0 + torch.tensor(index)[:, None]))
    assert not wanted.all()


def test_what_is_drawn_costs_a_loader_with_workers_no_file_each() -> None:
    assert not any(isinstance(part, torch.Tensor) for drawn in EvenSubsets(TABLE) for part in drawn)


@pytest.mark.parametrize(
    ("visible", "message"),
    [
        (torch.tensor([True, False, True]), "nothing that it lacks"),
        (torch.tensor([False, False, False]), "shows something"),
        (torch.tensor([1, 0, 0]), "pass bool of shape"),
        (torch.tensor([True]), r"shape \(3,\)"),
    ],
)
def test_a_dataset_refuses_to_show_what_a_sample_lacks(visible: torch.Tensor, message: str) -> None:
    data = IncompleteDataset([torch.ones(3, 2, 2) for _ in TABLE], TABLE)
    with pytest.raises(InputError, match=message):
        data[0, visible]


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="length must be 1 or more, got 0"):
        EvenSubsets(TABLE, length=0)

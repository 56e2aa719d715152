"""Subsets: order, names, masks, random drop."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import MeanNet
from passion_plugin._validate import modality_problems
from passion_plugin.data import PresenceTable, all_subsets, drop_modalities, parse_subset, subset_mask, subset_name
from passion_plugin.errors import ConfigError, InputError
from passion_plugin.evaluation import evaluate_subsets
from passion_plugin.training import ModalityFrequencies, PreferenceEstimator
from passion_plugin.wrapper import PassionWrapper

NAMES = ("flair", "t1ce", "t1", "t2")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_subsets_come_by_size_then_in_the_order_of_the_modalities() -> None:
    assert [subset_name(subset) for subset in all_subsets(("b", "a", "c"))] == [
        *("b", "a", "c"),
        *("b+a", "b+c", "a+c"),
        "b+a+c",
    ]


@given(st.integers(1, 7))
def test_all_subsets_are_all_distinct_and_not_empty(size: int) -> None:
    subsets = all_subsets([f"m{index}" for index in range(size)])
    assert len({frozenset(subset) for subset in subsets}) == len(subsets) == 2**size - 1
    assert all(subsets)


def test_name_and_mask_of_every_subset_lead_back_to_it() -> None:
    for subset in all_subsets(NAMES):
        assert parse_subset(subset_name(subset), NAMES) == subset
        mask = subset_mask(subset, NAMES)
        assert mask.dtype == torch.bool
        assert tuple(itertools.compress(NAMES, mask.tolist())) == subset
        assert torch.equal(mask, subset_mask(subset_name(reversed(subset)), NAMES))


def test_t1_is_not_t1ce() -> None:
    assert subset_mask("t1", NAMES).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("subset", "match"),
    [
        ("t1c", "unknown modality 't1c'.*Did you mean 't1ce'"),
        (("flair", "T2"), "unknown modality 'T2'"),
        ("flair+flair", "more than once"),
        ("", "unknown modality ''"),
        ((), "empty"),
        ("flair+", "unknown modality ''"),
    ],
)
def test_wrong_subsets_are_refused(subset: str | tuple[str, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        subset_mask(subset, NAMES)


@pytest.mark.parametrize(
    "names", [(), ("a", "a"), ("a", " b"), ("a", 3), "flair", ("a", ""), ("a", "b\n"), ("a,b", "c")]
)
def test_bad_names_of_modalities_are_refused(names: tuple) -> None:
    with pytest.raises(ConfigError, match=r"all_subsets: .*modalit"):
        all_subsets(names)


# --- names that hold a "+"


def test_a_name_may_hold_a_plus() -> None:
    names = ("T1", "T1+C", "T2", "C+D")
    assert parse_subset("T1+C+T2", names) == ("T1+C", "T2")
    assert parse_subset("T2 + T1", names) == ("T1", "T2")
    assert parse_subset("T1+C+D", names) == ("T1", "C+D"), "the longest name first would leave D"
    assert parse_subset("T1+T1+C", names) == ("T1", "T1+C")
    assert subset_mask("T1+C", names).tolist() == [False, True, False, False]
    with pytest.raises(ConfigError, match="unknown modality 'T3'"):
        parse_subset("T1+T3", names)


@pytest.mark.parametrize(
    "names", [("T1", "C", "T1+C"), ("A+B", "C", "A", "B+C"), ("A", "A+B", "B+C", "C+D", "D"), ("T1+C", "T1 + C")]
)
def test_names_that_can_be_joined_in_several_ways_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="joined by '\\+' to one name in several ways"):
        parse_subset(names[0], names)


DOORS = {
    "table": lambda names: PresenceTable.from_array([[1] * len(names)], names),
    "frequencies": lambda names: ModalityFrequencies.of(names, missing_rates=[0.5] * len(names)),
    "preference": lambda names: PreferenceEstimator(names),
    "wrapper": lambda names: PassionWrapper(MeanNet(NAMES), names, missing_rates=[0.5] * len(names)),
    "evaluation": lambda names: evaluate_subsets(
        lambda x, mask: x[:, :2], [(torch.ones(1, len(names), 2), torch.ones(1, 2))], modalities=names
    ),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("T1", "T1+C", "T2 (FS)", "TE=80", "#4"), None),
        (("T1", "T1\n"), "a name must be printable"),
        (("T1", " T2"), "without spaces at its ends"),
        (("T1", "T2,3"), "without ','"),
        (("T1", ""), "not empty"),
        (("T1", "T1"), "named more than once"),
        (("T1", "C", "T1+C"), "to one name in several ways"),
    ],
)
def test_every_door_takes_the_same_names(door: str, names: tuple[str, ...], message: str | None) -> None:
    if message is None:
        DOORS[door](names)
    else:
        with pytest.raises(ConfigError, match=message):
            DOORS[door](names)


PLUS_NAMES = st.lists(st.text("AB+ ", min_size=1, max_size=5), min_size=1, max_size=5, unique=True)


@given(names=PLUS_NAMES, data=st.data())
def test_what_is_accepted_makes_the_round_trip_and_what_is_refused_is_ambiguous(
    names: list[str], data: st.DataObject
) -> None:
    if any(name != name.strip() for name in names):
        return
    if not modality_problems(names):
        members = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        assert parse_subset(subset_name(members), names) == tuple(name for name in names if name in members)
        return
    joined: dict[str, tuple[str, ...]] = {}
    for length in range(1, 7):
        for sequence in itertools.product(names, repeat=length):
            text = "+".join(piece.strip() for name in sequence for piece in name.split("+"))
            if joined.setdefault(text, sequence) != sequence:
                return
    raise AssertionError(f"{names} are refused without need")


def test_more_subsets_than_anybody_can_read_are_refused() -> None:
    with pytest.raises(ConfigError, match="17 modalities have 131071 subsets"):
        all_subsets([f"m{index}" for index in range(17)])


# --- drop


@given(
    codes=st.lists(st.integers(1, 63), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
    how=st.sampled_from(["subsets", "sizes"]),
)
def test_drop_keeps_a_non_empty_subset_of_what_is_there(codes: list[int], seed: int, how: str) -> None:
    presence = torch.tensor([[bool(code >> bit & 1) for bit in range(6)] for code in codes])
    original = presence.clone()
    kept = drop_modalities(presence, generator=generator(seed), uniform_over=how)
    assert kept.dtype == torch.bool
    assert kept.shape == presence.shape
    assert not (kept & ~presence).any()
    assert kept.any(1).all()
    assert torch.equal(presence, original)
    assert torch.equal(kept, drop_modalities(presence, generator=generator(seed), uniform_over=how))


@pytest.mark.parametrize("available", [[True] * 4, [True, False, True, True], [False, True, False, True]])
def test_drop_is_uniform_over_the_subsets_of_what_is_available(available: list[bool]) -> None:
    count = 30_000
    presence = torch.tensor(available).expand(count, 4)
    codes = drop_modalities(presence, generator=generator()).long() @ torch.tensor([1, 2, 4, 8])
    frequency = torch.bincount(codes, minlength=16)
    subsets = 2 ** sum(available) - 1
    seen = frequency[frequency > 0].double()
    assert len(seen) == subsets
    expected = count / subsets
    chi_square = ((seen - expected).square() / expected).sum().item()
    assert chi_square < 40, "14 degrees of freedom at most: P < 0.0003"


def test_drop_over_sizes_draws_every_number_and_every_modality_equally_often() -> None:
    presence = torch.tensor([[True, True, False, True]]).expand(6000, 4)
    kept = drop_modalities(presence, generator=generator(), uniform_over="sizes")
    sizes = torch.bincount(kept.sum(1), minlength=4)[1:].double() / 6000
    torch.testing.assert_close(sizes, torch.full((3,), 1 / 3, dtype=torch.float64), atol=0.025, rtol=0)
    singles = kept[kept.sum(1) == 1].double().mean(0)
    torch.testing.assert_close(singles, torch.tensor([1 / 3, 1 / 3, 0, 1 / 3], dtype=torch.float64), atol=0.045, rtol=0)


def test_rows_are_dropped_independently() -> None:
    kept = drop_modalities(torch.ones(30_000, 3, dtype=torch.bool), generator=generator(1))
    same = (kept[::2] == kept[1::2]).all(1).double().mean().item()
    assert same == pytest.approx(1 / 7, abs=0.012)


def test_drop_without_generator_follows_the_global_seed() -> None:
    presence = torch.ones(20, 4, dtype=torch.bool)
    torch.manual_seed(5)
    first = drop_modalities(presence)
    second = drop_modalities(presence)
    torch.manual_seed(5)
    assert torch.equal(drop_modalities(presence), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("presence", "match"),
    [
        (torch.ones(2, 3), r"float32 tensor of shape \(2, 3\)"),
        (torch.ones(3, dtype=torch.bool), r"\(B, M\)"),
        (torch.tensor([[True, False], [False, False]]), r"rows \[1\]"),
    ],
)
def test_drop_refuses_what_is_no_presence(presence: torch.Tensor, match: str) -> None:
    with pytest.raises(InputError, match=match):
        drop_modalities(presence)


@pytest.mark.parametrize("size", [62, 63, 64, 100])
def test_drop_works_for_any_number_of_modalities(size: int) -> None:
    presence = torch.ones(4000, size, dtype=torch.bool)
    presence[2000:, 2:] = False
    kept = drop_modalities(presence, generator=generator())
    assert not (kept & ~presence).any()
    assert kept.any(1).all()
    assert (kept[:2000].double().mean(0) - 1 / 2).abs().max() < 0.05
    assert (kept[2000:, :2].double().mean(0) - 2 / 3).abs().max() < 0.05


def test_drop_refuses_unknown_rule() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'sizes'"):
        drop_modalities(torch.ones(1, 2, dtype=torch.bool), uniform_over="size")  # type: ignore[arg-type]

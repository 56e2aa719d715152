"""Dice and HD95 against hand-computed cases; scores and labels to masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passion_plugin.errors import ConfigError, InputError, PassionWarning
from passion_plugin.evaluation import BRATS_REGIONS, dice_scores, hd95_scores, region_masks
from passion_plugin.evaluation._metrics import Scorer


def masks(*rows: list[int]) -> torch.Tensor:
    """One sample, one target per row: bool (1, T, voxels)."""
    return torch.tensor([rows], dtype=torch.bool)


def test_dice_of_hand_counted_masks() -> None:
    prediction = masks([1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0])
    truth = masks([0, 1, 1, 1, 1], [0, 1, 0, 0, 0], [1, 1, 0, 0, 0])
    expected = torch.tensor([[2 * 2 / (3 + 4), 0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(dice_scores(prediction, truth), expected, rtol=0, atol=0)


def test_dice_where_one_mask_is_empty_is_zero_under_either_convention() -> None:
    prediction, truth = masks([0, 0], [1, 0]), masks([0, 1], [0, 0])
    for empty in ("skip", "one"):
        assert dice_scores(prediction, truth, empty=empty).tolist() == [[0.0, 0.0]]


def test_dice_where_both_masks_are_empty_follows_the_convention() -> None:
    nothing = masks([0, 0, 0])
    assert dice_scores(nothing, nothing, empty="one").item() == 1.0
    assert math.isnan(dice_scores(nothing, nothing, empty="skip").item())


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_dice_is_symmetric_bounded_and_one_only_for_equal_masks(voxels: list[tuple[bool, bool]]) -> None:
    a, b = (torch.tensor(list(column)).view(1, 1, -1) for column in zip(*voxels, strict=True))
    score = dice_scores(a, b, empty="one").item()
    assert 0.0 <= score <= 1.0
    assert score == dice_scores(b, a, empty="one").item()
    assert (score == 1.0) == torch.equal(a, b)


def test_metrics_refuse_other_shapes_and_dtypes() -> None:
    with pytest.raises(InputError, match=r"\(1, 1, 2\) and \(1, 2, 2\)"):
        dice_scores(masks([1, 0]), masks([1, 0], [1, 0]))
    with pytest.raises(InputError, match=r"must be torch\.bool"):
        dice_scores(masks([1, 0]).float(), masks([1, 0]))


def test_brats_regions_nest() -> None:
    whole, core, enhancing = region_masks(torch.tensor([[0, 1, 2, 3]]), BRATS_REGIONS)[0]
    assert whole.tolist() == [False, True, True, True]
    assert core.tolist() == [False, True, False, True]
    assert enhancing.tolist() == [False, False, False, True]


def single_voxels(axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two volumes with one voxel each, three voxels apart along an axis."""
    prediction = torch.zeros(1, 1, 8, 8, 8, dtype=torch.bool)
    truth = prediction.clone()
    there = [2, 2, 2]
    prediction[0, 0, 2, 2, 2] = True
    there[axis] += 3
    truth[(0, 0, *there)] = True
    return prediction, truth


@pytest.mark.parametrize(("axis", "distance"), [(0, 15.0), (1, 6.0), (2, 1.5)])
def test_hd95_of_single_voxels_is_their_distance_in_mm(axis: int, distance: float) -> None:
    pytest.importorskip("monai")
    prediction, truth = single_voxels(axis)
    assert hd95_scores(prediction, truth, spacing=(5.0, 2.0, 0.5)).item() == pytest.approx(distance)
    assert hd95_scores(prediction, truth).item() == pytest.approx(3.0)


def test_hd95_of_empty_masks_follows_the_stated_policy() -> None:
    pytest.importorskip("monai")
    full, nothing = torch.ones(1, 1, 4, 4, dtype=torch.bool), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    assert hd95_scores(nothing, nothing).item() == 0.0
    assert math.isnan(hd95_scores(nothing, nothing, empty="skip").item())
    for pair in ((full, nothing), (nothing, full)):
        assert hd95_scores(*pair).item() == 373.13
        assert hd95_scores(*pair, penalty=1.0).item() == 1.0
    assert hd95_scores(full, full).item() == 0.0


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 0.0), (1.0, math.nan)])
def test_hd95_refuses_a_spacing_that_does_not_fit(spacing: tuple[float, ...]) -> None:
    full = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(InputError, match="per axis"):
        hd95_scores(full, full, spacing=spacing)


def scores_of(labels: torch.Tensor, channels: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, channels).movedim(-1, 1).float() * 8 - 4


LABELS = torch.tensor([[[0, 1], [2, 3]]])  # (B, *spatial) = (1, 2, 2)


@pytest.mark.parametrize(
    "label",
    [LABELS, LABELS[:, None], LABELS.float(), scores_of(LABELS, 4) > 0, (scores_of(LABELS, 4) > 0).float()],
    ids=["integers", "one channel", "whole floats", "one-hot bool", "one-hot float"],
)
def test_every_accepted_form_of_labels_gives_the_same_masks(label: torch.Tensor) -> None:
    for regions, expected in ((None, ((1,), (2,), (3,))), (BRATS_REGIONS, BRATS_REGIONS.values())):
        targets = Scorer(regions=regions)
        scores = scores_of(LABELS, 4)
        wanted = torch.stack([sum(k == LABELS for k in members) > 0 for members in expected], dim=1)
        assert torch.equal(targets.true(label, 4, scores.shape[2:]), wanted)
        assert torch.equal(targets.predicted(scores), wanted)


def test_classes_are_named_without_the_background() -> None:
    assert Scorer().names(3) == ("class 1", "class 2")
    assert Scorer(outputs="sigmoid").names(3) == ("class 0", "class 1", "class 2")
    assert Scorer(regions=BRATS_REGIONS).names(4) == ("WT", "TC", "ET")


def test_sigmoid_channels_are_thresholded_one_by_one() -> None:
    logits = torch.tensor([[[-1.0, 1.0], [3.0, 0.1]]])  # probabilities .27 .73 / .95 .52
    assert Scorer(outputs="sigmoid").predicted(logits).tolist() == [[[False, True], [True, True]]]
    strict = Scorer(outputs="sigmoid", threshold=0.9)
    assert strict.predicted(logits).tolist() == [[[False, False], [True, False]]]
    done = Scorer(outputs="sigmoid", apply_sigmoid=False)
    assert torch.equal(done.predicted(logits.sigmoid()), Scorer(outputs="sigmoid").predicted(logits))


def test_sigmoid_targets_take_region_masks_or_labels() -> None:
    targets = Scorer(regions=BRATS_REGIONS, outputs="sigmoid")
    regions = region_masks(LABELS, BRATS_REGIONS)
    assert torch.equal(targets.true(LABELS, 3, LABELS.shape[1:]), regions)
    assert torch.equal(targets.true(regions.float(), 3, LABELS.shape[1:]), regions)


def test_probabilities_where_logits_are_expected_warn_and_the_reverse_raises() -> None:
    with pytest.warns(PassionWarning, match="apply_sigmoid=False"):
        Scorer(outputs="sigmoid").predicted(torch.tensor([[[0.1, 0.9]]]))
    with pytest.raises(InputError, match="span -2 to 3"):
        Scorer(outputs="sigmoid", apply_sigmoid=False).predicted(torch.tensor([[[-2.0, 3.0]]]))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (torch.zeros(1, 3, 2, dtype=torch.long), r"label has shape \(1, 3, 2\)"),
        (LABELS + 1, "labels run from 1 to 4, but the scores have classes 0..3"),
        (LABELS - 1, "labels run from -1"),
        (LABELS + 0.5, "fractions"),
        (LABELS * torch.nan, "fractions or NaN"),
        (torch.full((1, 4, 2, 2), 2), "only zeros and ones"),
        (torch.zeros(1, 4, 2, 2), "not one-hot"),
    ],
)
def test_labels_that_do_not_fit_raise(label: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scorer().true(label, 4, torch.Size((2, 2)))


def test_sigmoid_without_regions_needs_masks() -> None:
    with pytest.raises(InputError, match=r"must be \(B, 4, 2, 2\)"):
        Scorer(outputs="sigmoid").true(LABELS, 4, torch.Size((2, 2)))


def test_scores_that_do_not_fit_raise() -> None:
    with pytest.raises(InputError, match="3 score channels, num_classes is 4"):
        Scorer(num_classes=4).predicted(torch.zeros(1, 3, 2, 2))
    with pytest.raises(InputError, match="region 'WT' uses label 3, but there are 3 classes"):
        Scorer(regions=BRATS_REGIONS).predicted(torch.zeros(1, 3, 2, 2))
    with pytest.raises(InputError, match="4 sigmoid channels for 3 regions"):
        Scorer(regions=BRATS_REGIONS, outputs="sigmoid").predicted(torch.zeros(1, 4, 2, 2))
    with pytest.raises(InputError, match="one softmax channel"):
        Scorer().predicted(torch.zeros(1, 1, 2, 2))


def test_wrong_arguments_are_reported_together() -> None:
    with pytest.raises(ConfigError, match="4 problems") as caught:
        Scorer(regions={"WT": (1, 2), "TC": (), "ET": 3}, outputs="relu", threshold=1.5)  # type: ignore[dict-item,arg-type]
    for word in ("'relu'", "1.5", "'TC'", "'ET'"):
        assert word in str(caught.value)

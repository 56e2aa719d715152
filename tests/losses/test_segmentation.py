"""Weighted cross-entropy and Dice: what they mean, in both modes and for both kinds of outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passion_plugin.losses import dice_loss, weighted_cross_entropy
from passion_plugin.testing import (
    assert_batch_independent,
    assert_class_permutation_invariant,
    assert_computed_in_float32,
    assert_independent_of_layout,
    assert_matches_reference,
    assert_nonnegative,
    assert_voxel_permutation_invariant,
    references,
)
from passion_plugin.testing.strategies import labels, logits, shapes

Case = tuple[Tensor, Tensor]
Loss = Callable[..., Tensor]

PAIRS = ((weighted_cross_entropy, references.weighted_cross_entropy), (dice_loss, references.dice_loss))
LOSSES = [loss for loss, _ in PAIRS]
each_pair = pytest.mark.parametrize(("loss", "reference"), PAIRS, ids=["ce", "dice"])
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=["ce", "dice"])
each_mode = pytest.mark.parametrize("mode", ["default", "official"])


@st.composite
def cases(draw: st.DrawFn, *, batch: tuple[int, int] = (1, 3)) -> Case:
    shape = draw(shapes(batch=batch, side=(1, 3)))
    return draw(logits(shape, scales=(1.0, 0.0, 10.0))), draw(labels(shape))


@st.composite
def region_cases(draw: st.DrawFn) -> Case:
    z = draw(logits(draw(shapes(channels=(1, 3), side=(1, 3))), scales=(1.0, 0.0, 10.0)))
    full = draw(st.sampled_from([0.0, 0.4, 1.0]))
    return z, torch.rand(z.shape, generator=torch.Generator().manual_seed(0)) < full


@each_pair
@each_mode
@settings(max_examples=15)
@given(case=cases())
def test_equals_its_reference(loss: Loss, reference: Loss, mode: str, case: Case) -> None:
    assert_matches_reference(partial(loss, mode=mode), partial(reference, mode=mode), *case)


@each_pair
@settings(max_examples=15)
@given(case=region_cases())
def test_equals_its_reference_for_regions(loss: Loss, reference: Loss, case: Case) -> None:
    assert_matches_reference(partial(loss, outputs="sigmoid"), partial(reference, outputs="sigmoid"), *case)


@each_loss
@each_mode
@settings(max_examples=15)
@given(case=cases(batch=(2, 3)))
def test_has_no_geometry_no_batch_and_no_sign(loss: Loss, mode: str, case: Case) -> None:
    z, y = case
    bound = partial(loss, mode=mode)
    assert_batch_independent(bound, z, y)
    assert_voxel_permutation_invariant(bound, z, y)
    assert_class_permutation_invariant(bound, y, z)
    assert_independent_of_layout(bound, z, y)
    assert_nonnegative(bound, z, y)


@each_loss
@pytest.mark.parametrize("spatial", [(2, 3), (1, 2, 2)])
@pytest.mark.parametrize("outputs", ["softmax", "sigmoid"])
def test_first_and_second_derivatives(loss: Loss, spatial: tuple[int, ...], outputs: str) -> None:
    z = torch.randn(2, 3, *spatial, dtype=torch.float64, requires_grad=True)
    y = torch.randint(3, (2, *spatial)) if outputs == "softmax" else torch.rand(z.shape) < 0.5
    bound = partial(loss, labels=y, outputs=outputs)
    assert torch.autograd.gradcheck(bound, z)
    assert torch.autograd.gradgradcheck(bound, z)


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computed_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    assert_computed_in_float32(loss, 3 * torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4)), dtype=dtype)


@each_loss
def test_every_integer_dtype_of_labels_gives_the_same(loss: Loss) -> None:
    z, y = torch.randn(2, 2, 3, 3), torch.randint(2, (2, 3, 3))
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool):
        assert torch.equal(loss(z, y.to(dtype)), loss(z, y))


def test_cross_entropy_weighs_a_rare_class_more() -> None:
    z = torch.zeros(1, 2, 1, 10, requires_grad=True)
    y = torch.zeros(1, 1, 10, dtype=torch.long)
    y[..., 0] = 1
    weighted_cross_entropy(z, y).sum().backward()
    pull = z.grad.abs()[0, 0, 0]
    assert pull[0].item() == pytest.approx(9 * pull[1].item())


def test_a_sample_of_one_class_has_no_cross_entropy() -> None:
    assert weighted_cross_entropy(torch.randn(1, 3, 2, 2), torch.ones(1, 2, 2, dtype=torch.long)) == 0


def test_official_cross_entropy_is_bounded() -> None:
    z = torch.tensor([20.0, -20.0]).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    y = torch.tensor([[[1, 0]]])
    assert weighted_cross_entropy(z, y, mode="official").item() == pytest.approx(0.25 * -math.log(0.005))
    assert weighted_cross_entropy(z, y).item() == pytest.approx(0.25 * 40)


@settings(max_examples=15)
@given(case=cases())
def test_dice_is_the_same_in_both_modes(case: Case) -> None:
    assert torch.equal(dice_loss(*case), dice_loss(*case, mode="official"))


def test_dice_is_zero_only_for_a_perfect_prediction_of_every_class() -> None:
    y = torch.tensor([[[0, 1, 2, 2]]])
    perfect = 100.0 * torch.nn.functional.one_hot(y, 3).movedim(-1, 1).double()
    assert dice_loss(perfect, y).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(perfect.roll(1, 1), y).item() == pytest.approx(1)


def test_an_absent_class_costs_one_share_of_dice_without_gradient_of_its_own() -> None:
    y = torch.zeros(1, 2, 2, dtype=torch.long)
    z = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    z[:, 0] = 100.0
    assert dice_loss(z, y).item() == pytest.approx(2 / 3)


def test_one_region_is_the_foreground_of_two_classes() -> None:
    # softmax over (0, z) is sigmoid(z), and inside / outside are weighed like two classes.
    z, y = torch.randn(2, 1, 3, 3, dtype=torch.float64), torch.rand(2, 3, 3) < 0.4
    two = torch.cat((torch.zeros_like(z), z), 1)
    torch.testing.assert_close(
        weighted_cross_entropy(z, y.unsqueeze(1), outputs="sigmoid"), weighted_cross_entropy(two, y)
    )


@each_loss
def test_regions_are_independent_of_each_other(loss: Loss) -> None:
    z, y = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.rand(2, 3, 4, 4) < 0.5
    one_by_one = [loss(z[:, k : k + 1], y[:, k : k + 1], outputs="sigmoid") for k in range(3)]
    torch.testing.assert_close(loss(z, y, outputs="sigmoid"), torch.stack(one_by_one).mean(0))


def test_float32_sums_over_a_large_volume_keep_their_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, 2, 128, 128, 64, generator=generator) + 4
    y = (torch.rand(1, 128, 128, 64, generator=generator) < 0.01).long()
    for loss in LOSSES:
        torch.testing.assert_close(loss(z, y).double(), loss(z.double(), y), rtol=1e-5, atol=0)


@pytest.mark.parametrize("outputs", ["softmax", "sigmoid"])
def test_the_weight_of_a_background_that_fills_nearly_all_keeps_its_digits(outputs: str) -> None:
    # Not a power of two, for which a quotient close to 1 is exact.
    y = torch.zeros(1, 155, 90, 90, dtype=torch.long)
    y[0, 77, 44, 44] = 1
    z = torch.zeros(1, 2, 155, 90, 90).index_fill(1, torch.tensor([1]), -2.0)
    labels = torch.stack([y, 1 - y], dim=1) if outputs == "sigmoid" else y
    found, wanted = (z.to(dtype, copy=True).requires_grad_() for dtype in (torch.float32, torch.float64))
    losses = [weighted_cross_entropy(each, labels, outputs=outputs) for each in (found, wanted)]
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=0)
    for each in losses:
        each.sum().backward()
    assert found.grad is not None
    assert wanted.grad is not None
    torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-4, atol=1e-13)


@each_loss
@each_mode
def test_an_impossible_class_costs_nothing_where_it_is_not_and_everything_where_it_is(loss: Loss, mode: str) -> None:
    z = torch.randn(1, 3, 1, 5)
    z[:, 2] = -math.inf
    z.requires_grad_()
    y = torch.tensor([[[0, 1, 1, 0, 1]]])
    found = loss(z, y, mode=mode)
    (slope,) = torch.autograd.grad(found.sum(), z, create_graph=True)
    assert found.isfinite().all()
    assert slope.isfinite().all()
    assert torch.autograd.grad(slope.square().sum(), z)[0].isfinite().all()
    if loss is weighted_cross_entropy:
        log_p = z[:, :2].detach().log_softmax(1)
        if mode == "default":
            weights = torch.tensor([0.6, 0.4])
            picked = log_p.gather(1, y[:, None])[0, 0]
            torch.testing.assert_close(found.detach(), -(weights[y[0]] * picked).mean().view(1))
            assert loss(z, torch.tensor([[[0, 1, 2, 0, 1]]])).item() == math.inf
            assert loss(torch.full_like(z, math.nan), y).isnan().all()


@each_loss
@pytest.mark.parametrize("outputs", ["softmax", "sigmoid"])
def test_what_is_ignored_may_be_anything(loss: Loss, outputs: str) -> None:
    z = torch.randn(1, 2, 1, 4)
    y = torch.tensor([[[0, 1, 255, 1]]])
    labels = torch.stack([y, y.where(y == 255, 1 - y)], dim=1) if outputs == "sigmoid" else y
    wanted = loss(z, labels, outputs=outputs, ignore_index=255)
    spoilt = z.index_fill(3, torch.tensor([2]), math.nan).requires_grad_()
    found = loss(spoilt, labels, outputs=outputs, ignore_index=255)
    torch.testing.assert_close(found.detach(), wanted)
    for graph in (False, True):
        (slope,) = torch.autograd.grad(found.sum(), spoilt, create_graph=graph, retain_graph=True)
        assert slope[..., 2].tolist() == [[[0.0], [0.0]]]
        assert slope.isfinite().all()

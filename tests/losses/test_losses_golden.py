"""Official mode gives the numbers of the published code; default mode parts from them where it should."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from passion_plugin.losses import dice_loss, pixel_distillation, prototype_distillation, weighted_cross_entropy

Figures = dict[str, Tensor]
Golden = Callable[[str], Figures]

BATCHES = ("b1", "b1_absent", "b2", "b2_absent")
SEGMENTATION = {"weighted_ce": weighted_cross_entropy, "dice": dice_loss}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def differ(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-6)


def value_and_gradient(loss: Callable[[Tensor], Tensor], point: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    leaf = point.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad((value * upstream).sum(), leaf)
    return value.detach(), gradient


def pixel(figures: Figures, **settings: object) -> tuple[Tensor, Tensor]:
    arguments = {"scale_factor": int(figures["scale_factor"]), **settings}
    return value_and_gradient(
        lambda s: pixel_distillation(s, figures["teacher"], float(figures["temperature"]), **arguments),
        figures["student"],
        figures["upstream"],
    )


def prototype(figures: Figures, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    fixed = (figures["teacher"], figures["labels"], int(figures["num_classes"]))
    loss, gradient = value_and_gradient(
        lambda s: prototype_distillation(s, *fixed, mode=mode)[0], figures["student"], figures["upstream"]
    )
    return loss, gradient, prototype_distillation(figures["student"], *fixed, mode=mode)[1]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", ["T1", "T4", "up2", "up4"])
def test_official_pixel_distillation_is_published(golden: Golden, batch: str, kind: str) -> None:
    figures = golden(f"pixel_{batch}_{kind}")
    loss, gradient = pixel(figures, mode="official")
    assert_close(loss, figures["loss"])
    assert_close(gradient, figures["grad"])


@pytest.mark.parametrize("batch", BATCHES)
def test_official_prototype_distillation_is_published(golden: Golden, batch: str) -> None:
    figures = golden(f"prototype_{batch}")
    loss, gradient, distance = prototype(figures, "official")
    assert_close(loss, figures["loss"])
    assert_close(distance, figures["distance"])
    assert_close(gradient, figures["grad"])


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("term", SEGMENTATION)
def test_official_segmentation_losses_are_published(golden: Golden, batch: str, term: str) -> None:
    figures = golden(f"segmentation_{batch}")
    loss, gradient = value_and_gradient(
        lambda z: SEGMENTATION[term](z, figures["labels"], mode="official"),
        figures["logits"],
        figures[f"{term}_upstream"],
    )
    assert_close(loss, figures[term])
    assert_close(gradient, figures[f"{term}_grad"])


@pytest.mark.parametrize("batch", BATCHES)
def test_default_dice_is_the_official_dice(golden: Golden, batch: str) -> None:
    figures = golden(f"segmentation_{batch}")
    loss, gradient = value_and_gradient(
        lambda z: dice_loss(z, figures["labels"]), figures["logits"], figures["dice_upstream"]
    )
    assert_close(loss, figures["dice"])
    assert_close(gradient, figures["dice_grad"])


@pytest.mark.parametrize("batch", ["b1", "b1_absent", "b2"])
def test_default_prototypes_are_official_where_all_samples_have_the_same_classes(golden: Golden, batch: str) -> None:
    figures = golden(f"prototype_{batch}")
    loss, gradient, distance = prototype(figures, "default")
    assert_close(loss, figures["loss"])
    assert_close(distance, figures["distance"])
    assert_close(gradient, figures["grad"])


def test_default_prototypes_count_a_class_that_only_one_sample_has(golden: Golden) -> None:
    figures = golden("prototype_b2_absent")
    classes = [set(labels.unique().tolist()) for labels in figures["labels"]]
    poor = 0 if classes[0] < classes[1] else 1
    assert classes[poor] < classes[1 - poor], "one sample lacks a class of the other"
    loss, _, distance = prototype(figures, "default")
    # The sample with fewer classes sees the same list of classes in both modes.
    assert_close(loss[poor], figures["loss"][poor])
    assert differ(loss[1 - poor], figures["loss"][1 - poor])
    assert differ(distance[1 - poor], figures["distance"][1 - poor])


@pytest.mark.parametrize("batch", BATCHES)
def test_default_pixel_distillation_has_no_clamp(golden: Golden, batch: str) -> None:
    figures = golden(f"pixel_{batch}_T1")
    lowest = figures["student"].softmax(1).minimum(figures["teacher"].softmax(1)).min()
    assert lowest < 0.005, "the clamp acts on these figures"
    loss, gradient = pixel(figures)
    assert differ(loss, figures["loss"])
    assert differ(gradient * gradient.numel(), figures["grad"] * gradient.numel())


def test_default_pixel_distillation_is_official_where_no_probability_is_clamped(golden: Golden) -> None:
    figures = golden("pixel_b2_T4")
    mild = {**figures, "student": figures["student"] * 0.1, "teacher": figures["teacher"] * 0.1}
    for default, official in zip(pixel(mild), pixel(mild, mode="official"), strict=True):
        assert_close(default, official)


@pytest.mark.parametrize("batch", BATCHES)
def test_default_pixel_distillation_compares_coarse_outputs_at_their_own_resolution(golden: Golden, batch: str) -> None:
    figures = golden(f"pixel_{batch}_up2")
    coarse, fine = pixel(figures), pixel(figures, scale_factor=1)
    for one, other in zip(coarse, fine, strict=True):
        assert torch.equal(one, other)
    assert differ(coarse[0], figures["loss"])


@pytest.mark.parametrize("batch", BATCHES)
def test_default_cross_entropy_has_no_clamp(golden: Golden, batch: str) -> None:
    figures = golden(f"segmentation_{batch}")
    labels = figures["labels"].unsqueeze(1)
    confident = 4 * figures["logits"]
    assert confident.softmax(1).gather(1, labels).min() < 0.005, "the clamp acts on these figures"
    default, official = (
        value_and_gradient(
            lambda z, mode=mode: weighted_cross_entropy(z, figures["labels"], mode=mode),
            confident,
            torch.ones(len(labels), dtype=torch.float64),
        )
        for mode in ("default", "official")
    )
    assert bool((default[0] > official[0] + 1e-6).all())
    clamped = confident.softmax(1).gather(1, labels).expand_as(confident) < 0.005
    assert not official[1][clamped].any(), "the published clamp stops the gradient"
    assert default[1][clamped].any()

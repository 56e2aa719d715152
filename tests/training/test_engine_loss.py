"""The loss of a step: its value from slow references, its gradients, and what it does not depend on."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from models import NAMES, DeepNet, MeanNet, batch, copies_gradients, spec_of
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError, PassionWarning
from passion_plugin.losses._labels import prepare_target, resize_labels
from passion_plugin.testing import (
    assert_invariant_to_absent_content,
    assert_modality_permutation_invariant,
    references,
    strategies,
)
from passion_plugin.training import LossTerms
from passion_plugin.training._objective import passion_objective
from passion_plugin.wrapper import PassionWrapper

MIXED = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]
RATES = (0.2, 0.5, 0.75, 0.0, 0.1, 0.6)
TERMS = ("pixel", "prototype", "distance", "unimodal")


def wrap(net: MeanNet, config: PassionConfig | None = None, **spec: Any) -> PassionWrapper:
    rates = {name: RATES[NAMES.index(name)] for name in net.names}
    return PassionWrapper(net, net.names, missing_rates=rates, spec=spec_of(net, **spec), config=config)


def step(model: PassionWrapper, x: Tensor, mask: Tensor, y: Tensor, **more: Any) -> Tensor:
    model(x, mask, **more)
    return model.passion_loss(y)


def one_hot(mask: Tensor, column: int) -> Tensor:
    alone = torch.zeros_like(mask)
    alone[:, column] = True
    return alone


def alone(x: Tensor, column: int) -> Tensor:
    keep = torch.zeros(x.shape[1], dtype=torch.bool)
    keep[column] = True
    return torch.where(keep.view(1, -1, *[1] * (x.ndim - 2)), x, 0)


@contextmanager
def heard(net: MeanNet) -> Iterator[dict[str, list[Tensor]]]:
    """Keep what enters and what leaves the layers that predict, with plain hooks."""
    found: dict[str, list[Tensor]] = {"features": [], "logits": [], "coarse": []}

    def keep_classifier(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        found["features"].append(args[0])
        found["logits"].append(output)

    handles = [net.classifier.register_forward_hook(keep_classifier)]
    if isinstance(net, DeepNet):
        handles.append(net.coarse.register_forward_hook(lambda _m, _a, out: found["coarse"].append(out)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def reference_terms(net: MeanNet, x: Tensor, mask: Tensor, y: Tensor, mode: Any = "default") -> dict[str, Any]:
    """Every term from separate runs of the bare backbone, sample by sample, and the NumPy references."""
    classes = net.classifier.out_channels
    terms = {name: np.zeros(mask.shape) for name in TERMS}
    with torch.no_grad():
        for b in range(len(x)):
            with heard(net) as teacher:
                net(x[b : b + 1], mask[b : b + 1])
            for m in range(mask.shape[1]):
                if not mask[b, m] or mask[b].sum() < 2:
                    continue
                with heard(net) as student:
                    net(alone(x[b : b + 1], m), one_hot(mask[b : b + 1], m))
                zs, zt, label = student["logits"][0], teacher["logits"][0], y[b : b + 1]
                pixel = references.pixel_distillation(zs, zt, 4.0, mode=mode)
                for j, pair in enumerate(zip(student["coarse"], teacher["coarse"], strict=True), start=1):
                    scale = zs.shape[2] // pair[0].shape[2]
                    pixel = pixel + 2.0**-j * references.pixel_distillation(*pair, 4.0, scale_factor=scale, mode=mode)
                prototype, distance = references.prototype_distillation(
                    student["features"][0], teacher["features"][0], label, classes, mode=mode
                )
                unimodal = references.weighted_cross_entropy(zs, label, mode=mode)
                unimodal = unimodal + references.dice_loss(zs, label, mode=mode)
                values = (pixel, prototype, distance, unimodal)
                for name, value in zip(TERMS, values, strict=True):
                    terms[name][b, m] = value[0]
    return terms


@pytest.mark.parametrize(
    ("modalities", "classes", "ndim", "deep"),
    [(2, 2, 2, False), (3, 5, 3, False), (6, 2, 2, True), (3, 3, 3, True), (2, 5, 2, True)],
)
def test_the_loss_is_the_one_assembled_from_the_references(
    modalities: int, classes: int, ndim: int, deep: bool
) -> None:
    names = NAMES[:modalities]
    net = (DeepNet if deep else MeanNet)(names, classes, ndim).double()
    presence = torch.ones(4, modalities, dtype=torch.bool)
    presence[1, 0] = presence[2, 1:] = False
    presence[3, -1] = modalities == 2
    x, mask, y = batch(presence.tolist(), classes=classes, ndim=ndim, dtype=torch.float64)
    model = wrap(net)
    found = step(model, x, mask, y)
    terms = model.passion.loss_terms()
    wanted = reference_terms(net, x, mask, y)
    for name in TERMS:
        np.testing.assert_allclose(getattr(terms, name).numpy(), wanted[name], rtol=1e-10, atol=1e-12)
    gate = references.gate(wanted["distance"], mask)
    np.testing.assert_array_equal(terms.gate.numpy(), gate)
    assert gate.any()
    total = references.total_loss(
        wanted["pixel"],
        wanted["prototype"],
        wanted["unimodal"],
        terms.active,
        rarity=[1 / (1 - RATES[index]) for index in range(modalities)],
        beta=np.ones(modalities),
        gate=gate,
    )
    assert found.item() == pytest.approx(total, rel=1e-10)
    assert total > 0


def test_weights_of_the_configuration_scale_their_terms() -> None:
    net = MeanNet(NAMES[:3]).double()
    x, mask, y = batch(MIXED, dtype=torch.float64)
    total = {}
    for name in ("pixel_weight", "prototype_weight", "unimodal_weight"):
        weights = {**dict.fromkeys(("pixel_weight", "prototype_weight", "unimodal_weight"), 0.0), name: 3.0}
        total[name] = step(wrap(net, PassionConfig(**weights)), x, mask, y)  # type: ignore[arg-type]
    model = wrap(net)
    assert torch.allclose(
        step(model, x, mask, y),
        (0.5 * total["pixel_weight"] + 0.1 * total["prototype_weight"] + total["unimodal_weight"]) / 3,
        rtol=1e-12,
    )
    assert min(value.item() for value in total.values()) > 0


def test_official_mode_gates_the_unimodal_term_and_puts_beta_on_it() -> None:
    net = MeanNet(NAMES[:3]).double()
    x, mask, y = batch([[1, 1, 1]], dtype=torch.float64)
    model = wrap(net, PassionConfig.official(pixel_weight=0.0, prototype_weight=0.0))
    beta = torch.tensor([0.5, 1.5, 2.0], dtype=torch.float64)
    found = step(model, x, mask, y)
    wanted = reference_terms(net, x, mask, y, "official")
    gate = references.gate(wanted["distance"], mask, mode="official")
    assert 0 < gate.sum() < 3
    kept = [wanted["unimodal"][0, m] / (1 - RATES[m]) for m in range(3) if gate[0, m]]
    assert found.item() == pytest.approx(math.fsum(kept), rel=1e-10)
    found.backward()
    plain = copies_gradients(net)
    model.passion.preference._beta = beta
    step(model, x, mask, y).backward()
    column = int(np.flatnonzero(gate[0])[0])
    name = f"encoders.{NAMES[column]}.0.weight"
    torch.testing.assert_close(net.get_parameter(name).grad, plain[name] * beta[column], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_official_mode_takes_the_unimodal_predictions_of_the_backbone(dtype: torch.dtype) -> None:
    net = DeepNet(NAMES[:3]).to(dtype)
    x, mask, y = batch([[1, 1, 0], [0, 1, 0]], dtype=dtype)
    model = wrap(net, PassionConfig.official(), unimodal_outputs=lambda raw: raw[1])
    raw = model(x, mask)
    model.passion_loss(y)
    terms = model.passion.loss_terms()
    logs = [p.detach().double().log() for p in raw[1]]
    for b, m in [(0, 0), (0, 1), (1, 1)]:
        entropy = references.weighted_cross_entropy(logs[m][b : b + 1], y[b : b + 1], mode="official")
        dice = references.dice_loss(logs[m][b : b + 1], y[b : b + 1], mode="official")
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        assert terms.unimodal[b, m].item() == pytest.approx((entropy + dice)[0], rel=tolerance)
    assert terms.unimodal[~mask].eq(0).all()
    assert torch.equal(terms.supervised, mask)


def test_a_wrong_number_of_unimodal_predictions_is_refused() -> None:
    net = DeepNet(NAMES[:3])
    x, mask, y = batch(MIXED)
    model = wrap(net, PassionConfig.official(), unimodal_outputs=lambda raw: raw[1][:1])
    with pytest.raises(RuntimeError, match=r"unimodal_outputs gave 1 predictions.*one for each"):
        step(model, x, mask, y)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_a_one_hot_target_is_the_same_as_its_integer_labels(dtype: torch.dtype) -> None:
    net = MeanNet(NAMES[:3])
    x, mask, y = batch(MIXED)
    hot = F.one_hot(y, 3).movedim(-1, 1).to(dtype)
    model = wrap(net)
    wanted = step(model, x, mask, y)
    wanted.backward()
    gradients = copies_gradients(net)
    found = step(model, x, mask, hot)
    found.backward()
    assert torch.equal(found, wanted)
    assert all(torch.equal(value, gradients[name]) for name, value in copies_gradients(net).items())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_every_integer_dtype_of_labels_gives_the_same_loss(dtype: torch.dtype) -> None:
    x, mask, y = batch(MIXED)
    model = wrap(MeanNet(NAMES[:3]))
    assert torch.equal(step(model, x, mask, y.to(dtype)), step(model, x, mask, y))


def test_bool_labels_name_two_classes() -> None:
    x, mask, y = batch(MIXED, classes=2)
    model = wrap(MeanNet(NAMES[:3], 2))
    assert torch.equal(step(model, x, mask, y.bool()), step(model, x, mask, y))


def test_regions_are_compared_with_sigmoid_outputs() -> None:
    net = MeanNet(NAMES[:3]).double()
    x, mask, y = batch(MIXED, dtype=torch.float64)
    regions = torch.stack([y > 0, y == 1, y != 1], dim=1)
    model = wrap(net, outputs="sigmoid")
    found = step(model, x, mask, regions)
    terms = model.passion.loss_terms()
    with torch.no_grad(), heard(net) as runs:
        net(x, mask)
        net(alone(x, 0), one_hot(mask, 0))
    (zt, zs), (ft, fs) = runs["logits"], runs["features"]
    pixel = references.pixel_distillation(zs, zt, 4.0, outputs="sigmoid")
    prototype, _ = references.prototype_distillation(fs, ft, regions, 3)
    unimodal = references.weighted_cross_entropy(zs, regions, outputs="sigmoid")
    unimodal = unimodal + references.dice_loss(zs, regions, outputs="sigmoid")
    rows = [0, 1]
    for name, value in (("pixel", pixel), ("prototype", prototype), ("unimodal", unimodal)):
        np.testing.assert_allclose(getattr(terms, name)[rows, 0].numpy(), value[rows], rtol=1e-10, atol=1e-13)
    assert torch.equal(step(model, x, mask, regions.float()), found)


class Half(MeanNet):
    """Features and logits at half resolution, the prediction interpolated."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        pooled = F.avg_pool2d(self.decoder(self.fuse(self.encode(x), mask)), 2)
        return F.interpolate(self.classifier(pooled), scale_factor=2.0)


def test_labels_are_brought_down_to_the_resolution_of_the_classifier() -> None:
    net = Half(NAMES[:3])
    x, mask, y = batch(MIXED, side=8)
    model = wrap(net)
    assert torch.equal(step(model, x, mask, y), step(model, x, mask, resize_labels(y, (4, 4))))


@pytest.mark.parametrize("spatial", [(4, 6), (3, 5), (2, 2, 4)])
def test_resized_labels_are_labels_that_were_there(spatial: tuple[int, ...]) -> None:
    labels = torch.randint(7, (2, *(2 * size for size in spatial)))
    small = resize_labels(labels, spatial)
    assert torch.equal(small, labels[(slice(None), *[slice(None, None, 2)] * len(spatial))])
    masks = F.one_hot(labels, 7).movedim(-1, 1)
    assert torch.equal(resize_labels(masks, spatial).argmax(1), small)
    assert resize_labels(labels, tuple(labels.shape[1:])) is labels


@pytest.mark.parametrize(
    ("size", "spatial"),
    [((20, 20), (7, 6)), ((9, 8), (5, 2)), ((9, 5, 20), (4, 5, 1)), ((155, 240), (39, 60)), ((20, 21), (9, 9))],
)
def test_strides_may_differ_between_axes_and_round_up_or_down(size: tuple[int, ...], spatial: tuple[int, ...]) -> None:
    assert resize_labels(torch.zeros(2, *size, dtype=torch.long), spatial).shape == (2, *spatial)


@pytest.mark.parametrize(
    ("size", "spatial"), [((20, 20), (32, 32)), ((20, 20), (16, 20)), ((16, 20), (8, 21)), ((20, 20), (18, 18))]
)
def test_labels_are_not_stretched_over_what_was_padded_or_cropped(
    size: tuple[int, ...], spatial: tuple[int, ...]
) -> None:
    with pytest.raises(BackboneError, match="seems to pad or crop"):
        resize_labels(torch.zeros(2, *size, dtype=torch.long), spatial)


class Padding(MeanNet):
    """Pads images to a multiple of 16 and crops the prediction, or the features before the classifier."""

    crop_features = False

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        height, width = x.shape[2:]
        padded = F.pad(x, (0, -width % 16, 0, -height % 16))
        features = self.decoder(self.fuse(self.encode(padded), mask))
        if self.crop_features:
            features = features[..., :height, :width]
        return self.classifier(features)[..., :height, :width]


def test_a_network_that_pads_its_images_has_to_undo_it_before_the_classifier() -> None:
    net = Padding(NAMES[:3])
    x, mask, y = batch(MIXED, side=20)
    with pytest.raises(BackboneError, match="pads its images has to undo that before this layer"):
        PassionWrapper(net, NAMES[:3], missing_rates=[0.2, 0.4, 0.6])(x, mask)
    with pytest.raises(BackboneError, match=r"size \(20, 20\), the logits or features of the backbone \(32, 32\)"):
        step(wrap(net), x, mask, y)
    net.crop_features = True
    step(wrap(net), x, mask, y).backward()
    net.crop_features = False
    x, mask, y = batch(MIXED, side=32)
    step(wrap(net), x, mask, y).backward()


def test_one_hot_and_region_masks_are_told_apart_by_the_outputs() -> None:
    hot = F.one_hot(torch.randint(3, (2, 4, 4)), 3).movedim(-1, 1)
    logits = torch.randn(2, 3, 4, 4)
    assert prepare_target(hot, logits, "softmax").shape == (2, 4, 4)
    assert prepare_target(hot, logits, "sigmoid").shape == (2, 3, 4, 4)


@pytest.mark.parametrize("students", ["replay", "rerun", "mixed"])
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_absent_modalities_get_a_gradient_of_exactly_zero_whatever_stands_in_their_input(
    students: Any, memory: Any, poison: float
) -> None:
    net = MeanNet(NAMES[:3])
    x, mask, y = batch([[1, 1, 0], [0, 1, 0]])
    model = wrap(net, PassionConfig(memory=memory), students=students)
    prediction = model(x, mask)
    clean = F.cross_entropy(prediction, y) + model.passion_loss(y)
    clean.backward()
    wanted = copies_gradients(net)
    poisoned = torch.where(mask[:, :, None, None], x, poison)
    found = F.cross_entropy(model(poisoned, mask), y) + model.passion_loss(y)
    assert torch.equal(found, clean)
    found.backward()
    for name, gradient in copies_gradients(net).items():
        assert torch.equal(gradient, wanted[name]), name
        if name.startswith("encoders.t1."):
            assert not gradient.any(), name
    assert poisoned.isfinite().logical_not().any(), "the input of the user is not written to"


@pytest.mark.parametrize("students", ["replay", "mixed", "rerun"])
def test_distillation_does_not_even_visit_the_encoder_of_an_absent_modality(students: Any) -> None:
    net = MeanNet(NAMES[:3])
    x, mask, y = batch([[1, 1, 0]])
    step(wrap(net, students=students), x, mask, y).backward()
    assert all(p.grad is None for p in net.encoders["t1"].parameters())
    assert all(p.grad is not None for p in net.encoders["flair"].parameters())


def test_a_modality_that_is_absent_in_one_sample_learns_from_the_others_only() -> None:
    net = MeanNet(NAMES[:2])
    x, mask, y = batch([[1, 1], [0, 1]])
    model = wrap(net)
    (0.5 * step(model, x[:1], mask[:1], y[:1])).backward()
    wanted = copies_gradients(net)
    step(model, x, mask, y).backward()
    for name, gradient in copies_gradients(net).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7)


class Rows:
    """What a :class:`Recorder` saw. No list: what students change in those is put back."""

    def __init__(self) -> None:
        self.seen: list[int] = []


class Recorder(nn.Identity):
    """Notes how many rows come by."""

    def __init__(self) -> None:
        super().__init__()
        self._rows = Rows()

    @property
    def rows(self) -> list[int]:
        return self._rows.seen

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(len(x))
        return x


@pytest.mark.parametrize("students", ["replay", "rerun"])
def test_students_run_only_on_rows_with_the_modality_and_at_least_one_other(students: Any) -> None:
    net = MeanNet(NAMES[:3])
    decoder, encoder = Recorder(), Recorder()
    net.decoder[3] = decoder
    net.encoders["flair"] = nn.Sequential(net.encoders["flair"], encoder)
    x, mask, _ = batch([[1, 1, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]])
    wrap(net, students=students)(x, mask)
    assert decoder.rows == [5, 2, 3, 1]
    assert encoder.rows == ([5] if students == "replay" else [5, 2, 3, 1])


def test_a_modality_that_nobody_in_the_batch_has_costs_no_pass() -> None:
    net = MeanNet(NAMES[:3])
    net.decoder[3] = Recorder()
    x, mask, y = batch([[1, 1, 0], [1, 1, 0]])
    model = wrap(net)
    step(model, x, mask, y)
    assert net.decoder[3].rows == [2, 2, 2]
    assert math.isnan(model.passion.loss_terms().means()["pixel"]["t1"])


def test_a_batch_of_single_modality_samples_has_a_zero_loss_that_backpropagates() -> None:
    net = MeanNet(NAMES[:3])
    net.decoder[3] = Recorder()
    x, mask, y = batch([[1, 0, 0], [0, 0, 1]])
    model = wrap(net)
    prediction = model(x, mask)
    loss = model.passion_loss(y)
    assert loss.item() == 0
    assert net.decoder[3].rows == [2]
    loss.backward()
    assert not any(gradient.any() for gradient in copies_gradients(net).values())
    (F.cross_entropy(prediction, y) + loss.detach()).backward()
    assert model.passion.loss_terms().active.any().item() is False


def test_loss_terms_are_zero_where_there_is_no_student_and_averaged_where_there_is_one() -> None:
    model = wrap(MeanNet(NAMES[:3]))
    x, mask, y = batch(MIXED)
    step(model, x, mask, y)
    terms = model.passion.loss_terms()
    wanted = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    assert terms.modalities == NAMES[:3]
    assert torch.equal(terms.active, wanted)
    for name in TERMS:
        values = getattr(terms, name)
        assert values.shape == (3, 3)
        assert not values.requires_grad
        assert values[~wanted].eq(0).all()
        assert (values[wanted] > 0).all()
        means = terms.means()[name]
        assert means["flair"] == pytest.approx(values[:2, 0].mean().item(), rel=1e-6)
        assert means["t1"] == pytest.approx(values[1, 2].item(), rel=1e-6)
    assert not terms.gate[~wanted].any()
    assert set(terms.means()) == {*TERMS, "gate"}
    assert terms.means()["gate"]["flair"] == pytest.approx(terms.gate[:2, 0].double().mean().item())


def test_permuting_the_modalities_permutes_the_terms() -> None:
    names, order = NAMES[:3], [2, 0, 1]
    net = MeanNet(names).double()
    x, mask, y = batch(MIXED, dtype=torch.float64)
    model = wrap(net)
    loss = step(model, x, mask, y)
    terms = model.passion.loss_terms()
    other = MeanNet([names[index] for index in order]).double()
    other.load_state_dict(net.state_dict())
    shuffled = wrap(other)
    moved = step(shuffled, x[:, order], mask[:, order], y)
    torch.testing.assert_close(moved, loss, rtol=1e-12, atol=0)
    for name in (*TERMS, "gate", "active"):
        torch.testing.assert_close(
            getattr(shuffled.passion.loss_terms(), name), getattr(terms, name)[:, order], rtol=1e-9, atol=1e-13
        )


@settings(max_examples=12)
@given(presence=strategies.presence_tables(4, 3), order=st.permutations(range(4)))
def test_permuting_the_samples_permutes_the_terms(presence: Tensor, order: list[int]) -> None:
    torch.manual_seed(0)
    x, mask, y = batch(presence.tolist(), dtype=torch.float64)
    model = wrap(MeanNet(NAMES[:3]).double())
    loss = step(model, x, mask, y)
    terms = model.passion.loss_terms()
    moved = step(model, x[order], mask[order], y[order])
    torch.testing.assert_close(moved, loss, rtol=1e-11, atol=1e-14)
    for name in (*TERMS, "gate", "active"):
        torch.testing.assert_close(
            getattr(model.passion.loss_terms(), name), getattr(terms, name)[order], rtol=1e-9, atol=1e-13
        )


@settings(max_examples=8)
@given(presence=strategies.presence_tables(3, 3).filter(lambda table: not bool(table.all())))
def test_the_content_of_absent_modalities_never_matters(presence: Tensor) -> None:
    torch.manual_seed(0)
    net = MeanNet(NAMES[:3]).double()
    _, _, y = batch(presence.tolist())
    model = wrap(net)
    x = torch.randn(*presence.shape, 4, 4, dtype=torch.float64)

    def rule(images: Tensor) -> Tensor:
        prediction = model(images, presence)
        return F.cross_entropy(prediction, y) + model.passion_loss(y)

    assert_invariant_to_absent_content(rule, presence, x)


def test_the_sum_over_modalities_does_not_know_their_positions() -> None:
    tables = [torch.rand(4, 3, dtype=torch.float64) for _ in range(3)]
    gate, rarity = (torch.rand(4, 3) < 0.5).double(), torch.rand(3, dtype=torch.float64)

    def rule(pixel: Tensor, prototype: Tensor, unimodal: Tensor, gate: Tensor, rarity: Tensor) -> Tensor:
        here = torch.ones_like(gate, dtype=torch.bool)
        terms = LossTerms(NAMES[:3], pixel, prototype, pixel, unimodal, gate.bool(), here, here)
        ones = torch.ones(3, dtype=torch.float64)
        return passion_objective(terms, rarity.tolist(), ones, PassionConfig(), warming_up=False)

    assert_modality_permutation_invariant(rule, *tables, gate, rarity)


@pytest.mark.parametrize("mode", ["default", "official"])
def test_during_warm_up_only_the_unimodal_term_counts_and_beta_rests(mode: Any) -> None:
    net = MeanNet(NAMES[:3])
    x, mask, y = batch(MIXED)
    model = wrap(net, PassionConfig(mode=mode, warmup_epochs=1))
    found = step(model, x, mask, y)
    rarity = torch.tensor([1 / (1 - rate) for rate in RATES[:3]])
    wanted = (model.passion.loss_terms().unimodal * rarity).sum(1).mean()
    torch.testing.assert_close(found, wanted, check_dtype=False)
    assert torch.equal(model.end_epoch().beta, torch.ones(3, dtype=torch.float64))
    assert step(model, x, mask, y) != found
    assert not torch.equal(model.end_epoch().beta, torch.ones(3, dtype=torch.float64))


def test_without_rarity_weights_every_modality_weighs_the_same() -> None:
    net = MeanNet(NAMES[:3])
    x, mask, y = batch(MIXED)
    only = {"pixel_weight": 0.0, "prototype_weight": 0.0}
    model = wrap(net, PassionConfig(rarity_weights=False, **only))
    found = step(model, x, mask, y)
    torch.testing.assert_close(found, model.passion.loss_terms().unimodal.sum(1).mean(), check_dtype=False)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("students", ["replay", "rerun"])
def test_low_memory_gives_the_same_loss_and_gradients_and_keeps_less(students: Any, dropout: float) -> None:
    net = MeanNet(NAMES[:3], norm="batch", dropout=dropout)
    x, mask, y = batch([[1, 1, 1]] * 2, side=8)
    results = []
    for memory in ("default", "low"):
        own = copy.deepcopy(net)
        model = wrap(own, PassionConfig(memory=memory), students=students)
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            prediction = model(x, mask)
        held = sum(kept.values())
        loss = F.cross_entropy(prediction, y) + model.passion_loss(y)
        loss.backward()
        results.append((loss.detach(), copies_gradients(own), dict(own.named_buffers()), held))
    (plain, low) = results
    assert torch.equal(plain[0], low[0])
    for name, gradient in plain[1].items():
        torch.testing.assert_close(low[1][name], gradient, rtol=1e-6, atol=1e-8)
    assert all(torch.equal(buffer, low[2][name]) for name, buffer in plain[2].items())
    assert low[3] < 0.6 * plain[3]


def test_students_and_teacher_can_share_the_dropout_mask() -> None:
    net = MeanNet(NAMES[:2], dropout=0.5).double()
    with torch.no_grad():
        for parameter, other in zip(net.encoders["flair"].parameters(), net.encoders["t1ce"].parameters(), strict=True):
            other.copy_(parameter)
    x, mask, y = batch([[1, 1]], dtype=torch.float64, side=8)
    x[:, 1] = x[:, 0]  # The mean of two equal features is each of them: students equal the teacher.
    shared = wrap(net, PassionConfig(share_random_state=True))
    step(shared, *batch([[1, 1]], dtype=torch.float64, side=8))
    torch.manual_seed(0)
    step(shared, x, mask, y)
    assert shared.passion.loss_terms().distance.max() < 1e-12
    assert shared.passion.loss_terms().pixel.abs().max() < 1e-12
    apart = wrap(shared.unwrap())
    step(apart, x, mask, y)
    assert apart.passion.loss_terms().distance.min() > 1e-3


@pytest.mark.parametrize("memory", ["default", "low"])
def test_students_that_share_the_random_state_leave_it_to_the_training(memory: Any) -> None:
    net = MeanNet(NAMES[:3], dropout=0.5)
    x, mask, y = batch(MIXED)
    model = wrap(net, PassionConfig(share_random_state=True, memory=memory))
    torch.manual_seed(0)
    step(model, x, mask, y).backward()
    after = torch.get_rng_state()
    torch.manual_seed(0)
    net(x, mask)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_backbone_whose_classifier_alone_is_trained_still_learns() -> None:
    net = MeanNet(NAMES[:3])
    net.requires_grad_(False)
    net.classifier.requires_grad_(True)
    x, mask, y = batch(MIXED)
    step(wrap(net), x, mask, y).backward()
    assert net.classifier.weight.grad is not None
    assert net.classifier.weight.grad.any()


class OnlyPresent(MeanNet):
    """Runs no encoder whose modality is missing in the whole batch."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        here = mask.any(0).nonzero().flatten().tolist()
        stacked = torch.stack([self.encoders[self.names[m]](x[:, m : m + 1]) for m in here], dim=1)
        weight = mask[:, here, None, None, None].to(x.dtype)
        return self.classifier(self.decoder((stacked * weight).sum(1) / weight.sum(1)))


@pytest.mark.parametrize("network", [MeanNet, OnlyPresent])
@pytest.mark.parametrize("detected", [False, True])
def test_a_modality_added_to_a_frozen_network_is_trained_alone(network: type[MeanNet], detected: bool) -> None:
    net = network(NAMES[:2])
    net.requires_grad_(False)
    net.encoders["t1ce"].requires_grad_(True)
    x, mask, y = batch([[1, 1], [1, 1], [1, 1], [1, 0]])
    model = PassionWrapper(net, NAMES[:2], missing_rates=[0.2, 0.5], spec=None if detected else spec_of(net))
    step(model, x, mask, y).backward()
    assert model.passion.loss_terms().distance[:3].min() > 0
    assert [name for name, value in copies_gradients(net).items() if value.any()] == [
        "encoders.t1ce.0.weight",
        "encoders.t1ce.0.bias",
    ]
    assert model.passion.adapter is not None
    assert model.passion.adapter.spec.students == "replay"


def test_a_training_loop_that_never_ends_an_epoch_is_warned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = MeanNet(NAMES[:2])
    x, mask, y = batch([[1, 1]] * 2)

    def wrapped(samples: int) -> PassionWrapper:
        return PassionWrapper(net, NAMES[:2], presence=np.ones((samples, 2), dtype=bool), spec=spec_of(net))

    model = wrapped(2)
    for _ in range(6):
        step(model, x, mask, y)  # An epoch may be many passes: a warning would be an error here.
    monkeypatch.setattr("passion_plugin.training._strategy._STEPS_WITHOUT_EPOCH", 6)
    with pytest.warns(
        PassionWarning, match=r"not been called for 14 samples in 7 steps.*Call it once after each epoch"
    ):
        step(model, x, mask, y)
    step(model, x, mask, y)  # A second warning would be an error here.
    model.unwrap()
    for samples, ends in ((2, True), (10, False)):
        quiet = wrapped(samples)
        for _ in range(9):
            step(quiet, x, mask, y)
            if ends:
                quiet.end_epoch()
        quiet.unwrap()


def test_end_epoch_returns_the_preference_of_the_distances_that_were_measured() -> None:
    model = wrap(MeanNet(NAMES[:3]).double())
    distances, tables = [], []
    for seed in range(2):
        x, mask, y = batch(MIXED, dtype=torch.float64, seed=seed)
        step(model, x, mask, y)
        distances.append(model.passion.loss_terms().distance)
        tables.append(mask)
    found = model.end_epoch()
    beta, preference = references.epoch_beta(
        np.ones(3), torch.cat(distances), torch.cat(tables), eta=references.epoch_eta(0)
    )
    np.testing.assert_allclose(found.beta.numpy(), beta, rtol=1e-9)
    np.testing.assert_allclose(found.relative_preference.numpy(), preference, rtol=1e-9, atol=1e-12)
    assert torch.equal(model.passion.preference.beta, found.beta)
    assert set(found.as_dict()) == set(NAMES[:3])

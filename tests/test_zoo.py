"""Every animal of the zoo either works and is shown to be right, or is refused with the reason."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passion_plugin import detect_spec
from passion_plugin.backbone import BackboneSpec
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError, InputError
from passion_plugin.wrapper import PassionWrapper
from zoo import ZOO, ZooEntry, blank
from zoo.entry import one_subset
from zoo.reference import (
    clone_arguments,
    encoder_parameters,
    fingerprint,
    first_difference,
    prepared,
    run,
    slow_step,
    without_noise,
)

WORKS = [entry for entry in ZOO.values() if entry.expected == "works"]
REFUSED = [entry for entry in ZOO.values() if entry.expected == "refused"]

each_working = pytest.mark.parametrize("entry", WORKS, ids=lambda entry: entry.name)
each_comparable = pytest.mark.parametrize(
    "entry", [entry for entry in WORKS if entry.rung != "heads"], ids=lambda entry: entry.name
)
each_refused = pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: entry.name)


@functools.cache
def detected(name: str) -> BackboneSpec:
    """Spec as detected, once for all tests: it is plain data."""
    return detect(ZOO[name], ZOO[name].backbone())


def detect(entry: ZooEntry, backbone: nn.Module) -> BackboneSpec:
    return detect_spec(backbone, *entry.full_example(), modalities=entry.modalities, **entry.spec)


def wrapped(entry: ZooEntry, spec: BackboneSpec | None = None, **config: Any) -> tuple[PassionWrapper, nn.Module]:
    """A wrapper in train mode, and a bare backbone with the same weights that was never touched by us."""
    backbone = prepared(entry)
    images, mask = entry.full_example()
    example = {"example_input": images, "example_mask": mask} if entry.rung == "heads" else {}
    model = PassionWrapper(
        backbone,
        modalities=entry.modalities,
        presence=entry.training_table(),
        spec=spec or entry.full_spec(),
        config=PassionConfig(**config),
        **example,
    )
    return model.train(), prepared(entry)


def step(model: PassionWrapper, entry: ZooEntry) -> Tensor:
    """One training step without the optimizer."""
    run(model, entry.arguments(), **entry.extra())
    loss = model.passion_loss(entry.labels())
    loss.backward()
    return loss


def test_the_zoo_has_at_least_25_animals_that_work_and_each_says_what_is_awkward() -> None:
    assert len(WORKS) >= 25
    assert all(entry.notes for entry in ZOO.values())


@each_working
def test_training_output_and_state_are_those_of_the_bare_backbone(entry: ZooEntry) -> None:
    model, backbone = wrapped(entry)
    prediction = run(model, entry.arguments(), **entry.extra())
    expected = run(backbone, entry.arguments())
    assert not first_difference(prediction, expected)

    model.passion_loss(entry.labels()).backward()
    state, expected_state = model.backbone.state_dict(), backbone.state_dict()
    assert list(state) == list(expected_state)
    changed = [name for name in state if not torch.equal(state[name], expected_state[name])]
    assert not changed, "running statistics and other buffers move once per step, with the fused pass"


@each_working
def test_eval_is_the_bare_backbone_bit_for_bit(entry: ZooEntry) -> None:
    model, backbone = wrapped(entry)
    model.eval()
    backbone.eval()
    with torch.no_grad():
        assert not first_difference(run(model, entry.arguments()), run(backbone, entry.arguments()))


@pytest.mark.parametrize("how", ["detected", "by hand"])
@each_comparable
def test_terms_and_gradients_equal_those_of_separate_runs_of_the_bare_backbone(entry: ZooEntry, how: str) -> None:
    spec = detected(entry.name) if how == "detected" else entry.full_spec()
    model, _ = wrapped(entry, spec, temperature=3.0, pixel_weight=1.0, prototype_weight=0.0, unimodal_weight=0.0)
    without_noise(model.backbone)
    step(model, entry)
    terms, expected = model.passion.loss_terms(), slow_step(entry.name, 3.0)
    single = entry.dtype == torch.float32

    assert torch.equal(terms.active, expected.active)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if single else {"rtol": 1e-9, "atol": 1e-12}
    for term in ("pixel", "prototype", "distance"):
        computed, reference = getattr(terms, term), getattr(expected, term)
        torch.testing.assert_close(computed, reference, **tolerance, check_dtype=False)
        assert (reference[expected.active] > 0).all(), "a zero term would pass for the wrong reason"

    scale = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    assert scale > 0
    for name, parameter in model.backbone.named_parameters():
        computed = torch.zeros(()) if parameter.grad is None else parameter.grad
        reference = expected.gradients.get(name, torch.zeros(()))
        error = float((computed - reference).abs().max()) / scale
        assert error < (1e-4 if single else 1e-9), name


@each_working
def test_students_train_the_encoder_of_every_present_modality_and_no_other(entry: ZooEntry) -> None:
    model, _ = wrapped(entry)
    presence = one_subset(len(entry.modalities))
    if len(entry.modalities) == 2:
        presence[0] = True  # a sample with one modality has no student
    absent = int((~presence.any(dim=0)).nonzero().flatten()[0]) if not presence.any(dim=0).all() else None
    images = [
        blank(image, presence[:, index], fill=float("nan"))
        for index, image in enumerate(entry.full_images(len(presence)))
    ]
    if not entry.nan_safe:
        images = [image.nan_to_num() for image in images]
    run(model, entry.pack(images, presence), **entry.extra(presence))
    loss = model.passion_loss(entry.labels())
    loss.backward()

    assert loss.isfinite()
    gradients = {name: p.grad for name, p in model.backbone.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for index in range(len(entry.modalities)):
        parameters = encoder_parameters(entry, model.backbone, index)
        if index == absent:
            if entry.private:
                assert all(p.grad is None or not p.grad.any() for p in parameters)
        elif index not in entry.frozen and parameters:
            assert any(p.grad is not None and p.grad.any() for p in parameters)


@each_working
def test_unwrap_leaves_nothing_behind(entry: ZooEntry) -> None:
    model, _ = wrapped(entry)
    backbone = model.backbone
    with torch.no_grad():
        run(backbone, entry.arguments())  # attributes that a forward sets are the backbone's own
    before = fingerprint(backbone)
    step(model, entry)
    released = model.unwrap()
    assert released is backbone
    assert fingerprint(released) == before


@pytest.mark.parametrize("entry", [entry for entry in WORKS if entry.copies], ids=lambda entry: entry.name)
def test_copies_made_after_a_step_work_on_their_own(entry: ZooEntry) -> None:
    model, _ = wrapped(entry)
    without_noise(model.backbone)
    step(model, entry)
    model.zero_grad()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    loss = step(twin, entry)
    assert loss > 0
    assert any(p.grad is not None and p.grad.any() for p in twin.backbone.parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.backbone.parameters())


@each_refused
def test_refusal_says_why_and_leaves_the_backbone_alone(entry: ZooEntry) -> None:
    backbone = entry.backbone()
    before, weights = fingerprint(backbone), copy.deepcopy(backbone.state_dict())
    model = PassionWrapper(backbone, modalities=entry.modalities, presence=entry.training_table())
    with pytest.raises(BackboneError, match=entry.reason):
        run(model, entry.arguments())
    assert fingerprint(model.unwrap()) == before
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())


@each_working
def test_detection_leaves_the_backbone_and_the_random_state_alone(entry: ZooEntry) -> None:
    backbone = entry.backbone()
    with torch.no_grad():
        run(backbone, entry.arguments())
    before, weights = fingerprint(backbone), copy.deepcopy(backbone.state_dict())
    state = torch.get_rng_state()
    detect(entry, backbone)
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(backbone) == before
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("entry", [entry for entry in WORKS if entry.rung], ids=lambda entry: entry.name)
def test_detection_chooses_the_expected_rung(entry: ZooEntry) -> None:
    assert detected(entry.name).students == entry.rung


@each_working
def test_detection_finds_the_classifier(entry: ZooEntry) -> None:
    assert detected(entry.name).classifier == entry.classifier


def test_backbone_that_reads_one_mask_row_refuses_a_batch_of_different_masks() -> None:
    entry = ZOO["first_row_only"]
    model, _ = wrapped(entry)
    args, _ = clone_arguments(entry.arguments())
    args[1][0, 0] = False
    with pytest.raises(InputError, match="mix"):
        model(*args)

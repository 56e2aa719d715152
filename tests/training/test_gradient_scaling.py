"""Gradient modulation: the hooks do what the equations say, where they say it, and nothing else."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import NAMES, DeepNet, MeanNet, batch, copies_gradients, set_beta, spec_of
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError
from passion_plugin.training._gradient_scaling import EncoderGradientScaling, check_untied_encoders, scale_gradient
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]
BETA = torch.tensor([0.25, 1.5, 2.0], dtype=torch.float64)
RARITY = torch.tensor([1.25, 2.0, 4.0], dtype=torch.float64)


def wrap(net: MeanNet, beta: Tensor | None = BETA, **config: Any) -> PassionWrapper:
    model = PassionWrapper(net, M, missing_rates=(0.2, 0.5, 0.75), spec=spec_of(net), config=PassionConfig(**config))
    if beta is not None:
        set_beta(model, beta)
    return model


def run(model: PassionWrapper, x: Tensor, mask: Tensor, y: Tensor, *, own: bool = True) -> dict[str, Tensor]:
    """Gradients of the passion loss, with the user's own loss or without it."""
    prediction = model(x, mask)
    loss = model.passion_loss(y)
    if own:
        loss = loss + F.cross_entropy(prediction[0] if isinstance(prediction, tuple) else prediction, y)
    loss.backward()
    return copies_gradients(model.backbone)


@pytest.mark.parametrize("kind", [MeanNet, DeepNet])
@pytest.mark.parametrize("memory", ["default", "low"])
def test_distillation_hooks_equal_explicit_loss_weights_in_encoder_and_decoder(
    kind: type[MeanNet], memory: Any
) -> None:
    net = kind(M).double()
    x, mask, y = batch(MIXED, dtype=torch.float64)
    found = run(wrap(net, memory=memory), x, mask, y, own=False)
    # By hand: the same terms without any hook, beta as a weight of the pixel term.
    parts = {}
    for name in ("pixel_weight", "prototype_weight", "unimodal_weight"):
        weights: dict[str, Any] = dict.fromkeys(("pixel_weight", "prototype_weight", "unimodal_weight"), 0.0)
        weights[name] = 1.0
        for column in range(3):
            model = wrap(copy.deepcopy(net), modulation="none", **weights)
            only = (torch.arange(3) == column).tolist()
            model.passion.strategy.frequencies = _rarity(
                [float(w) if o else 0.0 for w, o in zip(RARITY, only, strict=True)]
            )
            parts[name, column] = run(model, x, mask, y, own=False)
    for key, gradient in found.items():
        wanted = sum(
            0.5 * BETA[m] * parts["pixel_weight", m][key]
            + 0.1 * parts["prototype_weight", m][key]
            + parts["unimodal_weight", m][key]
            for m in range(3)
        )
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)
    for layer in ("encoders.flair.0.weight", "decoder.0.weight", "classifier.weight"):
        unweighted = sum(
            0.5 * parts["pixel_weight", m][layer]
            + 0.1 * parts["prototype_weight", m][layer]
            + parts["unimodal_weight", m][layer]
            for m in range(3)
        )
        assert (found[layer] - unweighted).abs().max() > 1e-6, "beta is visible in this layer"


def _rarity(weights: list[float]) -> Any:
    from passion_plugin.training._frequencies import ModalityFrequencies

    return ModalityFrequencies(tuple(weights), None, None)


def test_official_mode_puts_beta_on_the_unimodal_term_too() -> None:
    net = MeanNet(M).double()
    x, mask, y = batch([[1, 1, 1]], dtype=torch.float64)
    weights: dict[str, Any] = {"pixel_weight": 0.0, "prototype_weight": 0.0}
    plain = run(wrap(net, mode="official", modulation="none", **weights), x, mask, y, own=False)
    found = run(wrap(net, mode="official", **weights), x, mask, y, own=False)
    default = run(wrap(net, **weights), x, mask, y, own=False)
    unhooked = run(wrap(net, modulation="none", **weights), x, mask, y, own=False)
    active = [m for m, name in enumerate(M) if plain[f"encoders.{name}.0.weight"].any()]
    assert 0 < len(active) < 3
    for m, name in enumerate(M):
        key = f"encoders.{name}.0.weight"
        torch.testing.assert_close(found[key], BETA[m] * plain[key], rtol=1e-12, atol=0)
        assert torch.equal(default[key], unhooked[key])


@pytest.mark.parametrize("modulation", ["distillation", "encoder"])
@pytest.mark.parametrize("mode", ["default", "official"])
def test_coefficients_of_one_equal_no_hooks_bit_for_bit(modulation: Any, mode: Any) -> None:
    net = MeanNet(M)
    x, mask, y = batch(MIXED)
    ones = torch.ones(3, dtype=torch.float64)
    found = run(wrap(copy.deepcopy(net), ones, modulation=modulation, mode=mode), x, mask, y)
    wanted = run(wrap(copy.deepcopy(net), ones, modulation="none", mode=mode), x, mask, y)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_none_ignores_beta() -> None:
    net = MeanNet(M)
    x, mask, y = batch(MIXED)
    found = run(wrap(copy.deepcopy(net), modulation="none"), x, mask, y)
    wanted = run(wrap(copy.deepcopy(net), None, modulation="none"), x, mask, y)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("memory", ["default", "low"])
def test_encoder_rule_scales_all_that_reaches_each_encoder_and_nothing_else(memory: Any) -> None:
    net = MeanNet(M).double()
    x, mask, y = batch(MIXED, dtype=torch.float64)
    plain = run(wrap(copy.deepcopy(net), modulation="none", memory=memory), x, mask, y)
    model = wrap(copy.deepcopy(net), modulation="encoder", memory=memory)
    for _ in range(2):  # Hooks are renewed, not added, at every step.
        found = run(model, x, mask, y)
        for key, gradient in plain.items():
            owner = key.split(".")[1] if key.startswith("encoders.") else None
            factor = 1.0 if owner is None else BETA[M.index(owner)]
            torch.testing.assert_close(gradient * factor, found[key], rtol=1e-12, atol=1e-15)
            assert gradient.any()


def test_the_value_of_the_loss_does_not_depend_on_beta() -> None:
    net = MeanNet(M)
    x, mask, y = batch(MIXED)
    values = []
    for beta in (None, BETA):
        for modulation in ("distillation", "encoder", "none"):
            model = wrap(net, beta, modulation=modulation)
            model(x, mask)
            values.append(model.passion_loss(y))
            model.unwrap()
    assert all(torch.equal(value, values[0]) for value in values)


def test_a_scaled_tensor_is_itself_and_its_gradient_is_scaled() -> None:
    leaf = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    term = leaf * 2
    coefficient = torch.tensor([0.5, 1.0, 3.0], requires_grad=True)
    found = scale_gradient(term, coefficient)
    assert found is term
    found.square().sum().backward()
    torch.testing.assert_close(leaf.grad, 8 * leaf.detach() * coefficient.detach().double())
    assert coefficient.grad is None
    constant = torch.ones(2)
    assert scale_gradient(constant, torch.ones(2)) is constant


def test_hooks_of_a_deep_copy_act_on_the_copy() -> None:
    net = MeanNet(M).double()
    model = wrap(net, modulation="encoder")
    x, mask, y = batch(MIXED, dtype=torch.float64)
    wanted = run(model, x, mask, y)
    other = copy.deepcopy(model)
    hooks = [len(p._backward_hooks or {}) for p in net.parameters()]
    set_beta(other, 2 * BETA)
    found = run(other, x, mask, y)
    assert [len(p._backward_hooks or {}) for p in net.parameters()] == hooks
    assert all(p.grad is None for p in net.parameters())
    key = "encoders.flair.0.weight"
    torch.testing.assert_close(found[key], 2 * wanted[key], rtol=1e-12, atol=0)
    assert torch.equal(run(model, x, mask, y)[key], wanted[key])


def test_a_pickled_model_says_nothing_and_acts_for_itself() -> None:
    model = wrap(MeanNet(M), modulation="encoder")
    x, mask, y = batch(MIXED)
    wanted = run(model, x, mask, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = pickle.loads(pickle.dumps(model))
    found = run(other, x, mask, y)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    other.unwrap()
    assert any(p._backward_hooks for p in model.backbone.parameters())


def test_installing_replaces_and_removing_leaves_no_hook() -> None:
    encoder = nn.Linear(2, 2)
    modulation = EncoderGradientScaling()
    for factor in (2.0, 3.0):
        modulation.install({"t1": (encoder,)}, {"t1": torch.tensor(factor)})
    encoder.weight.sum().backward()
    assert torch.equal(encoder.weight.grad, torch.full((2, 2), 3.0))  # type: ignore[arg-type]
    modulation.remove()
    assert not encoder.weight._backward_hooks


def test_frozen_encoder_parameters_get_no_hook() -> None:
    net = MeanNet(M)
    net.encoders["flair"].requires_grad_(False)
    x, mask, y = batch(MIXED)
    found = run(wrap(net, modulation="encoder"), x, mask, y)
    assert not found["encoders.flair.0.weight"].any()
    assert not net.encoders["flair"][0].weight._backward_hooks


def test_tied_encoders_cannot_be_scaled_one_by_one() -> None:
    shared = nn.Conv2d(1, 1, 1)
    with pytest.raises(ConfigError, match=r"(?s)'distillation'.*'t1' and 't2' share parameters"):
        check_untied_encoders({"t1": (shared,), "t2": (nn.Sequential(shared),), "pd": (nn.Conv2d(1, 1, 1),)})
    net = MeanNet(M)
    net.encoders["t1"][0].weight = net.encoders["flair"][0].weight
    x, mask, _ = batch(MIXED)
    with pytest.raises(ConfigError, match="'flair' and 't1' share parameters"):
        wrap(net, modulation="encoder")(x, mask)


def test_encoder_rule_needs_encoders() -> None:
    net = MeanNet(M)
    model = PassionWrapper(
        net,
        M,
        missing_rates=(0.1, 0.1, 0.1),
        spec=spec_of(net, encoders={}, students="rerun"),
        config=PassionConfig(modulation="encoder"),
    )
    x, mask, _ = batch(MIXED)
    with pytest.raises(ConfigError, match=r"needs BackboneSpec\.encoders"):
        model(x, mask)

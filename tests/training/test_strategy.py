"""What the engine does for a strategy: hooks on gradients and for how long, objects, PASSION as one of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import NAMES, MeanNet, batch, copies_gradients, set_beta, spec_of
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError, UsageError
from passion_plugin.training import ModalityFrequencies, PassionRule, Plain, Strategy
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]


class Scaled(Strategy):
    """Scales every encoder, by factors of the batch at hand."""

    name = "scaled"
    scales_encoders = True

    def factors(self, step: Any, labels: Tensor) -> dict[str, Tensor]:
        spread = step.teacher.logits.std()
        return {name: (column + 1) * spread for column, name in enumerate(self.modalities)}


def wrap(net: Any, strategy: Any = None, *, names: tuple[str, ...] = M, **options: Any) -> PassionWrapper:
    options.setdefault("spec", spec_of(net))
    return PassionWrapper(net, names, missing_rates=[0.5] * len(names), strategy=strategy, **options)


def run(model: PassionWrapper, presence: list[list[int]], seed: int = 0, *, own: bool = True) -> dict[str, Tensor]:
    """Gradients of the user's loss and the strategy's."""
    x, mask, y = batch(presence, seed=seed, dtype=next(model.parameters()).dtype)
    prediction = model(x, mask)
    loss = model.passion_loss(y)
    if own:
        loss = loss + F.cross_entropy(prediction, y)
    loss.backward()
    return copies_gradients(model.backbone)


def owner_of(parameter: str) -> str | None:
    return parameter.split(".")[1] if parameter.startswith("encoders.") else None


def without_rule(net: MeanNet, presence: list[list[int]], seed: int = 0) -> dict[str, Tensor]:
    """Gradients of the user's loss on the bare backbone."""
    bare = copy.deepcopy(net)
    x, mask, y = batch(presence, seed=seed, dtype=next(net.parameters()).dtype)
    F.cross_entropy(bare(x, mask), y).backward()
    return copies_gradients(bare)


class TestFactors:
    def test_a_rule_of_ones_own(self) -> None:
        class Shrink(Strategy):
            name = "shrink"
            scales_encoders = True

            def factors(self, step: Any, labels: Tensor) -> dict[str, Tensor]:
                return {"t1ce": torch.tensor(0.25)}

        net = MeanNet(M).double()
        wanted = without_rule(net, MIXED)
        model = wrap(net, Shrink())
        for key, gradient in run(model, MIXED).items():
            torch.testing.assert_close(gradient, wanted[key] * (0.25 if owner_of(key) == "t1ce" else 1.0))
        assert model.end_epoch().as_dict()["t1ce"]["beta"] == 0.25

    def test_accumulated_gradients_are_the_sum_of_steps(self) -> None:
        net = MeanNet(M).double()
        model = wrap(net, Scaled())
        single = [run(model, MIXED, seed) for seed in range(3)]
        for seed in range(3):
            x, mask, y = batch(MIXED, seed=seed, dtype=torch.float64)
            prediction = model(x, mask)
            (F.cross_entropy(prediction, y) + model.passion_loss(y)).backward()
        for key, gradient in copies_gradients(net).items():
            torch.testing.assert_close(gradient, sum(part[key] for part in single), rtol=1e-12, atol=1e-15)

    def test_factors_of_a_step_take_the_place_of_constant_ones(self) -> None:
        class Both(Strategy):
            name = "both"
            scales_encoders = True

            def constant_factors(self) -> dict[str, Tensor]:
                return {"flair": torch.tensor(0.5), "t1ce": torch.tensor(0.5)}

            def factors(self, step: Any, labels: Tensor) -> dict[str, Tensor]:
                return {"t1ce": torch.tensor(0.25)} if step.active.any() else {}

        for presence, wanted in (
            (MIXED, {"flair": 1.0, "t1ce": 0.25}),
            ([[1, 0, 0], [0, 1, 0]], {"flair": 0.5, "t1ce": 0.5}),
        ):
            net = MeanNet(M).double()
            plain = without_rule(net, presence)
            for key, gradient in run(wrap(net, Both()), presence).items():
                torch.testing.assert_close(gradient, plain[key] * wanted.get(owner_of(key) or "", 1.0))

    def test_constant_factors_act_before_the_target_is_known(self) -> None:
        net = MeanNet(M).double()
        model = wrap(net, config=PassionConfig(modulation="encoder"))
        set_beta(model, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
        wanted = without_rule(net, MIXED)
        x, mask, y = batch(MIXED, dtype=torch.float64)
        F.cross_entropy(model(x, mask), y).backward()
        for key, gradient in copies_gradients(net).items():
            factor = {"flair": 0.5, "t1": 2.0}.get(owner_of(key) or "", 1.0)
            torch.testing.assert_close(gradient, wanted[key] * factor, rtol=1e-12, atol=1e-15)


class TestLifeOfHooks:
    def hooks(self, net: MeanNet) -> int:
        return sum(len(p._backward_hooks or {}) for p in net.parameters())

    def prepared(self) -> tuple[MeanNet, PassionWrapper]:
        net = MeanNet(M).double()
        model = wrap(net, Scaled())
        run(model, MIXED)
        assert self.hooks(net) == 6
        return net, model

    def test_they_are_renewed_and_not_added(self) -> None:
        net, model = self.prepared()
        run(model, MIXED)
        assert self.hooks(net) == 6

    def test_the_next_forward_lets_go_of_them(self) -> None:
        net, model = self.prepared()
        x, mask, y = batch(MIXED, seed=1, dtype=torch.float64)
        F.cross_entropy(model(x, mask), y).backward()  # passion_loss is forgotten: no factor of another step acts.
        wanted = without_rule(net, MIXED, 1)
        assert all(torch.equal(gradient, wanted[key]) for key, gradient in copies_gradients(net).items())

    @pytest.mark.parametrize("how", ["unwrap", "disabled", "eval"])
    def test_nothing_is_left_outside_of_training(self, how: str) -> None:
        net, model = self.prepared()
        x, mask, _ = batch(MIXED, dtype=torch.float64)
        if how == "unwrap":
            model.unwrap()
        elif how == "disabled":
            with model.passion.disabled():
                assert self.hooks(net) == 0
        else:
            model.eval()(x, mask)
        assert self.hooks(net) == 0

    def test_a_copy_acts_for_itself(self) -> None:
        net, model = self.prepared()
        other = copy.deepcopy(model)
        found = run(other, MIXED, 2)
        assert all(p.grad is None for p in net.parameters())
        wanted = run(model, MIXED, 2)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


class TestObjects:
    @pytest.mark.parametrize("kind", [Plain, PassionRule])
    def test_an_object_serves_one_model(self, kind: type[Strategy]) -> None:
        rule = kind()
        wrap(MeanNet(M), rule)
        with pytest.raises(UsageError, match=f"{kind.__name__} belongs to another model"):
            wrap(MeanNet(M), rule)

    def test_an_object_that_was_refused_may_serve_the_next_model(self) -> None:
        rule = Scaled()
        x, mask, _ = batch([[1, 1, 1]])
        with pytest.raises(ConfigError, match=r"BackboneSpec\.encoders"):
            wrap(
                MeanNet(M),
                rule,
                spec=spec_of(MeanNet(M), encoders={}, students="rerun"),
                example_input=x,
                example_mask=mask,
            )
        wrap(MeanNet(M), rule)
        with pytest.raises(UsageError, match="belongs to another model"):
            wrap(MeanNet(M), rule)

    @pytest.mark.parametrize("wrong", ["plain", Plain, 3, {"name": "plain"}])
    def test_something_else_is_refused(self, wrong: Any) -> None:
        with pytest.raises(ConfigError, match="strategy must be an object of a subclass of Strategy"):
            wrap(MeanNet(M), wrong)

    def test_a_configuration_that_would_be_ignored_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"(?s)strategy 'plain': 2 problems.*temperature=2.0.*eta=0.5"):
            wrap(MeanNet(M), Plain(), config=PassionConfig(temperature=2.0, eta=0.5))
        wrap(MeanNet(M), Plain(), config=PassionConfig(memory="low", share_random_state=True, backend="eager"))


class TestPassionRule:
    def test_passion_as_an_object_takes_the_whole_configuration(self) -> None:
        net = MeanNet(M)
        config = PassionConfig.official(temperature=2.0, eta=0.5)
        wanted, found = [run(wrap(copy.deepcopy(net), rule, config=config), MIXED) for rule in (None, PassionRule())]
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)

    def test_the_gate_of_official_mode_opens_for_segmentation_too(self) -> None:
        net = MeanNet(M).double()
        weights: dict[str, Any] = {"pixel_weight": 0.0, "prototype_weight": 0.0, "modulation": "none"}
        found = {}
        for gate in (True, False):
            config = PassionConfig.official(gate=gate, **weights)
            found[gate] = run(wrap(copy.deepcopy(net), config=config), [[1, 1, 1]], own=False)
        keys = [key for key in found[True] if key.endswith("0.weight") and owner_of(key)]
        assert [bool(found[False][key].any()) for key in keys] == [True] * 3
        assert not all(found[True][key].any() for key in keys)

    @pytest.mark.parametrize("name", ["gate", "rarity_weights"])
    def test_a_switch_is_on_or_off(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"{name} must be True or False, got 'off'"):
            PassionConfig(**{name: "off"})  # type: ignore[arg-type]


class TestPlain:
    def prepared(self) -> Plain:
        strategy = Plain()
        strategy.prepare(M, PassionConfig(), ModalityFrequencies.of(M, missing_rates=[0.5] * len(M)))
        return strategy

    def test_it_asks_for_nothing_and_adds_nothing(self) -> None:
        net, x, mask, y = MeanNet(M), *batch(MIXED)
        model = wrap(net, Plain())
        assert self.prepared().student_inputs(mask) == []
        model(x, mask)
        assert model.passion_loss(y).item() == 0
        assert not any(p._backward_hooks for p in net.parameters())

    def test_the_report_of_an_epoch_holds_mean_factors(self) -> None:
        strategy = self.prepared()
        for values in ({"flair": 0.5, "t1ce": 1.0}, {"flair": 1.0}):
            strategy.record({name: torch.tensor(value) for name, value in values.items()})
        report = strategy.end_epoch()
        assert report.beta.tolist() == [0.75, 1.0, 1.0]
        assert report.counts.tolist() == [2, 1, 0]
        assert (report.epoch, strategy.end_epoch().epoch) == (0, 1)
        assert strategy.end_epoch().empty

    def test_there_are_no_terms_of_passion(self) -> None:
        model = wrap(MeanNet(M), Plain())
        run(model, MIXED)
        with pytest.raises(UsageError, match="'plain' has no terms of PASSION"):
            model.passion.loss_terms()

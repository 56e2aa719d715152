"""Strategies in the engine: which gradients they change, for how long, what they run, and what they keep."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import NAMES, DeepNet, MeanNet, NoMaskNet, batch, copies_gradients, spec_of
from passion_plugin import attach, get_passion_state_dict, set_passion_state_dict
from passion_plugin.baselines import AGM, OGMGE, PMR, RedCore, named_strategy, passion_variant, strategy_names
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError, InputError, UsageError
from passion_plugin.losses import segmentation_loss
from passion_plugin.training import PassionRule, Plain, Strategy
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]
RULES = ["plain", "ogm-ge", "agm", "pmr", "redcore"]


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


def count_calls(net: MeanNet) -> list[bool]:
    """Whether gradients were on in each call of the decoder, in the list that comes back."""
    calls: list[bool] = []
    net.decoder.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


class TestGradients:
    @pytest.mark.parametrize("memory", ["default", "low"])
    @pytest.mark.parametrize("rule", [lambda: OGMGE(0.8, noise=False), lambda: AGM(2.0)], ids=["ogm", "agm"])
    def test_encoders_are_scaled_by_the_factors_of_their_own_step_and_nothing_else_is(
        self, rule: Any, memory: Any
    ) -> None:
        net = MeanNet(M).double()
        strategy = rule()
        factors: list[dict[str, Tensor]] = []
        strategy.record = factors.append
        model = wrap(net, strategy, config=PassionConfig(memory=memory))
        for seed in range(3):
            wanted = without_rule(net, MIXED, seed)
            found = run(model, MIXED, seed)
            for key, gradient in wanted.items():
                name = owner_of(key)
                factor = 1.0 if name is None else factors[-1][name]
                torch.testing.assert_close(found[key], gradient * factor, rtol=1e-10, atol=1e-14)
            assert set(factors[-1]) == set(M)
            assert seed == 0 or any(abs(factor - 1) > 1e-3 for factor in factors[-1].values())
            assert factors[-1] != factors[0] or seed == 0

    @pytest.mark.parametrize("rule", [lambda: OGMGE(0.8), lambda: AGM(2.0)], ids=["ogm", "agm"])
    def test_a_modality_without_comparison_gets_no_hook(self, rule: Any) -> None:
        net = MeanNet(M).double()
        x, mask, y = batch([[1, 1, 0], [0, 0, 1]], dtype=torch.float64)
        model = wrap(net, rule())
        model(x, mask)
        model.passion_loss(y)
        hooked = {owner_of(name) for name, p in net.named_parameters() if p._backward_hooks}
        assert hooked == {"flair", "t1ce"}

    def test_noise_has_the_spread_of_the_gradient_and_stays_in_the_encoders(self) -> None:
        torch.manual_seed(0)
        net = MeanNet(M, width=64).double()
        presence = [[1, 1, 1]]
        wanted = run(wrap(copy.deepcopy(net), OGMGE(0.5, noise=False)), presence)
        plain = without_rule(net, presence)
        found = run(wrap(net, OGMGE(0.5)), presence)
        for key in wanted:
            noise = found[key] - wanted[key]
            if owner_of(key) is None:
                assert not noise.any()
            elif noise.ndim > 1:
                assert noise.std().item() == pytest.approx(plain[key].std().item(), rel=0.15)
                assert abs(noise.mean().item()) < 0.2 * noise.std().item()

    def test_noise_leaves_single_elements_alone(self) -> None:
        net = MeanNet(M[:2], width=1).double()
        found = run(wrap(copy.deepcopy(net), OGMGE(0.5), names=M[:2]), [[1, 1]])
        wanted = run(wrap(net, OGMGE(0.5, noise=False), names=M[:2]), [[1, 1]])
        for name in M[:2]:
            assert torch.equal(found[f"encoders.{name}.0.bias"], wanted[f"encoders.{name}.0.bias"])
            assert not torch.equal(found[f"encoders.{name}.0.weight"], wanted[f"encoders.{name}.0.weight"])

    def test_pmr_reaches_the_encoders_of_slow_modalities_only(self) -> None:
        net = MeanNet(M).double()
        betas: list[dict[str, Tensor]] = []
        strategy = PMR(alpha=3.0)
        strategy.record = lambda values: betas.append(dict(values)) if values else None  # type: ignore[method-assign]
        found = run(wrap(net, strategy), MIXED, own=False)
        (beta,) = betas
        assert {name for name in M if beta[name] > 0} not in (set(), set(M))
        for key, gradient in found.items():
            name = owner_of(key)
            assert gradient.any() == (name is not None and bool(beta[name] > 0)), key

    @pytest.mark.parametrize("students", ["replay", "rerun"])
    def test_pmr_adds_to_the_gradient_of_the_users_loss(self, students: Any) -> None:
        net = MeanNet(M).double()
        extra = run(wrap(copy.deepcopy(net), PMR(), spec=spec_of(net, students=students)), MIXED, own=False)
        wanted = without_rule(net, MIXED)
        found = run(wrap(net, PMR(), spec=spec_of(net, students=students)), MIXED)
        for key in wanted:
            torch.testing.assert_close(found[key], wanted[key] + extra[key], rtol=1e-10, atol=1e-14)

    def test_redcore_is_the_weighted_sum_of_true_uni_modal_runs(self) -> None:
        net = MeanNet(M).double()
        model = wrap(net, RedCore(weight=0.7))
        state = get_passion_state_dict(model)
        beta = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
        state["strategy_state"]["estimator"]["beta"] = beta
        set_passion_state_dict(model, state)
        found = run(model, MIXED, own=False)
        bare = copy.deepcopy(net)
        x, _, y = batch(MIXED, dtype=torch.float64)
        rows = {0: [0, 1], 1: [0, 1], 2: [1]}
        total = sum(
            0.7
            * beta[m]
            * segmentation_loss(bare(x[rows[m]], torch.eye(3).bool()[[m] * len(rows[m])]), y[rows[m]]).sum()
            for m in range(3)
        )
        assert isinstance(total, Tensor)
        (total / 3).backward()
        for key, gradient in copies_gradients(bare).items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-10, atol=1e-14)
            assert gradient.any()

    @pytest.mark.parametrize("rule", RULES)
    def test_a_batch_of_single_modalities_trains_as_the_bare_backbone(self, rule: str) -> None:
        net = MeanNet(M).double()
        presence = [[1, 0, 0], [0, 1, 0]]
        wanted = without_rule(net, presence)
        found = run(wrap(net, rule), presence)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)

    def test_accumulated_gradients_are_the_sum_of_steps(self) -> None:
        net = MeanNet(M).double()
        model = wrap(net, OGMGE(0.8, noise=False))
        single = [run(model, MIXED, seed) for seed in range(3)]
        for seed in range(3):
            x, mask, y = batch(MIXED, seed=seed, dtype=torch.float64)
            prediction = model(x, mask)
            (F.cross_entropy(prediction, y) + model.passion_loss(y)).backward()
        for key, gradient in copies_gradients(net).items():
            torch.testing.assert_close(gradient, sum(part[key] for part in single), rtol=1e-12, atol=1e-15)


class TestLifeOfHooks:
    def hooks(self, net: MeanNet) -> int:
        return sum(len(p._backward_hooks or {}) for p in net.parameters())

    def prepared(self) -> tuple[MeanNet, PassionWrapper]:
        net = MeanNet(M).double()
        model = wrap(net, OGMGE(0.8, noise=False))
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

    @pytest.mark.parametrize("rule", RULES)
    def test_a_model_can_be_pickled(self, rule: str) -> None:
        model = wrap(MeanNet(M), rule)
        run(model, MIXED)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other = pickle.loads(pickle.dumps(model))
        torch.manual_seed(0)
        found = run(other, MIXED, 1)
        torch.manual_seed(0)
        wanted = run(model, MIXED, 1)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


class TestPasses:
    @pytest.mark.parametrize(
        ("rule", "passes", "graded"),
        [("plain", 1, 1), ("pmr", 1, 1), ("ogm-ge", 4, 1), ("agm", 7, 1), ("redcore", 4, 4), (None, 4, 4)],
    )
    def test_only_what_the_rule_needs_is_run(self, rule: str | None, passes: int, graded: int) -> None:
        net = MeanNet(M)
        calls = count_calls(net)
        run(wrap(net, rule), [[1, 1, 1]])
        assert (len(calls), sum(calls)) == (passes, graded)

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("kind", [MeanNet, DeepNet])
    def test_the_prediction_is_that_of_the_bare_backbone(self, rule: str, kind: type[MeanNet]) -> None:
        net = kind(M, norm="batch")
        bare = copy.deepcopy(net)
        x, mask, _ = batch(MIXED)
        found, wanted = wrap(net, rule)(x, mask), bare(x, mask)
        if kind is DeepNet:
            found, wanted = found[0], wanted[0]
        assert torch.equal(found, wanted)
        assert all(torch.equal(a, b) for a, b in zip(net.buffers(), bare.buffers(), strict=True))

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("students", ["mixed", "rerun"])
    def test_images_without_a_mask_will_do(self, rule: str, students: Any) -> None:
        net = NoMaskNet(M)
        model = wrap(net, rule, spec=spec_of(net, mask_argument=None, students=students))
        x, mask, y = batch(MIXED)
        prediction = model(x, passion_presence=mask)
        (F.cross_entropy(prediction, y) + model.passion_loss(y)).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())

    def test_agm_refuses_to_compare_with_what_the_network_did_not_see(self) -> None:
        model = wrap(MeanNet(M), "agm")
        x, mask, y = batch([[1, 0, 1], [1, 1, 0]])
        model(x, mask, passion_presence=mask)
        assert model.passion_loss(y) is not None
        with pytest.raises(UsageError, match=r"'agm'.*passion_presence names more"):
            model(x, mask, passion_presence=mask | True)

    @pytest.mark.parametrize("rule", [name for name in RULES if name != "pmr"])
    @pytest.mark.parametrize("ndim", [2, 3])
    def test_regions_and_volumes_will_do(self, rule: str, ndim: int) -> None:
        net = MeanNet(M, ndim=ndim)
        model = wrap(net, rule, spec=spec_of(net, outputs="sigmoid"))
        x, mask, y = batch(MIXED, ndim=ndim)
        masks = F.one_hot(y, 3).movedim(-1, 1).float()
        F.binary_cross_entropy_with_logits(model(x, mask), masks).add(model.passion_loss(masks)).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())

    @pytest.mark.parametrize("rule", RULES)
    def test_bfloat16_autocast_will_do(self, rule: str) -> None:
        model = wrap(MeanNet(M), rule)
        x, mask, y = batch(MIXED)
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model(x, mask)
            loss = F.cross_entropy(prediction.float(), y) + model.passion_loss(y)
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.backbone.parameters())

    @pytest.mark.parametrize("rule", RULES)
    def test_any_number_of_modalities(self, rule: str) -> None:
        for names in (NAMES[:2], NAMES[:5]):
            presence = [[1] * len(names), [0] + [1] * (len(names) - 1)]
            found = run(wrap(MeanNet(names), rule, names=names), presence)
            assert all(gradient.isfinite().all() for gradient in found.values())

    def test_the_loss_inside_forward_and_attaching_work_too(self) -> None:
        net = MeanNet(M).double()
        wanted = run(wrap(copy.deepcopy(net), OGMGE(0.8, noise=False)), MIXED)
        passion = attach(
            net, modalities=M, missing_rates=[0.5] * 3, spec=spec_of(net), strategy=OGMGE(0.8, noise=False)
        )
        x, mask, y = batch(MIXED, dtype=torch.float64)
        prediction, loss = net(x, mask, passion_target=y)
        (F.cross_entropy(prediction, y) + loss).backward()
        assert all(torch.equal(gradient, wanted[key]) for key, gradient in copies_gradients(net).items())
        passion.detach()
        assert not any(p._backward_hooks for p in net.parameters())

    @pytest.mark.parametrize("rule", RULES)
    def test_a_wrong_target_is_refused(self, rule: str) -> None:
        model = wrap(MeanNet(M), rule)
        x, mask, y = batch(MIXED)
        model(x, mask)
        with pytest.raises(InputError, match="target"):
            model.passion_loss(y + 5)
        assert model.passion_loss(y).ndim == 0


class TestState:
    def train(self, model: PassionWrapper, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
        seen = []
        for step in steps:
            x, mask, y = batch(MIXED, seed=step)
            prediction = model(x, mask)
            loss = F.cross_entropy(prediction, y) + model.passion_loss(y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.detach())
            if step % 3 == 2:
                seen.append(model.end_epoch().beta)
        return seen

    @pytest.mark.parametrize(
        "rule", [*RULES, PMR(entropy_weight=0.3, entropy_epochs=1)], ids=[*map(str, RULES), "pmr with entropy"]
    )
    def test_training_that_stops_and_resumes_is_the_same_bit_for_bit(self, rule: Any, tmp_path: Path) -> None:
        net = MeanNet(M, dropout=0.2)
        whole = wrap(copy.deepcopy(net), copy.deepcopy(rule))
        torch.manual_seed(1)
        wanted = self.train(whole, torch.optim.Adam(whole.parameters(), 0.01), range(8))
        first = wrap(copy.deepcopy(net), copy.deepcopy(rule))
        optimizer = torch.optim.Adam(first.parameters(), 0.01)
        torch.manual_seed(1)
        found = self.train(first, optimizer, range(4))  # Stops in the middle of the second epoch.
        state = {
            "backbone": first.backbone.state_dict(),
            "passion": get_passion_state_dict(first),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        second = wrap(MeanNet(M, dropout=0.2), copy.deepcopy(rule))
        second.backbone.load_state_dict(state["backbone"])
        set_passion_state_dict(second, state["passion"])
        optimizer = torch.optim.Adam(second.parameters(), 0.01)
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        found += self.train(second, optimizer, range(4, 8))
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    def test_a_state_is_a_copy(self) -> None:
        model = wrap(MeanNet(M), "pmr")
        run(model, MIXED)
        state = get_passion_state_dict(model)
        before = state["strategy_state"]["_prototypes"]["t1"].clone()
        run(model, MIXED, 1)
        assert torch.equal(state["strategy_state"]["_prototypes"]["t1"], before)
        set_passion_state_dict(model, state)
        run(model, MIXED, 2)
        assert torch.equal(state["strategy_state"]["_prototypes"]["t1"], before)

    def test_states_of_other_strategies_are_refused(self) -> None:
        states = {rule: wrap(MeanNet(M), rule).addon_state_dict() for rule in (None, "plain", "agm")}
        assert "strategy" not in states[None]
        for rule, other in ((None, "plain"), ("plain", None), ("agm", "plain")):
            message = f"saved with strategy '{other or 'passion'}', this model has '{rule or 'passion'}'"
            with pytest.raises(ConfigError, match=message):
                wrap(MeanNet(M), rule).load_addon_state_dict(states[other])
        del states["agm"]["strategy_state"]["_mean"]
        with pytest.raises(ConfigError, match="lacking: '_mean'"):
            wrap(MeanNet(M), "agm").load_addon_state_dict(states["agm"])

    def test_states_hold_nothing_of_another_rule(self) -> None:
        common = {"format", "modalities", "settings", "heads"}
        assert set(wrap(MeanNet(M)).addon_state_dict()) == common | {"preference"}
        assert set(wrap(MeanNet(M), "agm").addon_state_dict()) == common | {"strategy", "strategy_state"}

    def test_states_of_former_versions_load(self) -> None:
        beta = torch.tensor([0.5, 1.0, 1.25], dtype=torch.float64)
        preference = {
            "version": 1,
            "modalities": list(M),
            "epoch": 3,
            "eta_growths": 1,
            "samples_seen": 0,
            "beta": beta,
            "sums": torch.zeros(3, dtype=torch.float64),
            "counts": torch.zeros(3, dtype=torch.float64),
        }
        state: dict[str, Any] = {"format": 1, "modalities": list(M), "preference": preference, "heads": {}}
        model = wrap(MeanNet(M))
        set_passion_state_dict(model, state)
        assert torch.equal(model.passion.preference.beta, beta)
        assert model.passion.strategy.epoch == 3
        # Other rules once saved a preference that they did not use.
        kept = {"epoch": 2, "_sums": torch.zeros(3), "_counts": torch.zeros(3)}
        other = wrap(MeanNet(M), "plain")
        set_passion_state_dict(other, {**state, "strategy": "plain", "strategy_state": kept})
        assert other.end_epoch().epoch == 2

    @pytest.mark.parametrize(("rule", "lost"), [(None, "preference"), ("plain", "strategy_state")])
    def test_a_state_that_lost_the_part_of_the_rule_is_refused(self, rule: Any, lost: str) -> None:
        model = wrap(MeanNet(M), rule)
        state = get_passion_state_dict(model)
        del state[lost]
        with pytest.raises(ConfigError, match=f"entries lacking: '{lost}'"):
            set_passion_state_dict(model, state)

    @pytest.mark.parametrize("kind", [AGM, PassionRule])
    def test_an_object_serves_one_model(self, kind: type[Strategy]) -> None:
        rule = kind()
        wrap(MeanNet(M), rule)
        with pytest.raises(UsageError, match=f"{kind.__name__} belongs to another model"):
            wrap(MeanNet(M), rule)

    def test_an_object_that_was_refused_may_serve_the_next_model(self) -> None:
        rule = OGMGE()
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

    @pytest.mark.parametrize("rule", RULES)
    def test_other_rules_keep_no_preference(self, rule: str) -> None:
        model = wrap(MeanNet(M), rule)
        assert model.passion.preference is None
        assert model.passion.preference is None
        assert not [key for key in model.state_dict() if key.startswith("preference")]

    def test_there_are_no_terms_of_passion(self) -> None:
        model = wrap(MeanNet(M), "plain")
        run(model, MIXED)
        with pytest.raises(UsageError, match="'plain' has no terms of PASSION"):
            model.passion.loss_terms()


class TestChoice:
    @pytest.mark.parametrize("name", strategy_names())
    def test_every_name_trains(self, name: str) -> None:
        model = wrap(MeanNet(M), name)
        found = run(model, MIXED)
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert set(model.end_epoch().as_dict()) == set(M)

    def test_nothing_and_passion_are_the_same_bit_for_bit(self) -> None:
        net = MeanNet(M)
        wanted, *found = [run(wrap(copy.deepcopy(net), rule), MIXED) for rule in (None, "passion", PassionRule())]
        assert all(torch.equal(gradients[key], wanted[key]) for gradients in found for key in wanted)

    def test_passion_as_an_object_takes_the_whole_configuration(self) -> None:
        net = MeanNet(M)
        config = PassionConfig.official(temperature=2.0, eta=0.5)
        wanted, found = [run(wrap(copy.deepcopy(net), rule, config=config), MIXED) for rule in (None, PassionRule())]
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)

    @pytest.mark.parametrize(
        ("variant", "parts"),
        [
            ("passion-students", set()),
            ("passion-pixel", {"pixel"}),
            ("passion-prototype", {"prototype"}),
            ("passion-both", {"pixel", "prototype"}),
            ("passion-gate", {"pixel", "gated"}),
            ("passion", {"weighted", "gated"}),
        ],
    )
    def test_variants_of_passion_add_up_from_their_parts(self, variant: str, parts: set[str]) -> None:
        net = MeanNet(M).double()
        beta = torch.tensor([0.5, 1.25, 1.5], dtype=torch.float64)
        model = wrap(net, variant)
        state = get_passion_state_dict(model)
        state["preference"]["beta"] = beta
        set_passion_state_dict(model, state)
        x, mask, y = batch(MIXED, dtype=torch.float64)
        model(x, mask)
        found = torch.autograd.grad(model.passion_loss(y), net.classifier.weight)[0]
        # Again, with the terms in hand.
        model(x, mask)
        assert model.passion._step is not None
        terms = model.passion._step.terms(y, model.passion.config, model.passion.preference)
        assert terms.gate.any()
        assert not terms.gate[terms.active].all()
        weights = {
            "pixel": 0.5 * terms.pixel,
            "weighted": 0.5 * terms.pixel * beta,
            "prototype": 0.1 * terms.prototype,
            "gated": 0.1 * terms.prototype * terms.gate,
        }
        total = terms.unimodal + sum(weights[part] for part in parts)
        wanted = torch.autograd.grad((2 * total).sum() / 3, net.classifier.weight)[
            0
        ]  # ModalityFrequencies is 1 / (1 - 0.5).
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)

    def test_official_is_the_configuration_of_that_name(self) -> None:
        assert named_strategy("passion-official") == PassionConfig.official()

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

    def test_unknown_names_get_close_matches(self) -> None:
        with pytest.raises(ConfigError, match=r"unknown strategy 'ogm_ge'. Did you mean 'ogm-ge'"):
            wrap(MeanNet(M), "ogm_ge")
        with pytest.raises(ConfigError, match=r"unknown variant 'passion-pixels'. Did you mean 'passion-pixel'"):
            passion_variant("passion-pixels")

    @pytest.mark.parametrize(("name", "tool"), [("drop", "drop_modalities"), ("even", "EvenSubsets")])
    def test_rules_of_the_data_say_where_they_are(self, name: str, tool: str) -> None:
        with pytest.raises(ConfigError, match=rf"(?s)about the data.*{tool}"):
            wrap(MeanNet(M), name)

    @pytest.mark.parametrize("wrong", [OGMGE, 3, {"name": "plain"}])
    def test_something_else_is_refused(self, wrong: Any) -> None:
        with pytest.raises(ConfigError, match="strategy must be a name or a Strategy"):
            wrap(MeanNet(M), wrong)

    def test_a_configuration_that_would_be_ignored_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"(?s)strategy 'plain': 2 problems.*temperature=2.0.*eta=0.5"):
            wrap(MeanNet(M), "plain", config=PassionConfig(temperature=2.0, eta=0.5))
        wrap(MeanNet(M), "plain", config=PassionConfig(memory="low", share_random_state=True, backend="eager"))

    def test_a_variant_keeps_what_it_does_not_decide_and_refuses_what_it_does(self) -> None:
        config = PassionConfig(temperature=2.0, prototype_weight=0.0)
        assert wrap(MeanNet(M), "passion-pixel", config=config).passion.config.temperature == 2.0
        with pytest.raises(ConfigError, match=r"prototype_weight=0.3, strategy 'passion-pixel' sets"):
            wrap(MeanNet(M), "passion-pixel", config=PassionConfig(prototype_weight=0.3))

    @pytest.mark.parametrize("rule", ["ogm-ge", "agm"])
    def test_encoders_that_share_parameters_are_refused(self, rule: str) -> None:
        net = MeanNet(M)
        net.encoders["t1"][0].weight = net.encoders["flair"][0].weight
        x, mask, _ = batch(MIXED)
        with pytest.raises(ConfigError, match=rf"strategy '{rule}' needs .* 'flair' and 't1' share parameters"):
            wrap(net, rule)(x, mask)

    @pytest.mark.parametrize("rule", ["ogm-ge", "agm", "pmr"])
    def test_encoders_must_be_known(self, rule: str) -> None:
        net = MeanNet(M)
        x, mask, _ = batch(MIXED)
        with pytest.raises(ConfigError, match=r"needs BackboneSpec\.encoders"):
            wrap(net, rule, spec=spec_of(net, encoders={}, students="rerun"))(x, mask)

    def test_heads_are_trained_or_not_scored(self) -> None:
        x, mask, _ = batch(MIXED)
        for rule in ("ogm-ge", "agm"):
            net = MeanNet(M)
            options: dict[str, Any] = {"spec": spec_of(net, students="heads")}
            with pytest.raises(ConfigError, match="would score without ever training them"):
                wrap(net, rule, example_input=x, example_mask=mask, **options)
        for rule, heads in (("plain", 0), ("pmr", 0), ("redcore", 3)):
            net = MeanNet(M)
            options = {"spec": spec_of(net, students="heads"), "example_input": x, "example_mask": mask}
            model = wrap(net, rule, **options)
            assert len(model.passion.heads) == heads
            run(model, MIXED)
            assert all(p.grad is not None for p in model.passion.heads.parameters())

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

    def test_factors_of_a_step_take_the_place_of_standing_ones(self) -> None:
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

    def test_standing_factors_act_before_the_target_is_known(self) -> None:
        net = MeanNet(M).double()
        model = wrap(net, config=PassionConfig(modulation="encoder"))
        state = get_passion_state_dict(model)
        state["preference"]["beta"] = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
        set_passion_state_dict(model, state)
        wanted = without_rule(net, MIXED)
        x, mask, y = batch(MIXED, dtype=torch.float64)
        F.cross_entropy(model(x, mask), y).backward()
        for key, gradient in copies_gradients(net).items():
            factor = {"flair": 0.5, "t1": 2.0}.get(owner_of(key) or "", 1.0)
            torch.testing.assert_close(gradient, wanted[key] * factor, rtol=1e-12, atol=1e-15)

    def test_plain_by_object_and_by_name(self) -> None:
        assert isinstance(wrap(MeanNet(M), Plain()).passion.strategy, type(named_strategy("plain")))

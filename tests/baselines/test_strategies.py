"""The baselines in the engine: which gradients they change, what they run, what they keep, and their names."""

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

from models import NAMES, DeepNet, MeanNet, NoMaskNet, batch, copies_gradients, options_of, set_beta, spec_of
from passion_plugin import attach, get_passion_state_dict, set_passion_state_dict
from passion_plugin.baselines import AGM, OGMGE, PMR, RedCore, named_strategy, strategy_names
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError, InputError, UsageError
from passion_plugin.losses import segmentation_loss
from passion_plugin.training import PassionRule, Plain
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]
RULES = ["plain", "ogm-ge", "agm", "pmr", "redcore"]


def wrap(
    net: Any, rule: Any = None, *, names: tuple[str, ...] = M, config: PassionConfig | None = None, **options: Any
) -> PassionWrapper:
    """Wrap with a rule by its name or as an object; None is PASSION."""
    named = rule is None or isinstance(rule, str)
    options |= options_of(rule, config) if named else {"strategy": rule, "config": config}
    options.setdefault("spec", spec_of(net))
    return PassionWrapper(net, names, missing_rates=[0.5] * len(names), **options)


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
        beta = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
        state = model.passion.strategy.state_dict()
        model.passion.strategy.load_state_dict({**state, "beta": beta})
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
        state = model.passion.strategy.state_dict()
        before = state["_prototypes"]["t1"].clone()
        run(model, MIXED, 1)
        assert torch.equal(state["_prototypes"]["t1"], before)
        model.passion.strategy.load_state_dict(state)
        run(model, MIXED, 2)
        assert torch.equal(state["_prototypes"]["t1"], before)

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

    @pytest.mark.parametrize("rule", RULES)
    def test_other_rules_keep_no_preference(self, rule: str) -> None:
        model = wrap(MeanNet(M), rule)
        assert model.passion.preference is None
        assert not [key for key in model.state_dict() if "preference" in key]


class TestNames:
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
        set_beta(model, beta)
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
        # The rarity weight is 1 / (1 - 0.5).
        wanted = torch.autograd.grad((2 * total).sum() / 3, net.classifier.weight)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)

    def test_official_is_the_configuration_of_that_name(self) -> None:
        strategy, config = named_strategy("passion-official")
        assert isinstance(strategy, PassionRule)
        assert config == PassionConfig.official()

    @pytest.mark.parametrize(("name", "meant"), [("ogm_ge", "ogm-ge"), ("passion-pixels", "passion-pixel")])
    def test_unknown_names_get_close_matches(self, name: str, meant: str) -> None:
        with pytest.raises(ConfigError, match=rf"unknown strategy '{name}'. Did you mean '{meant}'"):
            named_strategy(name)

    def test_a_name_gives_a_new_object_each_time(self) -> None:
        assert isinstance(named_strategy("plain")[0], Plain)
        assert named_strategy("agm")[0] is not named_strategy("agm")[0]

    def test_a_variant_keeps_what_it_does_not_decide_and_refuses_what_it_does(self) -> None:
        config = PassionConfig(temperature=2.0, prototype_weight=0.0)
        assert wrap(MeanNet(M), "passion-pixel", config=config).passion.config.temperature == 2.0
        with pytest.raises(ConfigError, match=r"prototype_weight=0.3, strategy 'passion-pixel' sets"):
            wrap(MeanNet(M), "passion-pixel", config=PassionConfig(prototype_weight=0.3))


class TestBackbones:
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

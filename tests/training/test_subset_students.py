"""Students of several modalities: which subsets are drawn, what their terms are, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from models import NAMES, DeepNet, MeanNet, batch, spec_of
from passion_plugin.backbone._student_inputs import StudentInput, random_subsets
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError, UsageError
from passion_plugin.losses import pixel_distillation, prototype_distillation, segmentation_loss
from passion_plugin.training import PassionRule, Plain
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:4]
RATES = (0.2, 0.5, 0.75, 0.6)
PRESENCE = [[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0]]
ON = PassionConfig(subset_students=True)
OFF = PassionConfig()


def wrap(net: MeanNet, config: PassionConfig, **more: Any) -> PassionWrapper:
    options = {"missing_rates": RATES[: len(net.names)], "spec": spec_of(net), **more}
    return PassionWrapper(net, net.names, config=config, **options)


def coarse_and_fine(network: DeepNet, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    fused = network.fuse(network.encode(x), mask)
    return network.classifier(network.decoder(fused)), network.coarse(F.avg_pool2d(fused, 2))


def net() -> MeanNet:
    torch.manual_seed(1)
    return MeanNet(M).double()


def loss_of(model: PassionWrapper, presence: Any = PRESENCE, seed: int = 5) -> Tensor:
    x, mask, y = batch(presence, dtype=torch.float64)
    torch.manual_seed(seed)
    model(x, mask)
    return model.passion_loss(y)


def slow_terms(network: MeanNet, config: PassionConfig, presence: Any = PRESENCE, seed: int = 5) -> Tensor:
    """What the students of several modalities add, from passes through the bare network."""
    x, mask, y = batch(presence, dtype=torch.float64)
    torch.manual_seed(seed)
    subsets = random_subsets(mask)
    rows = (mask.sum(1) > 2).nonzero().flatten().tolist()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        own = slice(row, row + 1)
        features = network.decoder(network.fuse(network.encode(x[own]), subsets[own]))
        target = network.decoder(network.fuse(network.encode(x[own]), mask[own])).detach()
        logits, teacher = network.classifier(features), network.classifier(target).detach()
        total = total + config.pixel_weight * pixel_distillation(logits, teacher, config.temperature)[0]
        total = total + config.prototype_weight * prototype_distillation(features, target, y[own], 3)[0][0]
        total = total + config.unimodal_weight * segmentation_loss(logits, y[own])[0]
    return total / len(x)


class TestDrawing:
    @given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5).filter(any), min_size=1, max_size=6), st.integers())
    def test_two_at_least_and_not_all_of_what_is_there(self, presence: list[list[bool]], seed: int) -> None:
        there = torch.tensor(presence)
        torch.manual_seed(seed % 2**32)
        drawn = random_subsets(there)
        assert not (drawn & ~there).any()
        for size, count in zip(drawn.sum(1).tolist(), there.sum(1).tolist(), strict=True):
            assert 2 <= size < count if count > 2 else size == 0

    def test_every_subset_is_as_likely_as_any_other(self) -> None:
        torch.manual_seed(0)
        drawn = random_subsets(torch.ones(4000, 4, dtype=torch.bool))
        found = Counter(tuple(row) for row in drawn.int().tolist())
        assert len(found) == 6 + 4
        # Binomial with n = 4000 and p = 1/10: five standard deviations are 95.
        assert all(abs(count - 400) < 95 for count in found.values())

    def test_a_segment_for_each_subset_in_use(self) -> None:
        where = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 1, 0]], dtype=torch.bool)
        found = {
            student_input.modalities: student_input.rows.tolist()
            for student_input in StudentInput.subsets(NAMES[:3], where)
        }
        assert found == {NAMES[:2]: [0, 3], NAMES[1:3]: [2]}
        assert StudentInput.subsets(NAMES[:3], torch.zeros(2, 3, dtype=torch.bool)) == []


class TestLoss:
    # Of a complete batch every row has a student, in another order than that of the subsets.
    @pytest.mark.parametrize("presence", [PRESENCE, [[1, 1, 1, 1]] * 6], ids=["some", "complete"])
    @pytest.mark.parametrize("students", ["replay", "mixed", "rerun"])
    def test_it_adds_the_terms_of_one_subset_of_each_sample_that_has_three(self, students: str, presence: Any) -> None:
        weights = {"pixel_weight": 0.7, "prototype_weight": 0.3, "unimodal_weight": 2.0}
        network = net()
        parameters = list(network.parameters())
        results = []
        for on in (False, True):
            config = PassionConfig(subset_students=on, **weights)
            model = wrap(network, config, spec=spec_of(network, students=students))
            loss = loss_of(model, presence)
            results.append((loss.detach(), torch.autograd.grad(loss, parameters)))
            model.unwrap()
        wanted = slow_terms(network, config, presence)
        torch.testing.assert_close(results[1][0] - results[0][0], wanted.detach())
        for one, two, slow in zip(results[0][1], results[1][1], torch.autograd.grad(wanted, parameters), strict=True):
            torch.testing.assert_close(two - one, slow, rtol=1e-8, atol=1e-12)

    def test_coarse_outputs_of_a_complete_batch_are_compared_row_by_row(self) -> None:
        torch.manual_seed(1)
        network = DeepNet(M).double()
        model = wrap(network, ON)
        presence = [[1, 1, 1, 1]] * 6
        loss_of(model, presence)
        terms = model.passion.loss_terms()
        assert terms.subset is not None
        x, mask, _ = batch(presence, dtype=torch.float64)
        torch.manual_seed(5)
        subsets = random_subsets(mask)
        with torch.no_grad():
            (zs, cs), (zt, ct) = (coarse_and_fine(network, x, seen) for seen in (subsets, mask))
        wanted = pixel_distillation(zs, zt, 4.0) + pixel_distillation(cs, ct, 4.0) / 2
        torch.testing.assert_close(terms.subset.pixel[:, 0], wanted)

    def test_regions_have_them_too(self) -> None:
        network = net()
        x, mask, y = batch(PRESENCE, dtype=torch.float64)
        regions = torch.stack([y > 0, y == 1, y != 1], dim=1)
        model = wrap(network, ON, spec=spec_of(network, outputs="sigmoid"))
        torch.manual_seed(5)
        model(x, mask)
        model.passion_loss(regions)
        torch.manual_seed(5)
        subsets = random_subsets(mask)[:2]
        terms = model.passion.loss_terms()
        assert terms.subset is not None
        with torch.no_grad():
            wanted = segmentation_loss(network(x[:2], subsets), regions[:2], outputs="sigmoid")
        torch.testing.assert_close(terms.subset.unimodal[:2, 0], wanted)

    def test_terms_are_float32_under_autocast(self) -> None:
        torch.manual_seed(1)
        model = wrap(MeanNet(M), ON)
        x, mask, y = batch(PRESENCE)
        with torch.autocast("cpu", torch.bfloat16):
            model(x, mask)
            loss = model.passion_loss(y)
        loss.backward()
        terms = model.passion.loss_terms().subset
        assert terms is not None
        assert loss.dtype == terms.pixel.dtype == terms.prototype.dtype == torch.float32

    def test_the_preference_and_the_terms_of_single_modalities_do_not_change(self) -> None:
        one, two = wrap(net(), OFF), wrap(net(), ON)
        loss_of(one), loss_of(two)
        plain, found = one.passion.loss_terms(), two.passion.loss_terms()
        for name in ("pixel", "prototype", "distance", "unimodal", "gate", "active"):
            assert torch.equal(getattr(found, name), getattr(plain, name)), name
        assert plain.subset is None
        assert torch.equal(one.end_epoch().beta, two.end_epoch().beta)

    def test_terms_and_metrics_tell_of_them(self) -> None:
        model = wrap(net(), ON)
        loss_of(model)
        terms = model.passion.loss_terms()
        assert terms.subset is not None
        assert terms.subset.active.flatten().tolist() == [True, True, False, False]
        for name in ("pixel", "prototype", "unimodal"):
            assert torch.equal(getattr(terms.subset, name) > 0, terms.subset.active), name
        wanted = float(terms.subset.pixel.sum() / 2)
        metrics = model.passion.metrics()
        assert metrics["pixel/subset"] == pytest.approx(wanted)
        assert "gate/subset" not in metrics

    def test_without_a_sample_of_three_modalities_nothing_is_added(self) -> None:
        presence = [[1, 1, 0, 0], [0, 0, 1, 0]]
        assert torch.equal(loss_of(wrap(net(), ON), presence), loss_of(wrap(net(), OFF), presence))

    def test_during_warm_up_only_their_segmentation_loss_counts(self) -> None:
        network = net()
        model = wrap(network, PassionConfig(subset_students=True, warmup_epochs=1))
        with_subsets = loss_of(model)
        model.unwrap()
        without = loss_of(wrap(network, PassionConfig(warmup_epochs=1)))
        only = PassionConfig(pixel_weight=0.0, prototype_weight=0.0)
        torch.testing.assert_close(with_subsets - without, slow_terms(network, only))

    def test_they_take_the_users_own_loss_all_at_once(self) -> None:
        seen = []

        def own(logits: Tensor, labels: Tensor) -> Tensor:
            seen.append(len(logits))
            return F.cross_entropy(logits, labels)

        loss_of(wrap(net(), ON, strategy=PassionRule(unimodal_loss=own)))
        # Three samples have each of the first two modalities beside another, one the third, two the fourth.
        assert seen == [3, 3, 1, 2, 2]

    @pytest.mark.parametrize("how", [{"memory": "low"}])
    def test_how_passes_run_does_not_matter(self, how: dict[str, Any]) -> None:
        network, losses, gradients = net(), [], []
        for more in ({}, how):
            config = PassionConfig(subset_students=True, **more)
            model = wrap(network, config, spec=spec_of(network))
            losses.append(loss_of(model))
            gradients.append(torch.autograd.grad(losses[-1], list(network.parameters())))
            model.unwrap()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
        for one, two in zip(*gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)

    def test_the_random_state_decides_and_repeats_them(self) -> None:
        model = wrap(net(), ON)
        first, again, other = (loss_of(model, seed=seed).detach() for seed in (5, 5, 6))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


class TestRefused:
    def test_two_modalities_have_no_subset_of_two(self) -> None:
        with pytest.raises(ConfigError, match="needs three modalities"):
            wrap(MeanNet(M[:2]), ON)

    def test_the_published_code_has_none(self) -> None:
        with pytest.raises(ConfigError, match="goes with mode='default'"):
            PassionConfig.official(subset_students=True)

    def test_heads_cannot(self) -> None:
        network = MeanNet(M[:3])
        spec = spec_of(network, students="heads")
        x, mask, _ = batch([[1, 1, 1]])
        with pytest.raises(ConfigError, match="heads on single encoders"):
            PassionWrapper(
                network, M[:3], missing_rates=RATES[:3], spec=spec, config=ON, example_input=x, example_mask=mask
            )

    def test_processes_that_wait_for_each_other_in_a_pass_would_hang(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("passion_plugin.training._engine.has_collective_forward", lambda backbone: True)
        x, mask, _ = batch(PRESENCE, dtype=torch.float64)
        with pytest.raises(UsageError, match="sharded or has SyncBatchNorm layers: leave subset_students out"):
            wrap(net(), ON)(x, mask)

    def test_a_modality_of_that_name(self) -> None:
        with pytest.raises(ConfigError, match="rename that"):
            wrap(MeanNet(("subset", "t1", "t2")), ON)

    @pytest.mark.parametrize("config", [OFF, ON], ids=["off", "on"])
    def test_a_rule_of_ones_own_with_more_of_them(self, config: PassionConfig) -> None:
        class Pairs(PassionRule):
            def student_inputs(self, presence: Tensor) -> list[StudentInput]:
                return [*super().student_inputs(presence), StudentInput((M[0], M[1]), torch.tensor([0, 1]))]

        error = UsageError if config.subset_students else ValueError
        with pytest.raises(error):
            loss_of(wrap(net(), config, strategy=Pairs()))

    def test_other_rules_have_none(self) -> None:
        with pytest.raises(ConfigError, match="subset_students=True is about PASSION"):
            wrap(net(), ON, strategy=Plain())

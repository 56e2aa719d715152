"""Variations of PASSION that experiments judge: each against its equation, voxel by voxel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.experiment.idea_terms import balanced_divergence, gated_gaps
from examples.experiment.ideas import IDEAS, PassionVariation
from examples.experiment.recipes import parse_recipe
from models import NAMES, MeanNet, batch, spec_of
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError
from passion_plugin.losses import pixel_distillation, prototype_distillation, segmentation_loss
from passion_plugin.losses._common import class_masks
from passion_plugin.losses._prototype import similarity_maps
from passion_plugin.training import LossTerms
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
RATES = (0.2, 0.5, 0.75)
PRESENCE = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]
T = 4.0


def wrap(net: MeanNet, config: PassionConfig | None = None, **ideas: Any) -> PassionWrapper:
    rule = PassionVariation(**ideas)
    return PassionWrapper(net, M, missing_rates=RATES, spec=spec_of(net), strategy=rule, config=config)


def terms(model: PassionWrapper, seed: int = 0) -> LossTerms:
    x, mask, y = batch(PRESENCE, dtype=torch.float64, seed=seed)
    model(x, mask)
    model.passion_loss(y).backward()
    return model.passion.strategy.loss_terms()


def net() -> MeanNet:
    torch.manual_seed(1)
    return MeanNet(M).double()


def logits_and_labels() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(3, (2, 2, 5), generator=generator)
    labels[0][labels[0] == 2] = 0  # a class that the first sample lacks
    return student, teacher, labels


def divergence_at(student: Tensor, teacher: Tensor) -> float:
    ours, theirs = (z / T - (z / T).logsumexp(0) for z in (student, teacher))
    return float((theirs.exp() * (theirs - ours)).sum())


class TestPixel:
    def test_classes_count_alike_whatever_their_size(self) -> None:
        student, teacher, labels = logits_and_labels()
        wanted = []
        for s, t, y in zip(student.flatten(2), teacher.flatten(2), labels.flatten(1), strict=True):
            by_class: dict[int, list[float]] = {}
            for v, k in enumerate(y.tolist()):
                by_class.setdefault(k, []).append(divergence_at(s[:, v], t[:, v]))
            means = [sum(values) / len(values) for values in by_class.values()]
            wanted.append(T**2 / 3 * sum(means) / len(means))
        assert balanced_divergence(student, teacher, labels, T).tolist() == pytest.approx(wanted, rel=1e-12)

    def test_with_one_class_it_is_the_divergence_of_the_library(self) -> None:
        student, teacher, labels = logits_and_labels()
        found = balanced_divergence(student, teacher, torch.zeros_like(labels), T)
        torch.testing.assert_close(found, pixel_distillation(student, teacher, T))

    def test_it_takes_the_place_of_the_term_and_of_no_other(self) -> None:
        found, plain = terms(wrap(net(), pixel="balanced")), terms(wrap(net()))
        assert not torch.equal(found.pixel, plain.pixel)
        assert torch.equal(found.pixel > 0, plain.active)
        for name in ("prototype", "distance", "unimodal", "gate"):
            assert torch.equal(getattr(found, name), getattr(plain, name)), name


class TestGates:
    GAPS = torch.tensor(
        # modality 0, class 0 and 1; modality 1; modality 2 has no student. Two voxels, the third class is absent.
        [[[[0.3, 0.1], [0.0, 0.2], [9.0, 9.0]], [[0.1, 0.1], [0.4, 0.4], [9.0, 9.0]], [[0.0] * 2] * 3]]
    )
    ACTIVE = torch.tensor([[True, True, False]])
    COUNTED = torch.tensor([[True, True, False]])

    def test_by_class(self) -> None:
        # Class 0: sums 0.4 and 0.2, so modality 0 lags behind; class 1: 0.2 and 0.8, modality 1 does.
        wanted = [[(0.09 + 0.01) / 4, (0.16 + 0.16) / 4, 0.0]]
        found = gated_gaps(self.GAPS, self.ACTIVE, self.COUNTED, by_class=True)
        torch.testing.assert_close(found, torch.tensor(wanted))

    def test_by_voxel(self) -> None:
        # Voxel 0: sums 0.3 and 0.5; voxel 1: 0.3 and 0.5. Modality 1 lags behind in both.
        wanted = [[0.0, (0.01 + 0.01 + 0.16 + 0.16) / 4, 0.0]]
        found = gated_gaps(self.GAPS, self.ACTIVE, self.COUNTED, by_class=False)
        torch.testing.assert_close(found, torch.tensor(wanted))

    def test_of_a_single_modality_nothing_lags_behind(self) -> None:
        gaps = torch.rand(1, 3, 2, 4) * torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
        alone = torch.tensor([[True, False, False]])
        for by_class in (True, False):
            assert not gated_gaps(gaps, alone, torch.ones(1, 2, dtype=torch.bool), by_class=by_class).any()

    @pytest.mark.parametrize("gate_by", ["class", "voxel"])
    def test_the_term_is_part_of_the_ungated_one(self, gate_by: str) -> None:
        found, plain = terms(wrap(net(), gate_by=gate_by)), terms(wrap(net()))
        assert (found.prototype <= plain.prototype * (1 + 1e-9)).all()
        assert found.prototype.any()
        assert (found.prototype < plain.prototype).any()
        for name in ("pixel", "distance", "unimodal"):
            assert torch.equal(getattr(found, name), getattr(plain, name)), name

    def test_gaps_are_those_of_the_library(self) -> None:
        student, teacher, labels = logits_and_labels()
        masks = class_masks(labels, 3, student.ndim)
        gaps = similarity_maps(student, masks) - similarity_maps(teacher, masks)
        squares = torch.where(masks.any(-1, keepdim=True), gaps.square(), 0).mean(-1).sum(1) / masks.any(-1).sum(1)
        torch.testing.assert_close(squares, prototype_distillation(student, teacher, labels, 3)[0])


def test_a_lone_sample_has_the_segmentation_loss_of_its_only_prediction() -> None:
    network = net()
    found, plain = terms(wrap(network, lone=True)), terms(wrap(network))
    x, mask, y = batch(PRESENCE, dtype=torch.float64)
    torch.testing.assert_close(found.unimodal[2, 2], segmentation_loss(network(x, mask), y)[2])
    assert plain.unimodal[2, 2] == 0
    assert torch.equal(found.supervised, mask)
    for name in ("pixel", "prototype", "distance"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name))
        assert getattr(found, name)[2, 2] == 0, name
    torch.testing.assert_close(found.unimodal[:2], plain.unimodal[:2])


def test_no_rarity_weight_is_above_the_cap() -> None:
    assert wrap(net(), rarity_cap=2).passion.strategy.frequencies.weights == (1.25, 2.0, 2.0)
    assert wrap(net()).passion.strategy.frequencies.weights == (1.25, 2.0, 4.0)


class TestAveragedTeacher:
    def test_it_follows_the_weights_at_a_distance(self) -> None:
        model = wrap(net(), teacher_decay=0.5)
        first = [p.detach().clone() for p in model.parameters()]
        terms(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1
        moved = [p.detach().clone() for p in model.parameters()]
        terms(model, seed=1)
        # Decays 2/11 (no effect: the average began there) and 3/12, both below the 0.5 asked for.
        for average, before, now in zip(model.passion.strategy._average, first, moved, strict=True):
            torch.testing.assert_close(average, 0.25 * before + 0.75 * now)
        for parameter, now in zip(model.parameters(), moved, strict=True):
            assert torch.equal(parameter, now)

    def test_without_a_change_of_weights_it_is_the_usual_teacher(self) -> None:
        found, plain = terms(wrap(net(), teacher_decay=0.9)), terms(wrap(net()))
        for name in ("pixel", "prototype", "distance", "unimodal"):
            assert torch.equal(getattr(found, name), getattr(plain, name)), name

    def test_running_statistics_are_those_of_the_trained_weights(self) -> None:
        torch.manual_seed(1)
        found, plain = MeanNet(M, norm="batch").double(), MeanNet(M, norm="batch").double()
        plain.load_state_dict(found.state_dict())
        terms(wrap(found, teacher_decay=0.9)), terms(wrap(plain))
        for one, two in zip(found.buffers(), plain.buffers(), strict=True):
            assert torch.equal(one, two)

    def test_gradients_are_those_of_the_trained_weights(self) -> None:
        one, two = wrap(net(), teacher_decay=0.9), wrap(net())
        terms(one), terms(two)
        for found, wanted in zip(one.parameters(), two.parameters(), strict=True):
            assert found.grad is not None
            assert torch.equal(found.grad, wanted.grad)


class TestChoice:
    def test_none_of_them_is_passion_itself(self) -> None:
        found, plain = terms(wrap(net(), **IDEAS)), terms(wrap(net()))
        for name in ("pixel", "prototype", "distance", "unimodal"):
            assert torch.equal(getattr(found, name), getattr(plain, name)), name

    def test_recipes_name_them(self) -> None:
        recipe = parse_recipe("passion:pixel=balanced,teacher_decay=0.99,temperature=2")
        assert recipe.parameters["pixel"] == "balanced"
        assert recipe.parameters["temperature"] == 2
        assert "pixel" not in parse_recipe("passion:temperature=2").parameters

    @pytest.mark.parametrize(
        ("ideas", "message"),
        [
            ({"pixel": "median"}, "pixel must be one of"),
            ({"gate_by": "slice"}, "gate_by must be one of"),
            ({"rarity_cap": 0.5}, "rarity_cap must be 1 or more"),
            ({"lone": 0}, "lone must be True or False"),
            ({"teacher_decay": 1.0}, r"teacher_decay must be in \[0, 1\)"),
            ({"teacher_decay": math.nan}, "teacher_decay must be in"),
        ],
    )
    def test_mistakes_are_named(self, ideas: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            PassionVariation(**ideas)

    @pytest.mark.parametrize(
        ("ideas", "config", "message"),
        [
            ({"pixel": "balanced"}, {"subset_students": True}, "pixel is about students of one modality"),
            ({"gate_by": "class"}, {"subset_students": True}, "gate_by is about students of one modality"),
            ({"gate_by": "class"}, {"gate": False}, "gate_by='class' changes nothing beside gate=False"),
            ({"rarity_cap": 2}, {"rarity_weights": False}, "rarity_cap=2 changes nothing beside rarity_weights=False"),
            ({"lone": True}, {"mode": "official"}, "lone=True goes with the default mode"),
        ],
    )
    def test_what_does_not_go_together_is_named(
        self, ideas: dict[str, Any], config: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            wrap(net(), PassionConfig(**config), **ideas)

    def test_others_go_with_students_of_several_modalities(self) -> None:
        model = wrap(net(), PassionConfig(subset_students=True), lone=True, rarity_cap=2, teacher_decay=0.9)
        found = terms(model)
        assert found.subset is not None
        assert found.subset.active.flatten().tolist() == [False, True, False]
        assert torch.equal(found.supervised, torch.tensor(PRESENCE, dtype=torch.bool))

    def test_a_state_of_another_idea_is_refused(self) -> None:
        state = wrap(net(), pixel="balanced").addon_state_dict()
        with pytest.raises(ConfigError, match="pixel: found 'balanced', expected 'mean'"):
            wrap(net(), gate_by="class").load_addon_state_dict(state)

    @pytest.mark.parametrize("ideas", [{"pixel": "balanced"}, {"gate_by": "class"}, {"gate_by": "voxel"}], ids=str)
    def test_terms_keep_their_digits_under_autocast(self, ideas: dict[str, Any]) -> None:
        torch.manual_seed(1)
        model = wrap(MeanNet(M), **ideas)
        x, mask, y = batch(PRESENCE)
        with torch.autocast("cpu", torch.bfloat16):
            model(x, mask)
            loss = model.passion_loss(y)
        assert loss.dtype == torch.float32
        found = model.passion.loss_terms()
        assert found.pixel.dtype == found.prototype.dtype == torch.float32

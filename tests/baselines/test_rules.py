"""Each balancing rule against its equation, on cases computed by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import NAMES, MeanNet, batch, spec_of
from passion_plugin.backbone import Prediction, Student, active_students
from passion_plugin.baselines import AGM, OGMGE, PMR, RedCore
from passion_plugin.baselines._gradient_modulation import shapley_values
from passion_plugin.baselines._scores import (
    prediction_entropy,
    ratio_to_others,
    true_class_loss,
    true_class_probability,
)
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError
from passion_plugin.losses import segmentation_loss
from passion_plugin.training import ModalityFrequencies, Strategy
from passion_plugin.wrapper import PassionWrapper

AB, ABC = ("a", "b"), ("a", "b", "c")
EMPTY = torch.empty(0)


def logits_of(*probabilities: float) -> Tensor:
    """Logits (1, 2, V) in which class 1 has the given probability in each voxel."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([1 - p, p]).log().unsqueeze(0)


def step_of(
    modalities: tuple[str, ...],
    presence: list[list[int]],
    students: dict[tuple[str, ...], Tensor],
    full: Tensor | None = None,
    features: dict[str, list[Tensor]] | None = None,
    outputs: str = "softmax",
) -> Any:
    """A training step that already has its predictions; rows of a student are those that have more than its subset."""
    table = torch.tensor(presence, dtype=torch.bool)
    made = []
    for subset, logits in students.items():
        columns = [modalities.index(name) for name in subset]
        rows = (table[:, columns].all(1) & (table.sum(1) > len(subset))).nonzero().flatten()
        assert len(rows) == len(logits)
        made.append(Student(subset, rows, Prediction(logits, EMPTY)))
    teacher = torch.zeros(len(table), 2, 4, dtype=torch.float64) if full is None else full
    adapter = SimpleNamespace(modalities=modalities, spec=SimpleNamespace(outputs=outputs))
    return SimpleNamespace(
        adapter=adapter,
        presence=table,
        active=active_students(table),
        students=made,
        teacher=Prediction(teacher, EMPTY),
        features=features or {},
    )


def ready(strategy: Strategy, modalities: tuple[str, ...]) -> Any:
    strategy.prepare(
        modalities, PassionConfig(), ModalityFrequencies.of(modalities, missing_rates=[0.5] * len(modalities))
    )
    return strategy


class TestScores:
    labels = torch.tensor([[1, 0, 0, 0]])

    def test_every_class_of_a_sample_weighs_the_same(self) -> None:
        logits = logits_of(0.2, 0.1, 0.3, 0.2)
        # Class 1 has one voxel with 0.2; class 0 has three with 0.9, 0.7 and 0.8.
        found = true_class_probability(logits, self.labels, "softmax")
        torch.testing.assert_close(found, torch.tensor([(0.2 + 0.8) / 2], dtype=torch.float64))
        wanted = -(math.log(0.2) + (math.log(0.9) + math.log(0.7) + math.log(0.8)) / 3) / 2
        torch.testing.assert_close(
            true_class_loss(logits, self.labels, "softmax"), torch.tensor([wanted], dtype=torch.float64)
        )

    def test_a_class_that_the_sample_lacks_does_not_count(self) -> None:
        found = true_class_probability(logits_of(0.2, 0.4), torch.tensor([[0, 0]]), "softmax")
        torch.testing.assert_close(found, torch.tensor([0.7], dtype=torch.float64))

    def test_regions_count_inside_and_outside(self) -> None:
        inside = torch.tensor([[[0.9, 0.6], [0.5, 0.2]]], dtype=torch.float64)
        masks = torch.tensor([[[1, 0], [0, 0]]])
        # Region 0: inside 0.9, outside 0.4. Region 1: never inside; outside (0.5 + 0.8) / 2.
        found = true_class_probability(inside.logit(), masks, "sigmoid")
        torch.testing.assert_close(found, torch.tensor([(0.9 + 0.4 + 0.65) / 3], dtype=torch.float64))

    def test_labels_are_brought_to_the_resolution_of_the_logits(self) -> None:
        labels = torch.tensor([[[0, 0, 1, 1]] * 2])
        logits = logits_of(0.1, 0.6).unsqueeze(2)
        found = true_class_probability(logits, labels, "softmax")
        torch.testing.assert_close(found, torch.tensor([(0.9 + 0.6) / 2], dtype=torch.float64))

    def test_half_precision_is_computed_in_single(self) -> None:
        assert true_class_probability(logits_of(0.5).half(), torch.tensor([[1]]), "softmax").dtype == torch.float32

    def test_the_ratio_of_two_complete_modalities_is_that_of_their_sums(self) -> None:
        scores = torch.rand(5, 2, dtype=torch.float64)
        found = ratio_to_others(scores, torch.ones(5, 2, dtype=torch.bool))
        torch.testing.assert_close(found[0], scores[:, 0].sum() / scores[:, 1].sum())
        torch.testing.assert_close(found[1], 1 / found[0])

    def test_what_a_sample_lacks_has_no_influence_on_the_ratio(self) -> None:
        scores = torch.tensor([[0.6, 0.3, math.nan], [0.4, math.nan, 0.8], [math.nan, 0.9, math.nan]])
        active = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
        found = ratio_to_others(scores, active)
        torch.testing.assert_close(found, torch.tensor([1.0 / 1.1, 0.3 / 0.6, 0.8 / 0.4]))


class TestOGMGE:
    def test_the_modality_ahead_is_held_back_by_equation_10(self) -> None:
        step = step_of(AB, [[1, 1]], {("a",): logits_of(0.8), ("b",): logits_of(0.4)})
        found = ready(OGMGE(alpha=0.3), AB).factors(step, torch.tensor([[1]]))
        assert found["a"].item() == pytest.approx(1 - math.tanh(0.3 * 2), abs=1e-12)
        assert found["b"].item() == 1

    def test_equal_modalities_are_left_alone(self) -> None:
        step = step_of(AB, [[1, 1]], {("a",): logits_of(0.4), ("b",): logits_of(0.4)})
        assert [k.item() for k in ready(OGMGE(), AB).factors(step, torch.tensor([[1]])).values()] == [1, 1]

    def test_three_modalities_of_which_one_is_missing_and_one_sample_is_alone(self) -> None:
        students = {
            ("a",): torch.cat([logits_of(0.9), logits_of(0.6)]),
            ("b",): torch.cat([logits_of(0.3), logits_of(0.4)]),
        }
        step = step_of(ABC, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], students)
        found = ready(OGMGE(alpha=0.5), ABC).factors(step, torch.tensor([[1], [1], [1]]))
        assert set(found) == {"a", "b"}, "c has nothing to be compared with"
        assert found["a"].item() == pytest.approx(1 - math.tanh(0.5 * 1.5 / 0.7), abs=1e-12)
        assert found["b"].item() == 1

    def test_it_looks_at_every_modality_alone_where_there_is_another(self) -> None:
        presence = torch.tensor([[1, 1, 0], [0, 1, 0]], dtype=torch.bool)
        student_inputs = ready(OGMGE(), ABC).student_inputs(presence)
        assert [(student_input.modalities, student_input.rows.tolist()) for student_input in student_inputs] == [
            (("a",), [0]),
            (("b",), [0]),
        ]

    @pytest.mark.parametrize("alpha", [0, -1.0, math.inf, math.nan])
    def test_alpha_must_be_positive(self, alpha: float) -> None:
        with pytest.raises(ConfigError, match="alpha must be a positive number"):
            OGMGE(alpha)


class TestAGM:
    def test_shapley_values_of_three_modalities_by_hand(self) -> None:
        z = {
            subset: torch.full((1, 2, 1), value, dtype=torch.float64)
            for subset, value in {
                ("a",): 1.0,
                ("b",): 2.0,
                ("c",): 4.0,
                ("a", "b"): 5.0,
                ("a", "c"): 6.0,
                ("b", "c"): 9.0,
            }.items()
        }
        step = step_of(ABC, [[1, 1, 1]], z, full=torch.full((1, 2, 1), 12.0, dtype=torch.float64))
        found = shapley_values(step)[0, :, 0, 0].tolist()
        a = 1.0 / 3 + ((5.0 - 2) + (6.0 - 4)) / 6 + (12.0 - 9) / 3
        b = 2.0 / 3 + ((5.0 - 1) + (9.0 - 4)) / 6 + (12.0 - 6) / 3
        c = 4.0 / 3 + ((6.0 - 1) + (9.0 - 2)) / 6 + (12.0 - 5) / 3
        assert found == pytest.approx([a, b, c], abs=1e-12)

    def test_responses_sum_to_the_logits_from_everything_that_a_sample_has(self) -> None:
        generator = torch.Generator().manual_seed(0)
        presence = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
        names = NAMES[:4]
        strategy = ready(AGM(), names)
        students = {
            student_input.modalities: torch.randn(
                len(student_input.rows), 2, 4, generator=generator, dtype=torch.float64
            )
            for student_input in strategy.student_inputs(presence)
        }
        full = torch.randn(4, 2, 4, generator=generator, dtype=torch.float64)
        responses = shapley_values(step_of(names, presence.int().tolist(), students, full))
        torch.testing.assert_close(responses.sum(1), full)
        assert not responses[~presence].any()

    def test_it_looks_at_every_proper_subset(self) -> None:
        presence = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0]], dtype=torch.bool)
        found = {s.modalities: s.rows.tolist() for s in ready(AGM(), ABC).student_inputs(presence)}
        assert found == {
            ("a",): [0, 1],
            ("b",): [0],
            ("c",): [0, 1],
            ("a", "b"): [0],
            ("a", "c"): [0],
            ("b", "c"): [0],
        }

    def test_two_modalities_and_two_steps_by_hand(self) -> None:
        strategy = ready(AGM(alpha=0.7), AB)
        history = []
        for za, zb, full in ((2.0, 0.5, 3.0), (1.0, 1.5, 2.0)):
            za_, zb_, full_ = (torch.tensor([[[-v], [v]]], dtype=torch.float64) for v in (za, zb, full))
            found = strategy.factors(step_of(AB, [[1, 1]], {("a",): za_, ("b",): zb_}, full_), torch.tensor([[1]]))
            phi_a, phi_b = (za + full - zb) / 2, (zb + full - za) / 2
            loss_a, loss_b = (math.log1p(math.exp(-2 * phi)) for phi in (phi_a, phi_b))
            # n / (n - 1) times the mean minus one of two is the difference of the two.
            history.append(loss_b - loss_a)
            before = sum(history[:-1]) / max(len(history) - 1, 1)
            for name, sign in (("a", 1), ("b", -1)):
                wanted = math.exp(0.7 * min(math.exp(sign * before) - math.exp(sign * history[-1]), 7))
                assert found[name].item() == pytest.approx(wanted, rel=1e-6)
        assert strategy._mean[0].item() == pytest.approx(sum(history) / 2, rel=1e-6)

    def test_the_exponent_is_bounded(self) -> None:
        strategy = ready(AGM(alpha=1.0), AB)
        strategy._mean, strategy._steps = torch.tensor([10.0, -10.0]), torch.tensor([1.0, 1.0])
        z = torch.zeros(1, 2, 1, dtype=torch.float64)
        found = strategy.factors(step_of(AB, [[1, 1]], {("a",): z, ("b",): z}, z), torch.tensor([[1]]))
        assert found["a"].item() == pytest.approx(math.exp(7))

    def test_a_modality_without_comparison_has_no_factor_and_its_mean_rests(self) -> None:
        strategy = ready(AGM(), ABC)
        strategy._mean, strategy._steps = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([4.0, 4.0, 4.0])
        z = torch.randn(1, 2, 1, dtype=torch.float64)
        step = step_of(ABC, [[1, 1, 0], [0, 0, 1]], {("a",): z, ("b",): 2 * z}, torch.cat([3 * z, z]))
        assert set(strategy.factors(step, torch.tensor([[1], [1]]))) == {"a", "b"}
        assert strategy._steps.tolist() == [5, 5, 4]
        assert strategy._mean[2].item() == pytest.approx(0.3)
        assert strategy._mean[0].item() != pytest.approx(0.1)

    def test_alpha_must_be_positive(self) -> None:
        with pytest.raises(ConfigError, match="alpha must be a positive number, got 0"):
            AGM(0)


class TestPMR:
    labels = torch.tensor([[0, 0, 1, 1]])

    def features(self) -> dict[str, list[Tensor]]:
        """One channel; a keeps its classes far apart, b close together."""
        a = torch.tensor([[[0.0, 1.0, 5.0, 6.0]]], dtype=torch.float64, requires_grad=True)
        b = torch.tensor([[[0.0, 1.0, 0.5, 1.5]]], dtype=torch.float64, requires_grad=True)
        return {"a": [a], "b": [b]}

    def scored(self, name: str) -> tuple[float, float, float]:
        """Mean probability, cross-entropy and entropy by hand: classes have two voxels each, so plain means do."""
        values = {"a": [0.0, 1.0, 5.0, 6.0], "b": [0.0, 1.0, 0.5, 1.5]}[name]
        prototypes = {"a": (0.5, 5.5), "b": (0.5, 1.0)}[name]
        probability = entropy = spread = 0.0
        for value, label in zip(values, [0, 0, 1, 1], strict=True):
            # The smallest distance is the root of the floor under its square.
            powers = [math.exp(-max(abs(value - c), 1e-4)) for c in prototypes]
            p = [power / sum(powers) for power in powers]
            probability += p[label] / 4
            entropy -= math.log(p[label]) / 4
            spread -= sum(q * math.log(q) for q in p) / 4
        return probability, entropy, spread

    def test_the_slow_modality_alone_is_pulled_to_its_prototypes(self) -> None:
        features = self.features()
        step = step_of(AB, [[1, 1]], {}, features=features)
        loss = ready(PMR(alpha=2.0), AB).loss(step, self.labels)
        (fast, _, _), (slow, entropy, _) = self.scored("a"), self.scored("b")
        beta = fast / slow - 1
        assert 0 < beta < 1
        assert loss.item() == pytest.approx(2 * beta * entropy, abs=1e-10)
        loss.backward()
        assert not features["a"][0].grad.any()  # type: ignore[union-attr]
        assert features["b"][0].grad.any()  # type: ignore[union-attr]

    def test_beta_and_prototypes_carry_no_gradient(self) -> None:
        features = self.features()
        loss = ready(PMR(), AB).loss(step_of(AB, [[1, 1]], {}, features=features), self.labels)
        (found,) = torch.autograd.grad(loss, features["b"][0])
        (fast, _, _), (slow, _, _) = self.scored("a"), self.scored("b")
        point = features["b"][0].detach().requires_grad_()
        distance = torch.cat([(point - c).square().clamp(min=1e-8).sqrt() for c in (0.5, 1.0)], dim=1)
        wanted = (fast / slow - 1) * F.cross_entropy(-distance, self.labels)
        torch.testing.assert_close(found, torch.autograd.grad(wanted, point)[0])

    def test_the_entropy_of_the_fast_modality_counts_in_the_first_epochs_only(self) -> None:
        strategy = ready(PMR(entropy_weight=0.5, entropy_epochs=1), AB)
        (fast, _, spread), (slow, entropy, _) = self.scored("a"), self.scored("b")
        pull = (fast / slow - 1) * entropy
        push = min(fast / slow - 1, 1) * spread
        losses = []
        for _ in range(2):
            losses.append(strategy.loss(step_of(AB, [[1, 1]], {}, features=self.features()), self.labels).item())
            strategy.end_epoch()
        assert losses == pytest.approx([pull - 0.5 * push, pull], abs=1e-10)

    def test_prototypes_are_running_means_of_classes_that_were_seen(self) -> None:
        strategy = ready(PMR(momentum=0.75), AB)
        for value, labels in ((1.0, [[0, 0]]), (3.0, [[0, 1]])):
            features = {name: [torch.full((1, 1, 2), value, dtype=torch.float64)] for name in AB}
            strategy.loss(step_of(AB, [[1, 1]], {}, features=features), torch.tensor(labels))
        assert strategy._prototypes["a"].flatten().tolist() == pytest.approx([0.75 * 1 + 0.25 * 3, 3.0])

    def test_a_class_without_prototype_takes_no_probability(self) -> None:
        strategy = ready(PMR(), AB)
        features = {name: [torch.randn(1, 1, 2, dtype=torch.float64, requires_grad=True)] for name in AB}
        loss = strategy.loss(step_of(AB, [[1, 1]], {}, features=features), torch.tensor([[0, 0]]))
        assert loss.item() == 0
        loss.backward()
        assert all(feature[0].grad.isfinite().all() for feature in features.values())  # type: ignore[union-attr]

    def test_the_finest_map_is_used_at_its_own_resolution(self) -> None:
        labels = self.labels.repeat_interleave(2, dim=1)
        coarse = torch.randn(1, 3, 2, dtype=torch.float64)
        features = {name: [coarse, *maps, torch.tensor(7)] for name, maps in self.features().items()}
        found = ready(PMR(), AB).loss(step_of(AB, [[1, 1]], {}, features=features), labels)
        wanted = ready(PMR(), AB).loss(step_of(AB, [[1, 1]], {}, features=self.features()), self.labels)
        torch.testing.assert_close(found, wanted)

    def test_without_a_sample_of_two_modalities_there_is_no_loss_but_prototypes_learn(self) -> None:
        strategy = ready(PMR(), AB)
        features = {name: [maps[0].repeat(2, 1, 1)] for name, maps in self.features().items()}
        step = step_of(AB, [[1, 0], [0, 1]], {}, features=features)
        assert strategy.loss(step, self.labels.repeat(2, 1)) is None
        assert strategy._prototypes["a"].flatten().tolist() == pytest.approx([0.5, 5.5])

    def test_wrong_numbers_are_listed_together(self) -> None:
        with pytest.raises(ConfigError, match=r"(?s)4 problems.*alpha.*momentum.*entropy_weight.*entropy_epochs"):
            PMR(0, momentum=1.0, entropy_weight=-1, entropy_epochs=-1)

    def test_regions_are_refused(self) -> None:
        net = MeanNet(NAMES[:2])
        model = PassionWrapper(
            net, NAMES[:2], missing_rates=(0.1, 0.1), spec=spec_of(net, outputs="sigmoid"), strategy=PMR()
        )
        x, mask, _ = batch([[1, 1]])
        with pytest.raises(ConfigError, match="exclusive classes"):
            model(x, mask)

    def test_undecided_voxels_of_a_small_class_count_like_those_of_a_large_one(self) -> None:
        logits = torch.tensor([[[40.0] * 9 + [0.0]], [[-40.0] * 9 + [0.0]]], dtype=torch.float64).movedim(0, 1)
        found = prediction_entropy(logits, torch.tensor([[0] * 9 + [1]]))
        torch.testing.assert_close(found, torch.tensor([math.log(2) / 2], dtype=torch.float64))

    def test_prototypes_and_scores_of_many_voxels_keep_their_digits(self) -> None:
        labels = torch.zeros(1, 4_000_000, dtype=torch.long)
        strategy = ready(PMR(), AB)
        strategy._learn("a", torch.full((1, 1, 4_000_000), 0.9), labels, 2)
        assert strategy._prototypes["a"][0].item() == pytest.approx(0.9, rel=1e-5)
        logits = torch.tensor([0.9, 0.1]).log().view(1, 2, 1).expand(1, 2, 4_000_000)
        assert true_class_probability(logits, labels, "softmax").item() == pytest.approx(0.9, rel=1e-5)

    def test_prototypes_of_another_model_are_refused(self) -> None:
        strategy = ready(PMR(), AB)
        strategy.loss(step_of(AB, [[1, 1]], {}, features=self.features()), self.labels)
        with pytest.raises(ConfigError, match=r"prototypes \(2, 1\) for 'a', this model has \(5, 1\)"):
            strategy._learn("a", self.features()["a"][0].detach(), self.labels, 5)

    def test_a_modality_that_was_never_compared_was_not_pulled(self) -> None:
        strategy = ready(PMR(), AB)
        strategy.loss(step_of(AB, [[1, 0]], {}, features=self.features()), self.labels)
        assert strategy.end_epoch().beta.tolist() == [0, 0]


class TestRedCore:
    def losses(self, students: dict[tuple[str, ...], Tensor], labels: Tensor) -> list[float]:
        return [segmentation_loss(logits, labels).item() for logits in students.values()]

    def test_the_loss_is_that_of_each_modality_alone_times_its_weight(self) -> None:
        labels = torch.tensor([[[1, 0]]])
        students = {("a",): logits_of(0.8, 0.3).unsqueeze(2), ("b",): logits_of(0.4, 0.3).unsqueeze(2)}
        strategy = ready(RedCore(weight=0.5, eta=0.2, eta_growth=1.0), AB)
        step = step_of(AB, [[1, 1]], students)
        one, other = self.losses(students, labels)
        assert strategy.loss(step, labels).item() == pytest.approx(0.5 * (one + other))
        report = strategy.end_epoch()
        # RA = 1 - loss / mean; the weights move against it and are put back on the circle of radius sqrt(2).
        mean = (one + other) / 2
        moved = [1 - 0.2 * (1 - loss / mean) for loss in (one, other)]
        scale = math.sqrt(2 / sum(weight**2 for weight in moved))
        assert report.beta.tolist() == pytest.approx([weight * scale for weight in moved])
        assert report.beta[1] > 1 > report.beta[0], "b lags behind"
        wanted = 0.5 * sum(weight * scale * loss for weight, loss in zip(moved, (one, other), strict=True))
        assert strategy.loss(step, labels).item() == pytest.approx(wanted)

    def test_the_mean_goes_over_the_samples_that_have_the_modality(self) -> None:
        labels = torch.tensor([[[1, 0]]] * 3)
        logits = logits_of(0.8, 0.3).unsqueeze(2)
        students = {("a",): logits, ("b",): torch.cat([logits, logits]), ("c",): logits}
        strategy = ready(RedCore(eta=0.5), ABC)
        step = step_of(ABC, [[1, 1, 0], [0, 1, 1], [0, 0, 1]], students)
        loss = segmentation_loss(logits, labels[:1]).item()
        assert strategy.loss(step, labels).item() == pytest.approx(4 * loss / 3)
        report = strategy.end_epoch()
        assert report.counts.tolist() == [1, 2, 1]
        assert report.beta.tolist() == pytest.approx([1, 1, 1]), "equal losses move nothing, however many samples"

    def test_wrong_numbers_are_refused_at_once(self) -> None:
        with pytest.raises(ConfigError, match="weight must be a positive number"):
            RedCore(0)
        with pytest.raises(ConfigError, match="eta"):
            RedCore(eta=-1)

"""The references agree with the published figures, and every assertion fails on a loss that breaks it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from passion_plugin import testing
from passion_plugin.testing import references
from passion_plugin.testing.strategies import features, labels, logits, presence_tables, shapes
from passion_plugin.training import PreferenceEstimator

Golden = Callable[[str], dict[str, Tensor]]

few = settings(max_examples=25)
each_mode = pytest.mark.parametrize("mode", ["default", "official"])


def assert_close(actual: object, expected: object) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-10, atol=1e-10)


class TestReferences:
    @pytest.mark.parametrize("name", ["b1_T4", "b2_T1", "b2_up2", "b1_absent_up4", "b2_up4"])
    def test_pixel_distillation_is_published(self, golden: Golden, name: str) -> None:
        figures = golden(f"pixel_{name}")
        scale, temperature = int(figures["scale_factor"]), float(figures["temperature"])
        found = references.pixel_distillation(
            figures["student"], figures["teacher"], temperature, scale_factor=scale, mode="official"
        )
        assert_close(found, figures["loss"])

    @pytest.mark.parametrize("name", ["b1_absent", "b2", "b2_absent"])
    def test_prototype_distillation_is_published(self, golden: Golden, name: str) -> None:
        figures = golden(f"prototype_{name}")
        loss, distance = references.prototype_distillation(
            figures["student"],
            figures["teacher"],
            figures["labels"],
            int(figures["num_classes"]),
            mode="official",
        )
        assert_close(loss, figures["loss"])
        assert_close(distance, figures["distance"])

    @pytest.mark.parametrize("name", ["b1_absent", "b2"])
    def test_segmentation_losses_are_published(self, golden: Golden, name: str) -> None:
        figures = golden(f"segmentation_{name}")
        z, y = figures["logits"], figures["labels"]
        assert_close(references.weighted_cross_entropy(z, y, mode="official"), figures["weighted_ce"])
        assert_close(references.dice_loss(z, y, mode="official"), figures["dice"])

    def test_gates_and_weights_are_published(self, golden: Golden) -> None:
        figures = golden("preference_b1")
        beta: object = np.ones(4)
        for epoch, (distance, mask) in enumerate(zip(figures["distance"], figures["mask"], strict=True)):
            for sample in range(len(distance)):
                row = slice(sample, sample + 1)
                gate = references.gate(distance[row], mask[row], mode="official")
                assert np.array_equal(gate, figures["gate"][epoch, row].numpy())
            eta = references.epoch_eta(epoch)
            assert eta == pytest.approx(float(figures["eta"][epoch]))
            beta, preference = references.epoch_beta(
                beta, distance, mask, eta=eta, mode="official", presence_counts=figures["modality_counts"]
            )
            assert_close(preference, figures["rp_epoch"][epoch])
            assert_close(beta, figures["beta"][epoch])

    def test_up_sampling_keeps_corners_and_straight_lines(self) -> None:
        line = np.linspace(0, 6, 4).reshape(1, 4, 1)
        finer = references.upsample(line, 3)
        assert finer.shape == (1, 12, 3)
        for column in range(3):
            assert_close(finer[0, :, column], np.linspace(0, 6, 12))

    def test_total_loss_by_hand(self) -> None:
        settings_ = {"rarity": [1.0, 2.0], "beta": [1.5, 0.5], "gate": [[0, 1], [1, 1]]}
        terms = ([[2.0, 4.0], [8.0, math.nan]], [[1.0, 3.0], [5.0, math.nan]], [[7.0, 9.0], [1.0, math.inf]])
        presence = [[1, 1], [1, 0]]
        first = 0.5 * 1.5 * 2 + 7 + 2 * (0.5 * 0.5 * 4 + 0.1 * 3 + 9)
        second = 0.5 * 1.5 * 8 + 0.1 * 5 + 1
        assert references.total_loss(*terms, presence, **settings_) == pytest.approx((first + second) / 2)
        official = first - 7 - 2 * 9 + 2 * 0.5 * 9 + second - 1 + 1.5
        found = references.total_loss(*terms, presence, **settings_, mode="official")
        assert found == pytest.approx(official / 2)


class TestPreferenceAgainstReferences:
    @each_mode
    @few
    @given(presence=presence_tables(modalities=3), seed=st.integers(0, 99))
    def test_gates_and_relative_preference(self, mode: str, presence: Tensor, seed: int) -> None:
        distance = torch.from_numpy(np.random.default_rng(seed).uniform(0.01, 1, presence.shape))
        estimator = PreferenceEstimator(("a", "b", "c"), mode=mode)
        expected = references.gate(distance, presence, mode=mode)
        assert np.array_equal(estimator.gate(distance, presence).numpy(), expected)
        assert_close(
            estimator.relative_preference(distance, presence),
            references.relative_preference(distance, presence),
        )

    @each_mode
    @few
    @given(
        epochs=st.lists(presence_tables(modalities=4), min_size=1, max_size=4),
        seed=st.integers(0, 99),
        eta=st.sampled_from([0.01, 0.5, 3.0]),
    )
    def test_weights_over_epochs(self, mode: str, epochs: list[Tensor], seed: int, eta: float) -> None:
        random = np.random.default_rng(seed)
        counts = random.integers(1, 20, 4).astype(float)
        estimator = PreferenceEstimator(("a", "b", "c", "d"), counts, mode=mode, eta=eta, eta_every=2)
        beta: object = np.ones(4)
        for epoch, presence in enumerate(epochs):
            distance = torch.from_numpy(random.uniform(0.01, 1, presence.shape) ** 3)
            distance[presence.sum(1) == 1] = 0
            if mode == "default" and not bool((presence.sum(1) > 1).any()):
                continue  # an epoch without a single distance: its warning has a test of its own
            for row in range(len(distance)):
                estimator.update(distance[row : row + 1], presence[row : row + 1])
            step = references.epoch_eta(estimator.epoch, eta=eta, every=2)
            beta, preference = references.epoch_beta(
                beta, distance, presence, eta=step, mode=mode, presence_counts=counts
            )
            found = estimator.end_epoch()
            assert_close(found.beta, beta)
            assert_close(found.relative_preference, preference)
            assert epoch >= found.epoch

    def test_the_projection_is_reached(self) -> None:
        distance = torch.tensor([[1e-4, 1.0, 1.0]], dtype=torch.float64)
        presence = torch.ones(1, 3, dtype=torch.bool)
        beta, _ = references.epoch_beta(np.array([0.2, 1.2, 1.2]), distance, presence, eta=2.0)
        assert beta.min() == pytest.approx(0.1)
        assert np.linalg.norm(beta) == pytest.approx(math.sqrt(3))


STUDENT = torch.randn(3, 2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TEACHER = torch.randn(3, 2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
LABELS = torch.randint(2, (3, 2, 3), generator=torch.Generator().manual_seed(3))
TABLE = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
PRESENCE = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    """A loss without a fault."""
    return (student - teacher.detach()).square().flatten(1).mean(1)


def squared_reference(student: Tensor, teacher: Tensor) -> np.ndarray:
    pairs = zip(student.numpy(), teacher.numpy(), strict=True)
    return np.array([np.mean((s - t) ** 2) for s, t in pairs])


class TestAssertMatchesReference:
    def test_passes(self) -> None:
        testing.assert_matches_reference(squared, squared_reference, STUDENT, TEACHER)

    def test_fails_on_a_wrong_value(self) -> None:
        with pytest.raises(AssertionError, match="not its reference"):
            testing.assert_matches_reference(
                lambda s, t: squared(s, t) * (1 + 1e-6), squared_reference, STUDENT, TEACHER
            )

    def test_fails_on_a_wrong_shape(self) -> None:
        with pytest.raises(AssertionError, match="shape"):
            testing.assert_matches_reference(lambda s, t: squared(s, t).mean(), squared_reference, STUDENT, TEACHER)

    def test_fails_on_a_missing_output(self) -> None:
        with pytest.raises(AssertionError, match="1 outputs instead of 2"):
            testing.assert_matches_reference(squared, lambda s, t: (squared_reference(s, t),) * 2, STUDENT, TEACHER)

    @pytest.mark.parametrize("fault", ["detached", "half", "one sample"])
    def test_fails_on_a_wrong_gradient_behind_a_right_value(self, fault: str) -> None:
        def wrong(s: Tensor, t: Tensor) -> Tensor:
            right = squared(s, t)
            if fault == "one sample":
                return torch.cat((right[:1].detach(), right[1:]))
            return right.detach() if fault == "detached" else right / 2 + right.detach() / 2

        testing.assert_matches_reference(wrong, squared_reference, STUDENT, TEACHER, gradient=False)
        with pytest.raises(AssertionError, match="not the slope"):
            testing.assert_matches_reference(wrong, squared_reference, STUDENT, TEACHER)


class TestAssertZeroAtTeacher:
    def test_passes(self) -> None:
        testing.assert_zero_at_teacher(squared, TEACHER)

    def test_fails_on_cross_entropy(self) -> None:
        with pytest.raises(AssertionError, match="not zero at student = teacher"):
            testing.assert_zero_at_teacher(lambda s, t: -(t.softmax(1) * s.log_softmax(1)).flatten(1).sum(1), TEACHER)

    def test_fails_on_a_zero_with_a_slope(self) -> None:
        with pytest.raises(AssertionError, match="gradient at student = teacher"):
            testing.assert_zero_at_teacher(lambda s, t: (s - t).flatten(1).sum(1), TEACHER)

    def test_fails_on_any_output(self) -> None:
        with pytest.raises(AssertionError, match="not zero"):
            testing.assert_zero_at_teacher(lambda s, t: (squared(s, t), squared(s, t) + 1), TEACHER)


class TestAssertNoGradientToTeacher:
    def test_passes(self) -> None:
        testing.assert_no_gradient_to_teacher(squared, STUDENT, TEACHER)

    def test_fails_on_an_attached_teacher(self) -> None:
        with pytest.raises(AssertionError, match="teacher gets a gradient"):
            testing.assert_no_gradient_to_teacher(lambda s, t: (s - t).square().flatten(1).mean(1), STUDENT, TEACHER)

    def test_fails_on_a_detached_student(self) -> None:
        with pytest.raises(AssertionError, match="student gets no gradient"):
            testing.assert_no_gradient_to_teacher(lambda s, t: squared(t, s), STUDENT, TEACHER)


class TestAssertBatchIndependent:
    def test_passes(self) -> None:
        testing.assert_batch_independent(squared, STUDENT, TEACHER)

    def test_fails_on_a_mean_over_the_batch(self) -> None:
        with pytest.raises(AssertionError, match="depends on its batch"):
            testing.assert_batch_independent(lambda s, t: squared(s, t) - 0.1 * squared(s, t).mean(), STUDENT, TEACHER)

    def test_fails_on_a_loss_that_is_reduced_already(self) -> None:
        with pytest.raises(AssertionError, match=r"shape \(\) instead of one value for each of 3 samples"):
            testing.assert_batch_independent(lambda s, t: squared(s, t).mean(), STUDENT, TEACHER)

    def test_fails_on_a_leaking_gradient(self) -> None:
        def leaking(s: Tensor, t: Tensor) -> Tensor:
            mean = squared(s, t).mean()
            return squared(s, t) + mean - mean.detach()

        with pytest.raises(AssertionError, match="reaches other samples"):
            testing.assert_batch_independent(leaking, STUDENT, TEACHER)

    def test_refuses_a_batch_of_one(self) -> None:
        with pytest.raises(ValueError, match="two samples"):
            testing.assert_batch_independent(squared, STUDENT[:1], TEACHER[:1])


class TestAssertNonnegative:
    def test_passes(self) -> None:
        testing.assert_nonnegative(squared, STUDENT, TEACHER)

    @pytest.mark.parametrize("wrong", [-1e-9, math.nan])
    def test_fails(self, wrong: float) -> None:
        with pytest.raises(AssertionError, match="negative or NaN"):
            testing.assert_nonnegative(lambda s, t: 0 * squared(s, t) + wrong, STUDENT, TEACHER)


def labelled(z: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(z, y, reduction="none").flatten(1).mean(1)


class TestAssertClassPermutationInvariant:
    def test_passes(self) -> None:
        testing.assert_class_permutation_invariant(labelled, LABELS, STUDENT)
        testing.assert_class_permutation_invariant(squared, None, STUDENT, TEACHER)

    def test_fails_where_the_background_is_left_out(self) -> None:
        with pytest.raises(AssertionError, match="changes when class k becomes"):
            testing.assert_class_permutation_invariant(lambda s, t: squared(s[:, 1:], t[:, 1:]), None, STUDENT, TEACHER)

    def test_fails_where_one_label_is_special(self) -> None:
        with pytest.raises(AssertionError, match="changes when class k becomes"):
            testing.assert_class_permutation_invariant(lambda z, y: labelled(z, y * 0), LABELS, STUDENT)


class TestAssertVoxelPermutationInvariant:
    def test_passes(self) -> None:
        testing.assert_voxel_permutation_invariant(squared, STUDENT, TEACHER)
        testing.assert_voxel_permutation_invariant(labelled, STUDENT, LABELS)

    def test_fails_on_a_smoothness_term(self) -> None:
        with pytest.raises(AssertionError, match="voxels are shuffled"):
            testing.assert_voxel_permutation_invariant(lambda z: z.diff(dim=-1).square().flatten(1).mean(1), STUDENT)

    def test_fails_on_labels_in_another_order(self) -> None:
        with pytest.raises(AssertionError, match="voxels are shuffled"):
            testing.assert_voxel_permutation_invariant(lambda z, y: labelled(z, y.flip(-1)), STUDENT, LABELS)


class TestAssertIndependentOfLayout:
    def test_passes(self) -> None:
        testing.assert_independent_of_layout(squared, STUDENT, TEACHER)
        testing.assert_independent_of_layout(labelled, STUDENT, LABELS)

    def test_fails_on_view(self) -> None:
        with pytest.raises(AssertionError, match="fails on channels last inputs"):
            testing.assert_independent_of_layout(lambda s: s.view(len(s), -1).square().mean(1), STUDENT)

    def test_fails_on_reading_memory_as_it_lies(self) -> None:
        def wrong(s: Tensor) -> Tensor:
            return torch.as_strided(s, (3, 6), (12, 1), s.storage_offset()).sum(1)

        with pytest.raises(AssertionError, match="differ on channels last inputs"):
            testing.assert_independent_of_layout(wrong, STUDENT)


class TestAssertComputedInFloat32:
    def test_passes(self) -> None:
        testing.assert_computed_in_float32(lambda s, t: squared(s.float(), t.float()), STUDENT, TEACHER)

    def test_fails_on_a_low_precision_result(self) -> None:
        with pytest.raises(AssertionError, match=r"the result is torch\.bfloat16"):
            testing.assert_computed_in_float32(squared, STUDENT, TEACHER)

    def test_fails_on_rounding_inside(self) -> None:
        with pytest.raises(AssertionError, match="not computed in float32"):
            testing.assert_computed_in_float32(lambda s, t: squared(s, t).float(), STUDENT, TEACHER)

    def test_fails_on_a_product_under_autocast(self) -> None:
        def product(s: Tensor, t: Tensor) -> Tensor:
            wide = torch.float64 if s.dtype == torch.float64 else torch.float32
            return torch.bmm(s.to(wide).flatten(2), t.to(wide).flatten(2).mT).flatten(1).sum(1).to(wide)

        with pytest.raises(AssertionError, match="autocast on: not computed in float32"):
            testing.assert_computed_in_float32(product, STUDENT, TEACHER)


def share(table: Tensor) -> Tensor:
    return table / table.sum(-1, keepdim=True)


class TestModalityPermutations:
    def test_equivariant_passes(self) -> None:
        testing.assert_modality_permutation_equivariant(share, TABLE)
        testing.assert_modality_permutation_equivariant(lambda d, a: share(d * a), TABLE, PRESENCE)

    def test_equivariant_fails_on_a_rule_by_position(self) -> None:
        with pytest.raises(AssertionError, match="do not follow their modalities"):
            testing.assert_modality_permutation_equivariant(lambda d: d * torch.arange(4), TABLE)

    def test_equivariant_fails_on_a_mask_taken_from_the_neighbour(self) -> None:
        # The mistake of using one modality's mask for another.
        with pytest.raises(AssertionError, match="do not follow their modalities"):
            testing.assert_modality_permutation_equivariant(lambda d, a: d * a[:, [0, 1, 2, 2]], TABLE, PRESENCE)

    def test_invariant_passes(self) -> None:
        testing.assert_modality_permutation_invariant(lambda d: d.sum(-1), TABLE)

    def test_invariant_fails_on_a_rule_by_position(self) -> None:
        with pytest.raises(AssertionError, match="result changes when the modalities"):
            testing.assert_modality_permutation_invariant(lambda d: d[:, 0] - d[:, 3], TABLE)

    @each_mode
    def test_the_estimator_and_its_reference_know_no_positions(self, mode: str) -> None:
        gates = PreferenceEstimator(("a", "b", "c", "d"), mode=mode).gate
        testing.assert_modality_permutation_equivariant(gates, TABLE, PRESENCE)
        testing.assert_modality_permutation_equivariant(partial(references.gate, mode=mode), TABLE, PRESENCE)
        testing.assert_modality_permutation_equivariant(
            lambda b, d, a: references.epoch_beta(b, d, a, eta=0.5, mode=mode), TABLE[0], TABLE, PRESENCE
        )


class TestAssertInvariantToAbsentContent:
    def test_passes_on_selection(self) -> None:
        testing.assert_invariant_to_absent_content(
            lambda d: torch.where(PRESENCE, d, 0).square().sum(1), PRESENCE, TABLE
        )

    def test_passes_on_inputs_with_space(self) -> None:
        mask = PRESENCE[..., None, None]
        inputs = TABLE[..., None, None].expand(-1, -1, 2, 3).clone()
        testing.assert_invariant_to_absent_content(
            lambda x: x.masked_fill(~mask, 0).square().flatten(1).sum(1), PRESENCE, inputs
        )

    def test_fails_on_multiplication_with_the_mask(self) -> None:
        with pytest.raises(AssertionError, match="nan in an absent modality changes the result"):
            testing.assert_invariant_to_absent_content(lambda d: (d * PRESENCE).sum(1), PRESENCE, TABLE)

    def test_fails_on_a_hidden_nan_gradient(self) -> None:
        # The value is selected after the root, so the backward pass still multiplies 0 with NaN.
        with pytest.raises(AssertionError, match="nan in an absent modality gets a gradient"):
            testing.assert_invariant_to_absent_content(
                lambda d: torch.where(PRESENCE, (d + 1).sqrt(), 0).sum(1), PRESENCE, TABLE
            )

    def test_fails_on_a_leak(self) -> None:
        with pytest.raises(AssertionError, match="changes the result"):
            testing.assert_invariant_to_absent_content(lambda d: d.sum(1), PRESENCE, TABLE)

    def test_refuses_a_table_without_gaps(self) -> None:
        with pytest.raises(ValueError, match="no modality is absent"):
            testing.assert_invariant_to_absent_content(lambda d: d, torch.ones_like(PRESENCE), TABLE)


class TestStrategies:
    @few
    @given(shape=shapes(batch=(2, 2), channels=(3, 4), axes=(3,), side=(1, 2)))
    def test_shapes_keep_their_bounds(self, shape: tuple[int, ...]) -> None:
        assert len(shape) == 5
        assert shape[0] == 2
        assert shape[1] in (3, 4)
        assert set(shape[2:]) <= {1, 2}

    @few
    @given(z=logits(), f=features(rectified=True), data=st.data())
    def test_tensors_have_the_documented_kind(self, z: Tensor, f: Tensor, data: st.DataObject) -> None:
        y = data.draw(labels(tuple(z.shape)))
        assert z.dtype == f.dtype == torch.float64
        assert y.dtype == torch.int64
        assert y.shape == (z.shape[0], *z.shape[2:])
        assert 0 <= int(y.min()) <= int(y.max()) < z.shape[1]
        assert bool((f >= 0).all())

    @few
    @given(table=presence_tables(at_least=2))
    def test_presence_tables_keep_what_was_asked(self, table: Tensor) -> None:
        assert table.dtype == torch.bool
        assert bool((table.sum(1) >= 2).all())

    def test_gaps_and_missing_classes_are_drawn(self) -> None:
        gaps, missing = [], []

        @settings(max_examples=30)
        @given(table=presence_tables(3, 4), y=labels((1, 4, 4, 4)))
        def collect(table: Tensor, y: Tensor) -> None:
            gaps.append(not bool(table.all()))
            missing.append(len(y.unique()) < 4)

        collect()
        assert any(gaps)
        assert any(missing)


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_hypothesis_is_imported_with_the_strategies_only() -> None:
    found = run_python(
        "import sys; import passion_plugin.testing; print('hypothesis' in sys.modules)\n"
        "sys.modules['hypothesis'] = None\n"
        "try:\n    import passion_plugin.testing.strategies\n"
        "except ImportError as error:\n    print(error)"
    )
    assert found.splitlines()[0] == "False"
    assert 'pip install "passion-plugin[testing]"' in found

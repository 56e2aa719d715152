"""Gates, weights and state of PreferenceEstimator."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from passion_plugin.errors import ConfigError, InputError, PassionWarning
from passion_plugin.training import EpochReport, PreferenceEstimator
from passion_plugin.training._preference import project_beta

NAMES = ("flair", "t1ce", "t1", "t2")
Golden = Callable[[str], dict[str, Tensor]]


def random_batches(
    count: int, batch: int = 3, size: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[tuple[Tensor, Tensor]]:
    """Distances and presence; distances of absent modalities are NaN, which must never matter."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        distance = torch.rand(batch, size, generator=generator, dtype=dtype) + 0.05
        presence = torch.rand(batch, size, generator=generator) < 0.6
        presence[torch.arange(batch), torch.randint(size, (batch,), generator=generator)] = True
        batches.append((torch.where(presence, distance, math.nan), presence))
    return batches


# --- parity with the published code


def test_official_mode_reproduces_gates_beta_and_eta_of_the_published_code(golden: Golden) -> None:
    data = golden("preference_b1")
    estimator = PreferenceEstimator(NAMES, data["modality_counts"], mode="official")
    for epoch in range(len(data["distance"])):
        for sample in range(data["distance"].shape[1]):
            distance, presence = (data[key][epoch, sample : sample + 1] for key in ("distance", "mask"))
            assert torch.equal(estimator.gate(distance, presence)[0], data["gate"][epoch, sample])
            estimator.update(distance, presence)
        preference = estimator.end_epoch()
        torch.testing.assert_close(preference.relative_preference, data["rp_epoch"][epoch], rtol=0, atol=1e-10)
        torch.testing.assert_close(preference.beta, data["beta"][epoch], rtol=0, atol=1e-10)
        torch.testing.assert_close(estimator.beta, data["beta"][epoch], rtol=0, atol=1e-10)
        assert preference.eta == pytest.approx(float(data["eta"][epoch]), abs=1e-15)


def test_default_mode_equals_official_for_four_modalities_away_from_the_floor(golden: Golden) -> None:
    data = golden("preference_b1")
    estimator = PreferenceEstimator(NAMES)
    for epoch in range(len(data["distance"])):
        assert torch.equal(estimator.gate(data["distance"][epoch], data["mask"][epoch]), data["gate"][epoch])
        estimator.update(data["distance"][epoch], data["mask"][epoch])
        torch.testing.assert_close(estimator.end_epoch().beta, data["beta"][epoch], rtol=0, atol=1e-10)


def test_eta_grows_at_the_ends_of_epochs_0_every_and_twice_every() -> None:
    estimator = PreferenceEstimator(NAMES, eta=0.01, eta_growth=1.5, eta_every=3)
    distance, presence = torch.rand(2, 4), torch.ones(2, 4, dtype=torch.bool)
    etas = []
    for _ in range(7):
        estimator.update(distance, presence)
        etas.append(estimator.end_epoch().eta)
    assert etas == pytest.approx([0.015, 0.015, 0.015, 0.0225, 0.0225, 0.0225, 0.03375])


def test_warm_up_epochs_leave_beta_and_eta_alone_but_are_counted() -> None:
    estimator = PreferenceEstimator(NAMES, eta_every=2)
    estimator.update(*random_batches(1)[0])
    preference = estimator.end_epoch(update_beta=False)
    assert torch.equal(preference.beta, torch.ones(4, dtype=torch.float64))
    assert preference.relative_preference.abs().max() > 0
    assert (estimator.epoch, estimator.eta, estimator.samples_seen) == (1, 0.01, 0)


# --- gates


def test_default_gate_opens_where_a_modality_is_farther_than_the_mean_of_its_own_sample() -> None:
    distance = torch.tensor([[0.1, 0.2, 0.6, math.nan], [0.6, 0.2, 0.1, 0.1]])
    presence = torch.tensor([[True, True, True, False], [True, True, True, True]])
    estimator = PreferenceEstimator(NAMES)
    assert estimator.gate(distance, presence).tolist() == [[False, False, True, False], [True] + [False] * 3]
    expected = torch.tensor([[1 - 1 / 3, 1 - 2 / 3, -1.0, 0.0], [-1.4, 0.2, 0.6, 0.6]])
    torch.testing.assert_close(estimator.relative_preference(distance, presence), expected)


def test_official_gate_is_one_per_modality_and_batch() -> None:
    distance = torch.tensor([[0.1, 0.3, 0.2, 0.0], [0.9, 0.1, 0.5, 0.0]])
    presence = torch.tensor([[True, True, True, False]] * 2)
    # Sum of D / Dbar - 1: (-.5 + .8, .5 - .8, 0): modality 0 lags over the batch, 1 does not.
    official = PreferenceEstimator(NAMES, mode="official").gate(distance, presence)
    assert official[:, :2].tolist() == [[True, False], [True, False]]
    default = PreferenceEstimator(NAMES).gate(distance, presence)
    assert default[:, :2].tolist() == [[False, True], [True, False]]
    assert not official[:, 3].any()


@pytest.mark.parametrize("mode", ["default", "official"])
@pytest.mark.parametrize("value", [0.0, 0.3, math.nan])
def test_single_modality_sample_has_no_gate_and_does_not_disturb_the_rest(mode: str, value: float) -> None:
    estimator = PreferenceEstimator(("a", "b"), mode=mode)
    alone = (torch.tensor([[value, math.nan]]), torch.tensor([[True, False]]))
    assert not estimator.gate(*alone).any()
    assert torch.equal(estimator.relative_preference(*alone), torch.zeros(1, 2))
    pair = (torch.tensor([[0.1, 0.3]]), torch.tensor([[True, True]]))
    both = estimator.gate(torch.cat((alone[0], pair[0])), torch.cat((alone[1], pair[1])))
    assert both.tolist() == [[False, False], [False, True]]


@given(seed=st.integers(0, 10_000), size=st.integers(2, 6))
def test_some_gate_is_open_exactly_when_a_sample_has_unequal_distances(seed: int, size: int) -> None:
    (distance, presence), *_ = random_batches(1, 4, size, seed=seed)
    estimator = PreferenceEstimator([str(index) for index in range(size)])
    gate = estimator.gate(distance, presence)
    assert torch.equal(gate.any(1), presence.sum(1) > 1)
    assert not (gate & ~presence).any()
    assert not (gate.sum(1) == presence.sum(1)).any(), "not every modality can lag behind the mean"


@given(seed=st.integers(0, 10_000), mode=st.sampled_from(["default", "official"]))
def test_renaming_and_permuting_modalities_permutes_everything(seed: int, mode: str) -> None:
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    one = PreferenceEstimator(NAMES, mode=mode)
    two = PreferenceEstimator([NAMES[index] for index in order], mode=mode)
    for distance, presence in random_batches(3, seed=seed):
        gate = one.gate(distance, presence)
        assert torch.equal(two.gate(distance[:, order], presence[:, order]), gate[:, order])
        one.update(distance, presence)
        two.update(distance[:, order], presence[:, order])
    torch.testing.assert_close(two.end_epoch().beta, one.end_epoch().beta[order], rtol=1e-12, atol=0)


# --- epoch statistics


def test_epoch_mean_is_over_available_distances_however_they_are_batched() -> None:
    batches = random_batches(4, seed=3)
    estimator, at_once = PreferenceEstimator(NAMES), PreferenceEstimator(NAMES)
    for distance, presence in batches:
        estimator.update(distance, presence)
    distance, presence = (torch.cat(parts) for parts in zip(*batches, strict=True))
    at_once.update(distance, presence)
    assert estimator.samples_seen == at_once.samples_seen == 12
    result, expected = estimator.end_epoch(), at_once.end_epoch()
    torch.testing.assert_close(result.distance, distance.nanmean(0))
    assert torch.equal(result.counts, presence.sum(0).double())
    torch.testing.assert_close(result.beta, expected.beta, rtol=1e-13, atol=0)


def test_lone_zeros_are_no_information_in_default_mode_and_counted_in_official_mode() -> None:
    distance = torch.tensor([[0.2, 0.4], [0.0, 0.0]], dtype=torch.float64)
    presence = torch.tensor([[True, True], [True, False]])
    default, official = PreferenceEstimator(("a", "b")), PreferenceEstimator(("a", "b"), mode="official")
    default.update(distance, presence)
    official.update(distance, presence)
    assert default.end_epoch().distance.tolist() == [0.2, 0.4]
    assert official.end_epoch().distance.tolist() == [0.1, 0.4]


def test_zero_distance_beside_another_modality_is_counted() -> None:
    estimator = PreferenceEstimator(("a", "b"))
    estimator.update(torch.tensor([[0.0, 0.4]]), torch.tensor([[True, True]]))
    assert estimator.end_epoch().counts.tolist() == [1, 1]


@pytest.mark.parametrize("mode", ["default", "official"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_distances_that_are_not_finite_count_nowhere(mode: str, bad: float) -> None:
    clean, dirty = PreferenceEstimator(NAMES, mode=mode), PreferenceEstimator(NAMES, mode=mode)
    good = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    every = torch.ones(1, 4, dtype=torch.bool)
    spoilt = torch.tensor([[0.1, 0.2, bad, 0.3]])
    clean.update(good, every)
    dirty.update(good, every)
    dirty.update(spoilt, every)
    clean.update(torch.where(spoilt.isfinite(), spoilt, 0), spoilt.isfinite())
    assert not dirty.gate(spoilt, every)[0, 2]
    assert dirty.gate(spoilt, every)[0, 3]
    assert torch.equal(dirty.end_epoch().beta, clean.end_epoch().beta)


def test_half_precision_distances_are_summed_in_float64() -> None:
    estimator = PreferenceEstimator(("a", "b"))
    value = torch.tensor([[0.1, 0.2]], dtype=torch.float16)
    for _ in range(1000):
        estimator.update(value, torch.tensor([[True, True]]))
    preference = estimator.end_epoch()
    torch.testing.assert_close(preference.distance, value[0].double(), rtol=1e-12, atol=0)


def test_modality_without_a_sample_keeps_its_beta_and_the_norm_still_holds() -> None:
    estimator = PreferenceEstimator(NAMES, eta=0.2)
    estimator.update(*random_batches(1, 8)[0])
    before = estimator.end_epoch().beta
    presence = torch.tensor([[True, True, True, False]] * 2)
    estimator.update(torch.tensor([[0.1, 0.2, 0.9, 0.5]] * 2), presence)
    after = estimator.end_epoch()
    assert after.beta[3] == before[3]
    assert after.beta.norm().item() == pytest.approx(2)
    assert (after.counts[3], after.relative_preference[3]) == (0, 0)
    assert after.distance[3].isnan()
    assert after.beta[2] > before[2], "the modality that lags gains weight"


@pytest.mark.parametrize("mode", ["default", "official"])
def test_distances_of_zero_change_nothing(mode: str) -> None:
    estimator = PreferenceEstimator(("a", "b", "c"), mode=mode)
    estimator.update(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    preference = estimator.end_epoch()
    assert torch.equal(preference.beta, torch.ones(3, dtype=torch.float64))
    assert not preference.relative_preference.any()
    assert not preference.empty


@pytest.mark.parametrize(
    ("feed", "advice"),
    [(None, "Compute the PASSION loss of every training batch"), ([[0.0, 0.0]], "single modality")],
)
def test_empty_epoch_warns_once_keeps_beta_and_is_flagged(feed: list[list[float]] | None, advice: str) -> None:
    estimator = PreferenceEstimator(("a", "b"))
    if feed is not None:
        estimator.update(torch.tensor(feed), torch.tensor([[True, False]]))
    with pytest.warns(PassionWarning, match=f"(?i)empty.*{advice}") as caught:
        preference = estimator.end_epoch()
    assert caught[0].filename == __file__
    assert preference.empty
    assert "empty" in str(preference)
    assert preference.counts.tolist() == [0, 0]
    assert torch.equal(preference.beta, torch.ones(2, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert estimator.end_epoch().epoch == 1


@given(
    seed=st.integers(0, 10_000),
    size=st.integers(2, 6),
    eta=st.floats(0, 50),
    beta_min=st.floats(0.01, 1),
)
def test_default_beta_keeps_norm_and_floor_for_any_step_size(seed: int, size: int, eta: float, beta_min: float) -> None:
    names = [str(index) for index in range(size)]
    estimator = PreferenceEstimator(names, eta=eta, beta_min=beta_min)
    for distance, presence in random_batches(6, size=size, seed=seed):
        estimator.update(distance.pow(4), presence)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PassionWarning)  # a batch of lone zeros is an empty epoch
            beta = estimator.end_epoch().beta
        assert (beta >= beta_min).all()
        assert beta.norm().item() == pytest.approx(math.sqrt(size), rel=1e-9)


def test_official_rescaling_is_to_two_whatever_the_number_of_modalities() -> None:
    for size in (2, 3, 6):
        estimator = PreferenceEstimator([str(index) for index in range(size)], mode="official")
        estimator.update(torch.rand(2, size), torch.ones(2, size, dtype=torch.bool))
        assert estimator.end_epoch().beta.norm().item() == pytest.approx(2)


# --- projection


@given(
    values=st.lists(st.floats(0.1, 4), min_size=2, max_size=7),
    minimum=st.floats(0.01, 1),
)
def test_projection_keeps_both_constraints_order_and_itself(values: list[float], minimum: float) -> None:
    beta = torch.tensor(values, dtype=torch.float64)
    norm = math.sqrt(len(values))
    once = project_beta(beta, norm=norm, minimum=minimum)
    assert (once >= minimum).all()
    assert once.norm().item() == pytest.approx(norm, rel=1e-9)
    torch.testing.assert_close(project_beta(once, norm=norm, minimum=minimum), once, rtol=1e-9, atol=0)
    by_size = beta.argsort()
    assert (once[by_size].diff() >= -1e-12).all()


def test_projection_is_plain_rescaling_where_the_floor_is_not_touched() -> None:
    beta = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    torch.testing.assert_close(project_beta(beta, norm=2.0, minimum=0.1), 2 * beta / beta.norm())


def test_projection_refuses_a_norm_that_cannot_be_reached() -> None:
    with pytest.raises(ConfigError, match="norm"):
        project_beta(torch.ones(4), norm=0.5, minimum=0.5)


# --- state


@pytest.mark.parametrize("stop", [0, 4, 7, 10])
def test_saved_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(stop: int) -> None:
    batches = random_batches(12, seed=5, dtype=torch.float32)

    def run(estimator: PreferenceEstimator, first: int, last: int) -> list[Tensor]:
        betas = []
        for index in range(first, last):
            estimator.update(*batches[index])
            if index % 5 == 4:
                betas.append(estimator.end_epoch().beta)
        return betas

    whole = PreferenceEstimator(NAMES, eta_every=1)
    expected = run(whole, 0, 12)
    first = PreferenceEstimator(NAMES, eta_every=1)
    betas = run(first, 0, stop)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    run(first, stop, 12)  # going on must not change what was saved
    file.seek(0)
    second = PreferenceEstimator(NAMES, eta_every=1)
    second.load_state_dict(torch.load(file, weights_only=True))
    betas += run(second, stop, 12)
    assert len(betas) == len(expected) == 2
    assert all(map(torch.equal, betas, expected))
    assert second.samples_seen == whole.samples_seen > 0
    assert torch.equal(second.end_epoch().beta, whole.end_epoch().beta)
    assert (second.epoch, second.eta) == (whole.epoch, whole.eta)


def test_state_lives_in_extra_state_and_not_in_buffers() -> None:
    estimator = PreferenceEstimator(NAMES)
    assert list(estimator.state_dict()) == ["_extra_state"]
    assert not list(estimator.buffers())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_carry_the_state_and_then_go_their_own_way(clone: Callable) -> None:
    estimator = PreferenceEstimator(NAMES)
    estimator.update(*random_batches(1)[0])
    twin = clone(estimator)
    assert torch.equal(twin.end_epoch().beta, copy.deepcopy(estimator).end_epoch().beta)
    assert (twin.epoch, estimator.epoch) == (1, 0)
    assert estimator.samples_seen == 3
    assert torch.equal(estimator.beta, torch.ones(4, dtype=torch.float64))


def test_beta_handed_out_is_a_copy() -> None:
    estimator = PreferenceEstimator(NAMES)
    estimator.beta.mul_(7)
    estimator.update(*random_batches(1)[0])
    estimator.end_epoch().beta.mul_(7)
    assert estimator.beta.norm().item() == pytest.approx(2)


@pytest.mark.parametrize("names", [("flair", "t1ce"), ("t1ce", "flair", "t1", "t2"), ("a", "b", "c", "d")])
def test_state_of_other_modalities_is_refused_naming_both(names: tuple[str, ...]) -> None:
    state = PreferenceEstimator(NAMES).state_dict()
    with pytest.raises(ConfigError) as caught:
        PreferenceEstimator(names).load_state_dict(state)
    assert str(list(NAMES)) in str(caught.value)
    assert str(list(names)) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"beta": torch.ones(3)}, r"beta has shape .*3"),
        ({"sums": 1.0}, "sums is a float, need a torch.float64 tensor"),
    ],
)
def test_unreadable_state_is_refused_and_changes_nothing(change: dict, match: str) -> None:
    estimator = PreferenceEstimator(NAMES)
    with pytest.raises(ConfigError, match=match):
        estimator.set_extra_state({**estimator.get_extra_state(), **change, "epoch": 5})
    assert estimator.epoch == 0


@pytest.mark.parametrize("state", [None, {}, {"epoch": 1}])
def test_something_that_is_no_state_is_refused(state: object) -> None:
    with pytest.raises(ConfigError, match="state of PreferenceEstimator"):
        PreferenceEstimator(NAMES).set_extra_state(state)


def test_nothing_here_touches_the_graph() -> None:
    distance = torch.rand(2, 4, requires_grad=True)
    presence = torch.ones(2, 4, dtype=torch.bool)
    estimator = PreferenceEstimator(NAMES)
    estimator.update(distance, presence)
    assert not estimator.gate(distance, presence).requires_grad
    assert not estimator.relative_preference(distance, presence).requires_grad
    assert not estimator.end_epoch().beta.requires_grad


def test_casting_the_module_leaves_the_statistics_in_float64() -> None:
    estimator = PreferenceEstimator(NAMES).half()
    estimator.update(*random_batches(1)[0])
    assert estimator.beta.dtype == torch.float64
    assert estimator.end_epoch().distance.dtype == torch.float64


# --- bad input


@pytest.mark.parametrize("method", ["gate", "update", "relative_preference"])
def test_every_problem_of_the_input_is_reported_at_once(method: str) -> None:
    call = getattr(PreferenceEstimator(NAMES), method)
    with pytest.raises(InputError) as caught:
        call(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int64))
    message = str(caught.value)
    assert "distance is a torch.int64 tensor of shape (2, 3)" in message
    assert "presence is a torch.int64 tensor of shape (2, 4)" in message
    assert "presence.bool()" in message


@pytest.mark.parametrize(
    ("distance", "presence", "match"),
    [
        (torch.ones(2, 4), torch.ones(3, 4, dtype=torch.bool), r"\(3, 4\).*\(2, 4\)"),
        (torch.ones(4), torch.ones(1, 4, dtype=torch.bool), r"distance is a torch.float32 tensor of shape \(4,\)"),
        (torch.ones(2, 4), torch.ones(2, 4), "presence is a torch.float32"),
        (torch.ones(2, 4), torch.tensor([[True] * 4, [False] * 4]), "no modality at all in row 1"),
    ],
)
def test_wrong_tensors_are_refused(distance: Tensor, presence: Tensor, match: str) -> None:
    estimator = PreferenceEstimator(NAMES)
    with pytest.raises(InputError, match=match):
        estimator.update(distance, presence)
    assert estimator.samples_seen == 0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"modalities": ("t1",)}, "at least two"),
        ({"modalities": "t1"}, "at least two"),
        ({"modalities": ("t1", "t1")}, "different"),
        ({"presence_counts": [1, 2]}, "one for each"),
        ({"presence_counts": [1, 2, 0, 4]}, "positive"),
        ({"presence_counts": {"flair": 1, "t1ce": 2, "t1": 3, "t1c": 4}}, "(?s)t1c'.*Did you mean.*'t2'"),
        ({"mode": "oficial"}, "'default' or 'official'"),
        ({"eta": math.nan}, "eta"),
        ({"eta_every": 0}, "eta_every"),
        ({"eta_growth": 0.0}, "eta_growth"),
        ({"beta_min": 0.0}, "beta_min"),
        ({"beta_min": 2.0}, "beta_min"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        PreferenceEstimator(**{"modalities": NAMES, **arguments})


def test_counts_by_name_mean_the_same_as_counts_by_column() -> None:
    by_name = {"t2": 4, "t1": 3, "flair": 1, "t1ce": 2}
    one = PreferenceEstimator(NAMES, by_name, mode="official")
    two = PreferenceEstimator(NAMES, torch.tensor([1, 2, 3, 4]), mode="official")
    assert torch.equal(one.presence_counts, two.presence_counts)


# --- report


def test_preference_reads_as_numbers_by_name_and_as_a_table() -> None:
    estimator = PreferenceEstimator(("flair", "t1ce"))
    estimator.update(torch.tensor([[0.1, 0.3]]), torch.tensor([[True, True]]))
    preference = estimator.end_epoch()
    assert isinstance(preference, EpochReport)
    rows = preference.as_dict()
    assert list(rows) == ["flair", "t1ce"]
    assert rows["t1ce"]["relative_preference"] == pytest.approx(-0.5)
    assert rows["flair"]["count"] == 1
    lines = str(preference).splitlines()
    assert lines[0] == "epoch 0"
    assert lines[3].split()[0] == "t1ce"
    assert "-0.5000" in lines[3]


# --- several processes


def _one_rank(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{path}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    estimator = PreferenceEstimator(NAMES)
    for distance, presence in random_batches(4, batch=4, seed=9):
        estimator.update(distance[rank::2], presence[rank::2])
    first = estimator.end_epoch()
    # The second epoch is empty on rank 0 only: all ranks must still agree that it was not empty.
    if rank == 1:
        estimator.update(*random_batches(1, batch=4, seed=10)[0])
    second = estimator.end_epoch()
    torch.save({"betas": [first.beta, second.beta], "counts": first.counts}, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_with_half_batches_equal_one_process(tmp_path: Path) -> None:
    # Forking saves two imports of torch; elsewhere than on Linux it is not safe.
    method = "fork" if sys.platform == "linux" else "spawn"
    torch.multiprocessing.start_processes(_one_rank, (str(tmp_path),), nprocs=2, start_method=method)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    estimator = PreferenceEstimator(NAMES)
    for distance, presence in random_batches(4, batch=4, seed=9):
        estimator.update(distance, presence)
    first = estimator.end_epoch()
    estimator.update(*random_batches(1, batch=4, seed=10)[0])
    expected = [first.beta, estimator.end_epoch().beta]
    for result in results:
        assert torch.equal(result["counts"], first.counts)
        for beta, reference in zip(result["betas"], expected, strict=True):
            torch.testing.assert_close(beta, reference, rtol=1e-13, atol=0)
    assert all(map(torch.equal, results[0]["betas"], results[1]["betas"]))

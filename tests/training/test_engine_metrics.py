"""What a logger gets: stable names, plain floats, nothing that does not exist, and no wait before it is asked for."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from models import NAMES, MeanNet, batch, options_of, spec_of
from passion_plugin import attach
from passion_plugin.training import EpochReport, LossTerms, Strategy
from passion_plugin.training._metrics import epoch_metrics, flatten
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
# flair has a partner in two samples, t1ce in two, t1 in none that has another modality.
MIXED = [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
TERMS = ("pixel", "prototype", "distance", "unimodal", "gate")


class Halving(Strategy):
    """Halves the gradient of one encoder at every step anew."""

    name = "halving"
    scales_encoders = True

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def factors(self, step: Any, labels: Tensor) -> dict[str, Tensor]:
        self.factor /= 2
        return {"t1ce": torch.tensor(self.factor)}


def wrap(strategy: Any = None) -> PassionWrapper:
    net = MeanNet(M)
    options = {"strategy": strategy} if isinstance(strategy, Strategy) else options_of(strategy)
    return PassionWrapper(net, M, missing_rates=[0.5] * 3, spec=spec_of(net), **options)


def step(model: Any, presence: list[list[int]], seed: int = 0) -> None:
    x, mask, y = batch(presence, seed=seed)
    (model(x, mask).square().mean() + model.passion_loss(y)).backward()


def test_levels_are_joined_and_what_is_no_number_is_left_out() -> None:
    assert flatten({"pixel": {"flair": 0.5, "t1": math.nan}, "gate": {"t1": 1.0}}) == {
        "pixel/flair": 0.5,
        "gate/t1": 1.0,
    }


def test_an_epoch_keeps_every_weight_and_the_preferences_that_were_measured() -> None:
    beta, preference = torch.tensor([0.5, 1.0, 1.5]), torch.tensor([0.25, 0.0, -0.25])
    distance, counts = torch.tensor([3.0, math.nan, 5.0]), torch.tensor([2.0, 0.0, 1.0])
    assert epoch_metrics(EpochReport(M, 4, beta, preference, distance, counts)) == {
        "epoch": 4.0,
        "beta/flair": 0.5,
        "beta/t1ce": 1.0,
        "beta/t1": 1.5,
        "relative_preference/flair": 0.25,
        "relative_preference/t1": -0.25,
        "epoch_distance/flair": 3.0,
        "epoch_distance/t1": 5.0,
    }


def test_there_is_nothing_before_the_first_step() -> None:
    assert wrap().passion.metrics() == {}
    assert wrap("ogm-ge").passion.metrics() == {}


def test_a_step_gives_the_means_of_the_terms_of_what_was_there() -> None:
    model = wrap()
    step(model, MIXED)
    terms, metrics = model.passion.loss_terms(), model.passion.metrics()
    assert set(metrics) == {f"{term}/{name}" for term in TERMS for name in ("flair", "t1ce")}
    assert all(type(value) is float for value in metrics.values())
    for column, name in enumerate(("flair", "t1ce")):
        for term in TERMS:
            first, second, _ = getattr(terms, term)[:, column].tolist()
            assert metrics[f"{term}/{name}"] == pytest.approx((first + second) / 2)
    assert metrics["gate/flair"] + metrics["gate/t1ce"] == 1, "of two modalities one lags behind, in each sample"


def test_the_last_epoch_stays_until_the_next_one_ends() -> None:
    model = wrap()
    step(model, MIXED)
    first = model.end_epoch()
    metrics = model.passion.metrics()
    assert metrics["epoch"] == 0
    for name in M:
        assert metrics[f"beta/{name}"] == first.as_dict()[name]["beta"]
    assert metrics["relative_preference/flair"] == first.as_dict()["flair"]["relative_preference"] != 0
    assert metrics["epoch_distance/flair"] == first.as_dict()["flair"]["distance"] > 0
    assert not {"relative_preference/t1", "epoch_distance/t1"} & metrics.keys()
    assert metrics["pixel/flair"] == pytest.approx(model.passion.loss_terms().means()["pixel"]["flair"])
    step(model, MIXED, seed=1)
    later = model.passion.metrics()
    assert later["pixel/flair"] != metrics["pixel/flair"]
    assert later["beta/flair"] == metrics["beta/flair"]
    model.end_epoch()
    assert model.passion.metrics()["epoch"] == 1
    assert model.passion.metrics()["beta/flair"] != metrics["beta/flair"]


def test_a_step_without_students_leaves_no_old_terms() -> None:
    model = wrap()
    step(model, MIXED)
    step(model, [[1, 0, 0], [0, 1, 0]])
    assert model.passion.metrics() == {}


def test_a_rule_gives_its_last_factors_and_their_means() -> None:
    model = wrap(Halving())
    step(model, MIXED)
    assert model.passion.metrics() == {"factor/t1ce": 0.5}
    step(model, MIXED)
    assert model.passion.metrics() == {"factor/t1ce": 0.25}
    model.end_epoch()
    betas = {"beta/flair": 1.0, "beta/t1ce": 0.375, "beta/t1": 1.0}
    assert model.passion.metrics() == {"factor/t1ce": 0.25, "epoch": 0.0, **betas}


@pytest.mark.parametrize(
    ("rule", "of_step", "of_epoch"),
    [
        ("plain", set(), set()),
        ("ogm-ge", {"factor"}, set()),
        ("agm", {"factor"}, set()),
        ("pmr", {"factor"}, set()),
        ("redcore", set(), {"relative_preference", "epoch_distance"}),
        ("passion-pixel", set(TERMS), {"relative_preference", "epoch_distance"}),
    ],
)
def test_every_rule_logs_what_it_has(rule: str, of_step: set[str], of_epoch: set[str]) -> None:
    model = wrap(rule)
    step(model, MIXED)
    pair = ("flair", "t1ce")
    names = {f"{quantity}/{name}" for quantity in of_step for name in pair}
    assert set(model.passion.metrics()) == names
    report = model.end_epoch()
    metrics = model.passion.metrics()
    names |= {f"{quantity}/{name}" for quantity in of_epoch for name in pair}
    assert set(metrics) == names | {f"beta/{name}" for name in M} | {"epoch"}
    assert [metrics[f"beta/{name}"] for name in M] == report.beta.tolist()
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_nothing_is_read_from_the_device_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    means, to_float = LossTerms.means, Tensor.__float__
    monkeypatch.setattr(LossTerms, "means", lambda terms: asked.append("means") or means(terms))  # type: ignore[func-returns-value]
    monkeypatch.setattr(Tensor, "__float__", lambda tensor: asked.append("float") or to_float(tensor))  # type: ignore[func-returns-value]
    for strategy, wanted in ((None, "means"), (Halving(), "float")):
        model = wrap(strategy)
        asked.clear()
        step(model, MIXED)
        assert asked == []
        model.passion.metrics()
        assert wanted in asked


def test_an_attached_engine_logs_the_same() -> None:
    wrapped = wrap()
    bare = copy.deepcopy(wrapped.backbone)
    passion = attach(bare, modalities=M, missing_rates=[0.5] * 3, spec=spec_of(bare))
    x, mask, y = batch(MIXED)
    bare(x, mask)
    passion.loss(y)
    passion.end_epoch()
    step(wrapped, MIXED)
    wrapped.end_epoch()
    assert passion.metrics() == wrapped.passion.metrics()


def test_copies_log_what_the_original_does() -> None:
    for strategy in (None, "ogm-ge"):
        model = wrap(strategy)
        step(model, MIXED)
        model.end_epoch()
        assert copy.deepcopy(model).passion.metrics() == model.passion.metrics()
        assert pickle.loads(pickle.dumps(model)).passion.metrics() == model.passion.metrics()

"""Checkpoints: files of the add-on, states that do not fit, distributed checkpoints, averages and copies."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import NAMES, MeanNet, batch, copies_gradients, options_of, spec_of
from passion_plugin import attach, get_passion_state_dict, set_passion_state_dict
from passion_plugin.baselines import AGM, OGMGE, PMR, RedCore
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError, PassionWarning, UsageError
from passion_plugin.training import Strategy
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]
RULES = [None, "plain", "ogm-ge", "agm", "pmr", "redcore"]


def options(rule: Any = None, heads: bool = False, names: tuple[str, ...] = M, **config: Any) -> dict[str, Any]:
    net = MeanNet(names)
    given: dict[str, Any] = {"spec": spec_of(net, students="heads" if heads else "replay")}
    if heads:
        given["example_input"], given["example_mask"], _ = batch([[1] * len(names)] * 2)
    named = options_of(rule, PassionConfig(**config)) if not isinstance(rule, Strategy) else {"strategy": rule}
    given |= {"missing_rates": (0.2,) * len(names), **named}
    return {"modalities": names, **given}


def wrap(rule: Any = None, heads: bool = False, names: tuple[str, ...] = M, **config: Any) -> PassionWrapper:
    return PassionWrapper(MeanNet(names, dropout=0.1), **options(rule, heads, names, **config))


def train(model: Any, steps: int = 3, optimizer: torch.optim.Optimizer | None = None) -> None:
    """An epoch of two steps, and what is left of a second one."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    for index in range(steps):
        x, mask, y = batch(MIXED, seed=index)
        loss = F.cross_entropy(model(x, mask), y) + model.passion_loss(y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if index == 1:
            model.end_epoch()


def trained(rule: Any = None, heads: bool = False, **config: Any) -> PassionWrapper:
    model = wrap(rule, heads, **config)
    train(model)
    return model


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert type(found) is type(expected)
        assert found == expected


def refused(model: PassionWrapper, load: Callable[[], object]) -> str:
    """The message of the error; nothing may have changed."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError) as caught:
        load()
    assert_same(model.state_dict(), before)
    return str(caught.value)


def roundtrip(state: Any) -> Any:
    """What a file gives back, read without trust."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class TestAddOn:
    @pytest.mark.parametrize(("rule", "heads"), [(None, True), *((rule, False) for rule in RULES)])
    def test_the_state_comes_back_through_a_file(self, rule: Any, heads: bool) -> None:
        model, other = trained(rule, heads), wrap(rule, heads)
        assert model.passion.strategy.epoch == 1
        set_passion_state_dict(other, roundtrip(get_passion_state_dict(model)))
        assert_same(get_passion_state_dict(other), get_passion_state_dict(model))
        assert_same(other.passion.strategy.state_dict(), model.passion.strategy.state_dict())

    def test_it_is_the_state_of_the_engine_and_holds_nothing_of_the_backbone(self) -> None:
        model = trained(heads=True)
        state = get_passion_state_dict(model)
        assert {name.partition(".")[0] for name in state} == {"heads", "_extra_state"}
        assert_same(state, dict(model.passion.state_dict()))
        assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "passion"}
        assert all(model.state_dict()[f"passion.{name}"] is not None for name in state)

    def test_an_attached_engine_and_a_wrapper_share_states(self) -> None:
        model, network = trained(), MeanNet(M)
        engine = attach(network, **options())
        set_passion_state_dict(network, get_passion_state_dict(model.passion))
        assert_same(engine.strategy.state_dict(), model.passion.strategy.state_dict())

    def test_names_of_modalities_may_hold_anything(self) -> None:
        names = ("a/b", "a~1b", "α .")
        spec = spec_of(MeanNet(M), encoders=dict(zip(names, (f"encoders.{name}" for name in M), strict=True)))
        models = [PassionWrapper(MeanNet(M), **options("pmr") | {"modalities": names, "spec": spec}) for _ in range(2)]
        train(models[0])
        set_passion_state_dict(models[1], roundtrip(get_passion_state_dict(models[0])))
        assert_same(models[1].passion.strategy.state_dict(), models[0].passion.strategy.state_dict())

    def test_only_our_models_have_such_a_state(self) -> None:
        for model in (MeanNet(M), None):
            for call in (get_passion_state_dict, lambda one: set_passion_state_dict(one, {})):
                with pytest.raises(UsageError, match=f"no PassionWrapper in this {type(model).__name__}"):
                    call(model)
        with pytest.raises(UsageError, match="there are 2 engines in this ModuleList: '0', '1'"):
            get_passion_state_dict(torch.nn.ModuleList([wrap(), wrap()]))

    def test_the_model_may_be_inside_of_what_a_trainer_makes_of_it(self) -> None:
        pl = pytest.importorskip("lightning.pytorch")

        class Task(pl.LightningModule):
            def __init__(self, network: PassionWrapper) -> None:
                super().__init__()
                self.network = network

        model = trained()
        for put in (Task, AveragedModel, lambda it: torch.compile(it, backend="eager")):
            inside = put(wrap())
            set_passion_state_dict(inside, get_passion_state_dict(put(model)))
            assert_same(get_passion_state_dict(inside), get_passion_state_dict(model))

    @pytest.mark.parametrize("rule", [None, "pmr", "redcore"])
    def test_numbers_of_numpy_come_back(self, rule: Any) -> None:
        weight, growth, every = np.float64(0.25), np.float32(1.25), np.int64(7)
        config: dict[str, Any] = {}
        given: list[Any] = [None, None]
        if rule is None:
            config = {"pixel_weight": weight, "eta_growth": growth, "eta_every": every, "warmup_epochs": np.int32(0)}
        elif rule == "pmr":
            given = [PMR(weight, entropy_weight=growth, entropy_epochs=every) for _ in range(2)]
        else:
            given = [RedCore(weight, eta_growth=growth, eta_every=every) for _ in range(2)]
        model, other = wrap(given[0], **config), wrap(given[1], **config)
        train(model)
        set_passion_state_dict(other, roundtrip(get_passion_state_dict(model)))
        assert_same(get_passion_state_dict(other), get_passion_state_dict(model))
        kinds = {type(value) for value in get_passion_state_dict(other)["_extra_state"]["settings"].values()}
        assert kinds <= {bool, int, float, str}
        other.load_state_dict(roundtrip(model.state_dict()))
        assert_same(other.state_dict(), model.state_dict())

    def test_it_is_a_copy_with_heads_too(self) -> None:
        model = trained(heads=True)
        state = get_passion_state_dict(model)
        before = copy.deepcopy(state)
        train(model)
        assert_same(state, before)
        name = "0.classifier.weight"
        assert not torch.equal(model.passion.heads.state_dict()[name], state[f"heads.{name}"])


class TestWhatDoesNotFit:
    def test_names_of_modalities_decide(self) -> None:
        state, model = trained().state_dict(), wrap(names=(M[1], M[0], M[2]))
        message = r"saved for \['flair', 't1ce', 't1'\], this model has \['t1ce', 'flair', 't1'\]"
        assert re.search(message, refused(model, lambda: model.load_state_dict(state)))
        state = get_passion_state_dict(trained())
        assert re.search(message, refused(model, lambda: set_passion_state_dict(model, state)))

    @pytest.mark.parametrize(
        "state", [None, 1, {}, {"modalities": list(M)}, {"_extra_state": 1}, {"_extra_state": {"modalities": list(M)}}]
    )
    def test_what_is_no_such_state_is_refused(self, state: Any) -> None:
        model = trained()
        assert "get_passion_state_dict()" in refused(model, lambda: set_passion_state_dict(model, state))

    def test_the_state_of_a_backbone_is_refused(self) -> None:
        model = trained()
        message = refused(model, lambda: set_passion_state_dict(model, model.backbone.state_dict()))
        assert "get_passion_state_dict()" in message

    def test_heads_must_fit(self) -> None:
        model, without = trained(heads=True), trained()
        message = refused(model, lambda: set_passion_state_dict(model, get_passion_state_dict(without)))
        assert "its heads do not fit this model: missing entries" in message
        assert "unknown entries" in refused(
            without, lambda: set_passion_state_dict(without, get_passion_state_dict(model))
        )

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
    @pytest.mark.parametrize("packed", [b"", b"PK nonsense", pickle.dumps(print)], ids=["empty", "text", "code"])
    def test_broken_bytes_are_refused_and_code_is_not_run(self, packed: bytes) -> None:
        model = trained("agm")
        state = model.state_dict()
        state["passion._extra_state"]["strategy_state"] = packed
        assert "strategy_state cannot be read" in refused(model, lambda: model.load_state_dict(state))

    def test_a_state_of_the_future_is_named(self) -> None:
        model = trained()
        state = get_passion_state_dict(model)
        state["_extra_state"]["version"] = 99
        assert "version 99 was written by a newer release" in refused(
            model, lambda: set_passion_state_dict(model, state)
        )

    @pytest.mark.parametrize("rule", RULES, ids=str)
    def test_a_damaged_state_of_a_strategy_changes_nothing(self, rule: Any) -> None:
        model = trained(rule)
        strategy, state = model.passion.strategy, model.passion.strategy.state_dict()
        for key, value in state.items():
            lacking = {name: other for name, other in state.items() if name != key}
            odd: list[Any] = [{**state, key: "text"}]
            if isinstance(value, Tensor):
                odd.append({**state, key: torch.zeros(7, dtype=value.dtype)})
            for wrong in (lacking, *odd):
                message = refused(model, lambda: strategy.load_state_dict(wrong))  # noqa: B023
                assert key in message or key == "modalities"


CONFIGS: list[dict[str, Any]] = [
    {"mode": "official"},
    {"temperature": 3.0},
    {"pixel_weight": 0.1},
    {"rarity_weights": False},
    {"eta": 0.5},
    {"beta_max": 3.0},
    {"warmup_epochs": 2},
    {"modulation": "encoder"},
]


class TestSettings:
    """A checkpoint is also loaded to predict, or to go on with other weights: settings that differ are a warning."""

    @pytest.mark.parametrize("config", CONFIGS, ids=lambda config: next(iter(config)))
    @pytest.mark.parametrize("how", ["add-on", "state_dict"])
    def test_other_settings_are_a_warning(self, config: dict[str, Any], how: str) -> None:
        saved, model = trained(**config), trained()
        ((name, value),) = config.items()
        load = {
            "add-on": lambda: set_passion_state_dict(model, get_passion_state_dict(saved)),
            "state_dict": lambda: model.load_state_dict(saved.state_dict()),
        }[how]
        with pytest.warns(PassionWarning, match=f"{name} was {value!r} and is {getattr(PassionConfig(), name)!r}"):
            load()
        assert torch.equal(model.passion.preference.beta, saved.passion.preference.beta)

    @pytest.mark.parametrize("config", CONFIGS, ids=lambda config: next(iter(config)))
    def test_for_inference_any_settings_predict_the_same(self, config: dict[str, Any]) -> None:
        saved, model = trained(**config), wrap()
        with pytest.warns(PassionWarning, match="other settings"):
            model.load_state_dict(saved.state_dict())
        x, mask, _ = batch(MIXED)
        assert torch.equal(model.eval()(x, mask), saved.eval()(x, mask))

    def test_a_setting_that_one_side_does_not_know_is_left_alone(self) -> None:
        saved, model = trained(), wrap()
        state = saved.state_dict()
        settings = state["passion._extra_state"]["settings"]
        del settings["subset_students"]  # as an older release wrote it
        settings["of_a_later_release"] = 3
        model.load_state_dict(state)
        assert_same(model.passion.strategy.state_dict(), saved.passion.strategy.state_dict())

    @pytest.mark.parametrize(
        "config",
        [{"memory": "low"}, {"skip_missing_encoders": False}, {"share_random_state": True}, {"backend": "eager"}],
        ids=lambda config: next(iter(config)),
    )
    def test_how_passes_are_run_is_no_setting(self, config: dict[str, Any]) -> None:
        saved, model = trained(**config), wrap()
        set_passion_state_dict(model, get_passion_state_dict(saved))
        model.load_state_dict(saved.state_dict())
        assert torch.equal(model.passion.preference.beta, saved.passion.preference.beta)

    @pytest.mark.parametrize(
        ("saved", "here", "message"),
        [
            (AGM(2.0), AGM(), "alpha was 2.0 and is 1.0"),
            (OGMGE(noise=False), OGMGE(), "noise was False and is True"),
            (PMR(momentum=0.5, entropy_epochs=1), PMR(), "momentum was 0.5 and is 0.9; entropy_epochs was 1"),
            (RedCore(eta=0.5), RedCore(), "eta was 0.5 and is 0.01"),
        ],
        ids=["agm", "ogm-ge", "pmr", "redcore"],
    )
    def test_other_options_of_a_rule_are_a_warning(self, saved: Any, here: Any, message: str) -> None:
        state, model = get_passion_state_dict(trained(saved)), wrap(here)
        with pytest.warns(PassionWarning, match=message):
            set_passion_state_dict(model, state)

    def test_the_state_of_another_strategy_is_left_out_with_a_warning(self) -> None:
        model = trained("agm")
        before = model.passion.strategy.state_dict()
        for other in (trained(), trained("pmr")):
            with pytest.warns(PassionWarning, match=rf"strategy '{other.passion.strategy.name}', this model has 'agm'"):
                model.load_state_dict(other.state_dict())
            assert_same(model.passion.strategy.state_dict(), before)
            assert_same(model.backbone.state_dict(), other.backbone.state_dict())

    @pytest.mark.parametrize("rule", RULES, ids=str)
    def test_state_dict_holds_what_every_rule_keeps(self, rule: Any) -> None:
        saved, model = trained(rule), wrap(rule)
        model.load_state_dict(roundtrip(saved.state_dict()))
        assert_same(model.state_dict(), saved.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_distributed_checkpoint_brings_everything_back(rule: Any, tmp_path: Path) -> None:
    def everything(model: PassionWrapper, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        model_state, optimizer_state = dcp_state.get_state_dict(model, optimizer)
        return {"model": model_state, "optimizer": optimizer_state}

    model, other = wrap(rule), wrap(rule)
    first, second = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, other))
    train(model, 3, first)
    dcp.save(everything(model, first), checkpoint_id=tmp_path / "checkpoint")
    state = everything(other, second)
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
    dcp_state.set_state_dict(other, second, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert_same(other.state_dict(), model.state_dict())
    assert_same(get_passion_state_dict(other), get_passion_state_dict(model))
    assert_same(second.state_dict()["state"], first.state_dict()["state"])


class TestAverages:
    @pytest.mark.parametrize("use_buffers", [False, True], ids=["parameters", "buffers"])
    @pytest.mark.parametrize("modulation", ["distillation", "encoder"])
    def test_an_average_follows_and_is_the_bare_network(self, use_buffers: bool, modulation: Any) -> None:
        torch.manual_seed(0)
        net = MeanNet(M, norm="batch")
        model = PassionWrapper(net, **options(modulation=modulation))
        train(model, 1)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        expected = [p.detach().clone() for p in model.parameters()]
        statistic = net.decoder[1].running_mean
        expected_mean = statistic.clone()
        for step in range(3):
            train(model, 1, optimizer)
            average.update_parameters(model)
            rate = 1.0 if step == 0 else 0.5  # The first call copies.
            expected = [old.lerp(p.detach(), rate) for old, p in zip(expected, model.parameters(), strict=True)]
            # torch copies what it does not average.
            expected_mean = expected_mean.lerp(statistic, rate if use_buffers else 1.0)
        for found, wanted in zip(average.module.parameters(), expected, strict=True):
            torch.testing.assert_close(found.detach(), wanted)
        assert not torch.equal(average.module.classifier.weight, net.classifier.weight)
        torch.testing.assert_close(average.module.backbone.decoder[1].running_mean, expected_mean)

        bare = MeanNet(M, norm="batch").eval()
        bare.load_state_dict(average.module.backbone.state_dict())
        x, mask, _ = batch(MIXED)
        average.eval()
        assert torch.equal(average(x, mask), bare(x, mask))

    @pytest.mark.parametrize("modulation", ["distillation", "encoder"])
    def test_an_average_and_its_model_leave_each_other_alone(self, modulation: Any) -> None:
        torch.manual_seed(0)
        model = PassionWrapper(MeanNet(M), **options(modulation=modulation))
        alone = copy.deepcopy(model)
        x, mask, y = batch(MIXED)
        # Within a step, when the hooks of the modulation are in place.
        loss = F.cross_entropy(model(x, mask), y) + model.passion_loss(y)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        before = copy.deepcopy(get_passion_state_dict(average))
        loss.backward()
        (F.cross_entropy(alone(x, mask), y) + alone.passion_loss(y)).backward()
        wanted = copies_gradients(alone)
        for name, gradient in copies_gradients(model).items():
            assert torch.equal(gradient, wanted[name]), name
        assert all(p.grad is None and not p._backward_hooks for p in average.module.parameters())
        assert not any("forward" in module.__dict__ for module in average.module.modules())
        train(model, 3)
        average.update_parameters(model)
        assert_same(get_passion_state_dict(average), before)
        assert average.module.passion.backbone is average.module.backbone

    def test_a_training_with_an_average_resumes(self, tmp_path: Path) -> None:
        model = trained()
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        train(model, 1)
        average.update_parameters(model)
        torch.save(average.state_dict(), tmp_path / "average.pt")
        other = AveragedModel(wrap(), multi_avg_fn=get_ema_multi_avg_fn(0.9))
        other.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
        assert_same(other.state_dict(), average.state_dict())


class TestCopiesWithinAStep:
    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
    @pytest.mark.parametrize("rule", [None, "ogm-ge"], ids=["beta on encoders", "factors on encoders"])
    def test_between_loss_and_backward(self, how: str, rule: Any) -> None:
        config = {} if rule else {"modulation": "encoder"}
        model = wrap(OGMGE(noise=False) if rule else None, **config)
        train(model)
        alone = copy.deepcopy(model)
        x, mask, y = batch(MIXED)

        def loss_of(one: PassionWrapper) -> Tensor:
            torch.manual_seed(3)
            return F.cross_entropy(one(x, mask), y) + one.passion_loss(y)

        loss_of(alone).backward()
        wanted = copies_gradients(alone)
        loss = loss_of(model)
        assert any(p._backward_hooks for p in model.parameters())
        if how == "deepcopy":
            other = copy.deepcopy(model)
        else:
            buffer = io.BytesIO()
            (torch.save if how == "torch.save" else pickle.dump)(model, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False) if how == "torch.save" else pickle.load(buffer)
        # The copy has the statistics of this step, and no hooks of it.
        assert_same(get_passion_state_dict(other), get_passion_state_dict(model))
        assert not any(p._backward_hooks for p in other.parameters())
        with pytest.raises(UsageError, match="nothing to compute"):
            other.passion_loss(y)
        loss.backward()
        for name, gradient in copies_gradients(model).items():
            assert torch.equal(gradient, wanted[name]), name
        assert all(p.grad is None for p in other.parameters())
        loss_of(other).backward()
        loss_of(model).backward()
        wanted = copies_gradients(model)
        for name, gradient in copies_gradients(other).items():
            assert torch.equal(gradient, wanted[name]), name

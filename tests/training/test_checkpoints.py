"""Checkpoints: files of the add-on, states that do not fit, distributed checkpoints, averages and copies."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import struct
import sys
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

from models import NAMES, MeanNet, batch, copies_gradients, spec_of
from passion_plugin.baselines import AGM, OGMGE, PMR, RedCore
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError, UsageError
from passion_plugin.training import load_addon, read_addon, save_addon
from passion_plugin.training._engine import find_engine
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]
SUFFIXES = ["pt", "safetensors"]
RULES = [None, "plain", "ogm-ge", "agm", "pmr", "redcore"]


def options(rule: Any = None, heads: bool = False, names: tuple[str, ...] = M, **config: Any) -> dict[str, Any]:
    net = MeanNet(names)
    given: dict[str, Any] = {"spec": spec_of(net, students="heads" if heads else "replay")}
    if heads:
        given["example_input"], given["example_mask"], _ = batch([[1] * len(names)] * 2)
    given |= {"missing_rates": (0.2,) * len(names), "strategy": rule, "config": PassionConfig(**config)}
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


class TestFiles:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.parametrize(("rule", "heads"), [(None, True), *((rule, False) for rule in RULES)])
    def test_the_state_comes_back(self, rule: Any, heads: bool, suffix: str, tmp_path: Path) -> None:
        model, other = trained(rule, heads), wrap(rule, heads)
        save_addon(model, tmp_path / f"addon.{suffix}")
        assert [path.name for path in tmp_path.iterdir()] == [f"addon.{suffix}"]
        assert model.passion.strategy.epoch == 1
        load_addon(other, str(tmp_path / f"addon.{suffix}"))
        assert sorted(get_passion_state_dict(other)) == sorted(get_passion_state_dict(model))
        assert_same(get_passion_state_dict(other), get_passion_state_dict(model))

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_an_attached_engine_and_a_wrapper_share_files(self, suffix: str, tmp_path: Path) -> None:
        model = trained()
        save_addon(model.passion, tmp_path / f"addon.{suffix}")
        engine = attach(MeanNet(M), **options())
        load_addon(engine, tmp_path / f"addon.{suffix}")
        assert_same(engine.state_dict(), get_passion_state_dict(model))

    def test_the_tensors_are_readable_without_this_library(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file

        model = trained(heads=True)
        save_addon(model, tmp_path / "addon.safetensors")
        tensors = load_file(tmp_path / "addon.safetensors")
        assert torch.equal(tensors["preference/beta"], model.passion.preference.beta)
        assert {name.split("/")[0] for name in tensors} == {"preference", "heads"}
        assert len(tensors) == 3 + len(model.passion.heads.state_dict())

    def test_names_of_modalities_may_hold_anything(self, tmp_path: Path) -> None:
        names = ("a/b", "a~1b", "α .")
        spec = spec_of(MeanNet(M), encoders=dict(zip(names, (f"encoders.{name}" for name in M), strict=True)))
        changed = {"modalities": names, "spec": spec}
        models = [PassionWrapper(MeanNet(M), **options("pmr") | changed) for _ in range(2)]
        train(models[0])
        save_addon(models[0], tmp_path / "addon.safetensors")
        load_addon(models[1], tmp_path / "addon.safetensors")
        assert_same(models[1].addon_state_dict(), models[0].addon_state_dict())

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_a_failed_save_leaves_the_file_before_and_nothing_else(
        self, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / f"addon.{suffix}"
        model = trained()
        save_addon(model, path)
        before = path.read_bytes()
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save_addon(model, path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_what_safetensors_cannot_hold_is_named(self, tmp_path: Path) -> None:
        class Odd(AGM):
            state_keys = (*AGM.state_keys, "pair")
            pair = (1, 2)

        with pytest.raises(
            ConfigError, match=r"cannot hold 'strategy_state/pair', a tuple: use a name that ends in \.pt"
        ):
            save_addon(wrap(Odd()), tmp_path / "addon.safetensors")
        assert not list(tmp_path.iterdir())

    def test_the_extra_is_named_where_safetensors_is_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_addon(trained(), tmp_path / "addon.safetensors")
        for name in ("safetensors", "safetensors.torch"):
            monkeypatch.setitem(sys.modules, name, None)
        for call in (save_addon, load_addon):
            with pytest.raises(ImportError, match=r'pip install "passion-plugin\[safetensors\]"'):
                call(wrap(), tmp_path / "addon.safetensors")

    @pytest.mark.parametrize("call", [save_addon, load_addon])
    def test_only_our_models_have_such_a_state(self, call: Any, tmp_path: Path) -> None:
        for model in (MeanNet(M), None):
            with pytest.raises(UsageError, match=f"no PassionWrapper in this {type(model).__name__}"):
                call(model, tmp_path / "addon.pt")
        with pytest.raises(UsageError, match="there are 2 engines in this ModuleList: '0', '1'"):
            call(torch.nn.ModuleList([wrap(), wrap()]), tmp_path / "addon.pt")
        assert not list(tmp_path.iterdir())

    def test_the_model_may_be_inside_of_what_a_trainer_makes_of_it(self, tmp_path: Path) -> None:
        pl = pytest.importorskip("lightning.pytorch")

        class Task(pl.LightningModule):
            def __init__(self, network: PassionWrapper) -> None:
                super().__init__()
                self.network = network

        model = trained()
        around = [Task, AveragedModel, lambda it: torch.compile(it, backend="eager")]
        for put in around:
            other = wrap()
            save_addon(put(model), tmp_path / "addon.pt")
            load_addon(inside := put(other), tmp_path / "addon.pt")
            assert_same(find_engine(inside).state_dict(), get_passion_state_dict(model))

    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.parametrize("rule", [None, "pmr", "redcore"])
    def test_numbers_of_numpy_come_back(self, rule: Any, suffix: str, tmp_path: Path) -> None:
        weight, growth, every = np.float64(0.25), np.float32(1.25), np.int64(7)
        config: dict[str, Any] = {}
        strategy: Any = rule
        if rule is None:
            config = {"pixel_weight": weight, "eta_growth": growth, "eta_every": every, "warmup_epochs": np.int32(0)}
        elif rule == "pmr":
            strategy = [PMR(weight, entropy_weight=growth, entropy_epochs=every) for _ in range(2)]
        else:
            strategy = [RedCore(weight, eta_growth=growth, eta_every=every) for _ in range(2)]
        given = strategy or [None, None]
        model, other = wrap(given[0], **config), wrap(given[1], **config)
        train(model)
        save_addon(model, tmp_path / f"addon.{suffix}")
        load_addon(other, tmp_path / f"addon.{suffix}")
        assert_same(get_passion_state_dict(other), get_passion_state_dict(model))
        kinds = {type(value) for value in get_passion_state_dict(other)["settings"].values()}
        assert kinds <= {bool, int, float, str}
        torch.save(model.state_dict(), tmp_path / "whole.pt")
        other.load_state_dict(torch.load(tmp_path / "whole.pt", weights_only=True))
        assert_same(other.state_dict(), model.state_dict())


class TestStrangers:
    """Files made by nobody or by an enemy."""

    class Bomb:
        def __init__(self, path: Path) -> None:
            self.path = path

        def __reduce__(self) -> Any:
            return open, (str(self.path), "w")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
    @pytest.mark.parametrize("how", ["torch.save", "pickle", "inside a state"])
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_code_in_a_file_is_not_run(self, how: str, suffix: str, tmp_path: Path) -> None:
        model, path, mark = wrap(), tmp_path / f"addon.{suffix}", tmp_path / "mark"
        bomb: Any = self.Bomb(mark)
        if how == "pickle":
            path.write_bytes(pickle.dumps(bomb))
        else:
            state = {**get_passion_state_dict(model), "more": bomb} if how == "inside a state" else bomb
            torch.save(state, path)
        assert "cannot be read as an add-on state" in refused(model, lambda: load_addon(model, path))
        assert not mark.exists()
        if how == "pickle":
            pickle.loads(path.read_bytes()).close()
            assert mark.exists(), "the file was no bomb"

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_files_that_are_cut_off_are_refused(self, suffix: str, tmp_path: Path) -> None:
        model, path = trained(heads=True), tmp_path / f"addon.{suffix}"
        save_addon(model, path)
        content = path.read_bytes()
        for length in {0, 1, 7, 8, 9, *range(10, len(content), len(content) // 20), len(content) - 1}:
            path.write_bytes(content[:length])
            assert "cannot be read as an add-on state" in refused(model, lambda: load_addon(model, path))

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_damaged_files_are_read_or_refused_by_us(self, suffix: str, tmp_path: Path) -> None:
        model, path = trained(), tmp_path / f"addon.{suffix}"
        save_addon(model, path)
        content = path.read_bytes()
        generator = torch.Generator().manual_seed(0)
        errors = 0
        for _ in range(150):
            # Most of what can go wrong is in the first kilobyte: headers, names, the pickle.
            place = int(torch.randint(min(len(content), 1200), (), generator=generator))
            byte = int(torch.randint(256, (), generator=generator))
            path.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
            before = copy.deepcopy(get_passion_state_dict(model))
            try:
                load_addon(model, path)
            except ConfigError:
                errors += 1
                assert_same(get_passion_state_dict(model), before)
        assert errors > 30

    @pytest.mark.parametrize(
        "content",
        [b"", b"\0" * 100, b"not a checkpoint\n", b"PK\x03\x04 cut", b"\x80\x02" + b"]" * 5000 + b"."],
        ids=["empty", "zeros", "text", "zip", "brackets"],
    )
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_files_of_another_kind_are_refused(self, content: bytes, suffix: str, tmp_path: Path) -> None:
        model, path = wrap(), tmp_path / f"addon.{suffix}"
        path.write_bytes(content)
        assert str(path) in refused(model, lambda: load_addon(model, path))

    def test_a_format_under_the_name_of_the_other_is_refused(self, tmp_path: Path) -> None:
        model = wrap()
        for suffix, other in itertools.permutations(SUFFIXES):
            save_addon(model, tmp_path / f"right.{suffix}")
            (tmp_path / f"right.{suffix}").rename(tmp_path / f"wrong.{other}")
            message = refused(model, lambda: load_addon(model, tmp_path / f"wrong.{other}"))  # noqa: B023
            assert "cannot be read" in message

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_a_file_that_is_not_there_is_the_usual_error(self, suffix: str, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            load_addon(wrap(), tmp_path / f"none.{suffix}")
        (tmp_path / f"folder.{suffix}").mkdir()
        with pytest.raises(IsADirectoryError):
            load_addon(wrap(), tmp_path / f"folder.{suffix}")

    @pytest.mark.parametrize("length", [0, 3, 1 << 22, (1 << 22) + 1, 1 << 40, (1 << 63) + 5, (1 << 64) - 1])
    def test_absurd_header_lengths_are_refused(self, length: int, tmp_path: Path) -> None:
        model, path = wrap(), tmp_path / "addon.safetensors"
        path.write_bytes(struct.pack("<Q", length) + b'{"a": 1}')
        message = refused(model, lambda: load_addon(model, path))
        assert ("header has" in message) == (length > 1 << 22)

    @pytest.mark.parametrize(
        "text",
        ["[" * 200_000, '{"format":' * 100_000, "1" * 100_000, "NaN", "[]", "null", '"text"', "{", '{"format": 2}'],
        ids=["nested", "nested objects", "long number", "nan", "list", "null", "text", "cut", "format only"],
    )
    def test_hostile_json_in_the_header_is_refused(self, text: str, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        model, path = wrap(), tmp_path / "addon.safetensors"
        for tensors in ({}, {"preference/beta": torch.ones(3)}, {"format": torch.ones(1)}):
            save_file(tensors, path, metadata={"passion_plugin": text})
            assert len(refused(model, lambda: load_addon(model, path))) < 2000
        save_file({}, path)
        assert "KeyError" in refused(model, lambda: load_addon(model, path))

    def test_states_of_any_content_are_refused_with_a_short_message(self) -> None:
        deep: Any = []
        for _ in range(100_000):
            deep = [deep]
        for rule in (None, "agm", "pmr", "redcore"):
            model = trained(rule)
            state = get_passion_state_dict(model)
            for odd in (deep, "x" * 10**6, 10**5000, torch.ones(2, 3), torch.zeros(3).to_sparse(), {1: deep}, None):
                for key in state:
                    message = refused(model, lambda: model.load_addon_state_dict({**state, key: odd}))  # noqa: B023
                    assert len(message) < 2000
                part = "preference" if rule is None else "strategy_state"
                for key in state[part]:
                    changed = {**state, part: {**state[part], key: odd}}
                    message = refused(model, lambda: model.load_addon_state_dict(changed))  # noqa: B023
                    assert len(message) < 2000


class TestMisfits:
    def test_everything_that_differs_is_in_one_error(self) -> None:
        state = trained(temperature=2.0, gate=False).addon_state_dict()
        del state["heads"]
        state["surplus"] = 1
        model = wrap(heads=True, names=(M[1], M[0], M[2]))
        message = refused(model, lambda: set_passion_state_dict(model, state))
        assert "4 problems" in message
        assert "saved for ['flair', 't1ce', 't1'], this model has ['t1ce', 'flair', 't1']" in message
        assert "temperature: found 2.0, expected 4.0; gate: found False, expected True" in message
        assert "entries lacking: 'heads'" in message
        assert "entries unknown: 'surplus'" in message

    @pytest.mark.parametrize("rule", RULES, ids=str)
    def test_every_entry_is_needed(self, rule: Any) -> None:
        model = trained(rule)
        state = get_passion_state_dict(model)
        for key in state.keys() - {"format", "strategy"}:
            lacking = {name: value for name, value in state.items() if name != key}
            message = refused(model, lambda: model.load_addon_state_dict(lacking))  # noqa: B023
            assert "lacking" in message or key == "modalities"
            assert key in message or "saved for" in message
        part = "preference" if rule is None else "strategy_state"
        for key in state[part]:
            lacking = {**state, part: {name: value for name, value in state[part].items() if name != key}}
            assert key in refused(model, lambda: model.load_addon_state_dict(lacking))  # noqa: B023

    @pytest.mark.parametrize("version", [3, 99, 0, -1])
    def test_formats_of_the_future_are_named(self, version: int) -> None:
        model = wrap()
        message = refused(model, lambda: set_passion_state_dict(model, {"format": version, "something": "new"}))
        assert f"format {version}, this version reads 1 and 2" in message

    def test_format_1_had_no_settings(self) -> None:
        model, other = trained(temperature=2.0), wrap()
        state = get_passion_state_dict(model)
        del state["settings"]
        set_passion_state_dict(other, {**state, "format": 1})
        assert_same(get_passion_state_dict(other)["preference"], state["preference"])
        del state["heads"]
        assert "lacking: 'heads'" in refused(other, lambda: set_passion_state_dict(other, {**state, "format": 1}))

    @pytest.mark.parametrize(
        "config",
        [
            {"mode": "official"},
            {"temperature": 3.0},
            {"pixel_weight": 0.1},
            {"rarity_weights": False},
            {"eta": 0.5},
            {"beta_max": 3.0},
            {"warmup_epochs": 2},
            {"modulation": "encoder"},
        ],
        ids=lambda config: next(iter(config)),
    )
    @pytest.mark.parametrize("how", ["addon", "state_dict"])
    def test_another_configuration_is_refused(self, config: dict[str, Any], how: str) -> None:
        saved, model = trained(**config), trained()
        ((name, value),) = config.items()
        if how == "addon":
            message = refused(model, lambda: set_passion_state_dict(model, get_passion_state_dict(saved)))
        else:
            message = refused(model, lambda: model.load_state_dict(saved.state_dict()))
        assert f"{name}: found {value!r}, expected {getattr(PassionConfig(), name)!r}" in message
        # The way on that the message names.
        state = {**get_passion_state_dict(saved), "settings": get_passion_state_dict(model)["settings"]}
        set_passion_state_dict(model, state)
        assert torch.equal(model.passion.preference.beta, saved.passion.preference.beta)

    @pytest.mark.parametrize(
        "config",
        [{"memory": "low"}, {"skip_missing_encoders": False}, {"share_random_state": True}, {"backend": "eager"}],
        ids=lambda config: next(iter(config)),
    )
    def test_how_passes_are_run_may_change(self, config: dict[str, Any]) -> None:
        saved, model = trained(**config), wrap()
        set_passion_state_dict(model, get_passion_state_dict(saved))
        assert torch.equal(model.passion.preference.beta, saved.passion.preference.beta)
        model.load_state_dict(saved.state_dict())

    @pytest.mark.parametrize(
        ("saved", "here", "message"),
        [
            (AGM(2.0), AGM(), "alpha: found 2.0, expected 1.0"),
            (OGMGE(noise=False), OGMGE(), "noise: found False, expected True"),
            (PMR(momentum=0.5, entropy_epochs=1), PMR(), "momentum: found 0.5, expected 0.9; entropy_epochs: found 1"),
            (RedCore(eta=0.5), RedCore(), "eta: found 0.5, expected 0.01"),
        ],
        ids=["agm", "ogm-ge", "pmr", "redcore"],
    )
    def test_other_options_of_a_rule_are_refused(self, saved: Any, here: Any, message: str) -> None:
        state, model = trained(saved).addon_state_dict(), wrap(here)
        assert message in refused(model, lambda: set_passion_state_dict(model, state))

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_a_file_with_other_settings_can_be_taken_over_on_purpose(self, suffix: str, tmp_path: Path) -> None:
        saved, model, path = trained(eta=0.5), wrap(), tmp_path / f"addon.{suffix}"
        save_addon(saved, path)
        assert "eta: found 0.5, expected 0.01" in refused(model, lambda: load_addon(model, path))
        state = read_addon(path)
        set_passion_state_dict(model, {**state, "settings": get_passion_state_dict(model)["settings"]})
        assert_same(get_passion_state_dict(model)["preference"], get_passion_state_dict(saved)["preference"])

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
    @pytest.mark.parametrize("packed", [b"", b"PK nonsense", pickle.dumps(print)], ids=["empty", "text", "code"])
    def test_a_whole_state_with_broken_bytes_is_refused(self, packed: bytes) -> None:
        model = trained("agm")
        state = model.state_dict()
        state["_extra_state"]["strategy_state"] = packed
        assert "strategy_state cannot be read" in refused(model, lambda: model.load_state_dict(state))
        assert "not an add-on state" in refused(model, lambda: model.load_state_dict({**state, "_extra_state": 1}))

    def test_the_whole_state_of_another_model_changes_nothing(self) -> None:
        model = trained("agm")
        for other in (trained(), trained("pmr"), wrap("agm", names=(M[1], M[0], M[2]))):
            refused(model, lambda: model.load_state_dict(other.state_dict()))  # noqa: B023

    def test_a_whole_state_from_before_there_were_settings_loads(self) -> None:
        saved, model = trained(), wrap()
        state = saved.state_dict()
        del state["_extra_state"]
        assert str(model.load_state_dict(state)) == "<All keys matched successfully>"
        assert_same(get_passion_state_dict(model), get_passion_state_dict(saved))
        del state["preference._extra_state"]
        with pytest.raises(RuntimeError, match=r"Missing key.*preference\._extra_state"):
            model.load_state_dict(state)

    @pytest.mark.parametrize("rule", RULES, ids=str)
    def test_state_dict_holds_what_every_rule_keeps(self, rule: Any) -> None:
        saved, model = trained(rule), wrap(rule)
        buffer = io.BytesIO()
        torch.save(saved.state_dict(), buffer)
        buffer.seek(0)
        model.load_state_dict(torch.load(buffer, weights_only=True))
        assert_same(model.state_dict(), saved.state_dict())
        assert_same(get_passion_state_dict(model), get_passion_state_dict(saved))

    def test_the_whole_state_copies_no_heads_to_the_cpu_beside_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, other = trained(heads=True), wrap(heads=True)
        copied: list[Any] = []
        monkeypatch.setattr("passion_plugin.addon_state.cpu_copies", copied.append)
        other.load_state_dict(model.state_dict())
        assert copied == []
        assert_same(dict(other.passion.heads.state_dict()), dict(model.passion.heads.state_dict()))

    def test_the_addon_state_is_a_copy_with_heads_too(self) -> None:
        model = trained(heads=True)
        state = get_passion_state_dict(model)
        before = copy.deepcopy(state)
        train(model)
        assert_same(state, before)
        assert not torch.equal(
            model.passion.heads.state_dict()["0.classifier.weight"], state["heads"]["0.classifier.weight"]
        )


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
        before = copy.deepcopy(average.get_passion_state_dict(module))
        loss.backward()
        (F.cross_entropy(alone(x, mask), y) + alone.passion_loss(y)).backward()
        wanted = copies_gradients(alone)
        for name, gradient in copies_gradients(model).items():
            assert torch.equal(gradient, wanted[name]), name
        assert all(p.grad is None and not p._backward_hooks for p in average.module.parameters())
        assert not any("forward" in module.__dict__ for module in average.module.modules())
        train(model, 3)
        average.update_parameters(model)
        assert_same(average.get_passion_state_dict(module), before)
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

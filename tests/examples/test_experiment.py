"""The runner of experiments: cells, recipes, batches, resuming, the command line."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import passion_plugin
from examples.backbones import UHeMISLike
from examples.data import Cases, Cohort
from examples.experiment import runner
from examples.experiment.__main__ import main
from examples.experiment.cells import Cell, assignments, grid, parse_rates, shard
from examples.experiment.recipes import parse_recipe
from examples.experiment.store import Store, Study
from examples.experiment.views import Batches, centred, predict_whole
from examples.training import entropy_and_batch_dice
from passion_plugin.baselines import SlowWeights, strategy_names
from passion_plugin.data import PresenceTable, all_subsets, draw_presence, subset_mask
from passion_plugin.errors import ConfigError

MODALITIES = ("ct", "pet", "t1")
ROOT = Path(__file__).parents[2]


def read(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A patient whose images are 1, 2 and 3 everywhere, plus 10 inside the tumour of three of its ten slices."""
    label = np.zeros((10, 14, 12), dtype=np.int64)
    label[4:7, 5:9, 4:8] = 1
    label[5, 6:8, 5:7] = 2
    image = np.array([1, 2, 3]).reshape(3, 1, 1, 1) + 10 * (label > 0)
    return image.astype(np.float32), label, np.array([3.0, 2.0, 2.0], dtype=np.float32)


def cohort(fold: int = 0) -> Cohort:
    """Six training patients and two test patients, in slices."""
    return Cohort(
        name="boxes",
        modalities=MODALITIES,
        classes=("background", "rim", "core"),
        regions={"whole": (1, 2), "core": (2,)},
        missing_rates={"ct": 0.2, "pet": 0.6, "t1": 0.5},
        train=Cases([f"train_{fold}_{i}" for i in range(6)], read, least=1, multiple=1),
        test=Cases([f"test_{fold}_{i}" for i in range(2)], read, least=1, multiple=1),
        credit="nobody",
        steps=2,
        patch=16,
        ndim=2,
        batch_size=2,
        widths=(4, 4, 4, 4),
    )


def table() -> PresenceTable:
    return draw_presence([f"p{i}" for i in range(6)], {"ct": 0.2, "pet": 0.6, "t1": 0.5}, seed=0)


def batches(drawing: str, *, seed: int = 0, steps: int = 6) -> list[dict[str, torch.Tensor]]:
    return list(Batches(cohort().train, table(), drawing, (16, 16), batch_size=3, steps=steps, seed=seed))


class TestCells:
    def test_all_permutations_of_the_rates_each_once(self) -> None:
        rates = parse_rates(".2,.5,.8", MODALITIES)
        found = assignments([rates], permuted=True)
        assert len(found) == len(set(found)) == 6
        assert found[0] == "ct=0.2,pet=0.5,t1=0.8"
        assert len(assignments([parse_rates(".5,.5,.2", MODALITIES)], permuted=True)) == 3
        assert assignments([rates], permuted=False) == found[:1]

    def test_named_rates_may_come_in_any_order(self) -> None:
        assert parse_rates("t1=.5,ct=.2,pet=.8", MODALITIES) == {"ct": 0.2, "pet": 0.8, "t1": 0.5}

    @pytest.mark.parametrize(
        "text",
        [".2,.5", "ct=.2,pet=.8", "ct=.2,pat=.8,t1=.1", "a,b,c", "ct=.2,.5,.8", "ct=.2,ct=.3,t1=.5", "ct=.2,pet=,t1=1"],
    )
    def test_rates_that_do_not_fit_are_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match="rates"):
            parse_rates(text, MODALITIES)

    def cells(self) -> list[Cell]:
        return grid(
            backbones=["uhemis", "rfnet"],
            assignments=["ct=0.2,pet=0.8", "ct=0.8,pet=0.2"],
            folds=[0, 1],
            seeds=[0, 1],
            batch_sizes=[2],
            strategies=["plain", "passion", "even"],
        )

    def test_every_finished_block_has_all_strategies(self) -> None:
        cells = self.cells()
        assert len(set(cells)) == len({cell.key for cell in cells}) == 48
        for block, members in itertools.groupby(cells, key=lambda cell: cell.block):
            assert [cell.strategy for cell in members] == ["plain", "passion", "even"], block
        assert [cell.seed for cell in cells] == [0] * 24 + [1] * 24

    def test_shards_divide_the_cells_and_no_block(self) -> None:
        cells = self.cells()
        parts = [shard(cells, part, 3) for part in (1, 2, 3)]
        assert sorted(cell.key for part in parts for cell in part) == sorted(cell.key for cell in cells)
        blocks = [{cell.block for cell in part} for part in parts]
        assert not any(a & b for a, b in itertools.combinations(blocks, 2))
        assert all({cell.backbone for cell in part} == {"uhemis", "rfnet"} for part in parts)

    def test_keys_tell_apart_what_file_names_cannot(self) -> None:
        keys = {Cell("uhemis", "ct=0.2", 0, 0, 2, name).key for name in ("a:b", "a_b", "a/b", "a" * 300)}
        assert len(keys) == 4
        assert all(len(key) < 120 and "/" not in key and ":" not in key for key in keys)


class TestRecipes:
    def test_every_strategy_of_the_library_has_its_name(self) -> None:
        for name in strategy_names():
            recipe = parse_recipe(name)
            assert (recipe.rule, recipe.drawing) == (name, "all")
            assert (recipe.wrap(table(), None, entropy_and_batch_dice) is None) == (name == "plain")

    def test_short_names_and_drawings(self) -> None:
        assert (parse_recipe("even").rule, parse_recipe("even").drawing) == ("plain", "even")
        assert parse_recipe("drop") == parse_recipe("plain@drop")
        assert parse_recipe("passion@even").drawing == "even"
        assert not parse_recipe("even").slow
        for name in ("even+slow", "plain@even+slow", "passion@even+slow:temperature=2"):
            assert (parse_recipe(name).drawing, parse_recipe(name).slow) == ("even", True)

    def test_hyper_parameters_reach_the_rule(self) -> None:
        recipe = parse_recipe("passion@drop:temperature=2,modulation=none,gate=False")
        assert recipe.overrides == {"temperature": 2, "modulation": "none", "gate": False}
        assert recipe.parameters["temperature"] == 2
        assert recipe.parameters["pixel_weight"] == 0.5
        assert parse_recipe("passion-official:eta=0.02").parameters["mode"] == "official"
        assert parse_recipe("ogm-ge:alpha=.8").parameters == {"alpha": 0.8, "noise": True}

    def test_students_take_the_loss_of_the_network_where_that_is_asked_for(self) -> None:
        for name, wanted in (("passion", None), ("passion:own_loss=True", entropy_and_batch_dice)):
            recipe = parse_recipe(name)
            wrapped = recipe.wrap(table(), None, entropy_and_batch_dice)
            assert wrapped is not None
            model = wrapped(UHeMISLike(("ct", "pet", "t1"), ndim=2))
            assert model.passion.strategy.unimodal_loss is wanted
            assert recipe.parameters["own_loss"] is (wanted is not None)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("pasion", "'passion'"),
            ("passion@evn", "'even'"),
            ("passion@even+slwo", "'slwo' after the +"),
            ("passion:temprature=2", "'temperature'"),
            ("passion:temperature", "hyper-parameter=value"),
            ("passion:temperature=-1", "temperature must be a positive"),
            ("passion:temperature=warm", "temperature must be a positive"),
            ("plain:temperature=2", "no hyper-parameter=value of plain"),
            ("ogm-ge:alpha=0", "alpha"),
            ("passion:own_loss=dice", "own_loss is True or False"),
            ("passion-official:own_loss=True", "own_loss=True goes with the default mode"),
            ("passion-official:pixel=balanced", "pixel='balanced' goes with the default mode"),
            ("passion:pixel=balanced,subset_students=True", "pixel is about students of one modality"),
            ("passion:rarity_cap=2,rarity_weights=False", "changes nothing with rarity_weights=False"),
            ("passion-both:gate_by=class", "changes nothing with gate=False"),
            ("passion:pixel=blanced", "pixel must be one of"),
            ("passion:teacher_decay=1", r"teacher_decay must be in \[0, 1\)"),
        ],
    )
    def test_mistakes_are_named(self, name: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            parse_recipe(name)


class TestBatches:
    def test_the_same_seed_and_drawing_give_the_same_batches(self) -> None:
        for drawing in ("all", "drop", "even"):
            for one, two in zip(batches(drawing), batches(drawing), strict=True):
                assert all(torch.equal(one[key], two[key]) for key in one)

    def test_a_shorter_training_sees_the_beginning_of_a_longer_one(self) -> None:
        for drawing in ("all", "drop", "even"):
            for one, two in zip(batches(drawing, steps=2), batches(drawing)[:2], strict=True):
                assert all(torch.equal(one[key], two[key]) for key in one)

    def test_other_seeds_give_other_batches(self) -> None:
        pairs = zip(batches("all"), batches("all", seed=1), strict=True)
        assert not all(torch.equal(one["image"], two["image"]) for one, two in pairs)

    @pytest.mark.parametrize("drawing", ["all", "drop", "even"])
    def test_what_a_patient_lacks_is_zero_and_what_it_has_is_there(self, drawing: str) -> None:
        for batch in batches(drawing):
            seen = batch["image"].flatten(2).any(2)
            assert batch["mask"].dtype == batch["presence"].dtype == torch.bool
            assert torch.equal(seen, batch["presence"])
            assert batch["mask"].any(1).all()
            assert not (batch["mask"] & ~batch["presence"]).any()

    def test_no_drawing_shows_what_a_patient_lacks(self) -> None:
        rows = {tuple(row) for row in table().presence.tolist()}
        assert {tuple(row) for batch in batches("all", steps=12) for row in batch["mask"].tolist()} == rows
        allowed = {
            tuple((subset_mask(subset, MODALITIES) & torch.tensor(row)).tolist())
            for subset in all_subsets(MODALITIES)
            for row in rows
        }
        for drawing in ("drop", "even"):
            shown = {tuple(row) for batch in batches(drawing, steps=60) for row in batch["mask"].tolist()}
            assert shown <= allowed

    def test_drop_draws_the_same_patients_as_all_and_even_every_combination_alike(self) -> None:
        for full, dropped in zip(batches("all"), batches("drop"), strict=True):
            assert torch.equal(full["label"], dropped["label"])
            assert not (dropped["mask"] & ~full["mask"]).any()
        drawn = [tuple(row) for batch in batches("even", steps=70) for row in batch["mask"].tolist()]
        counts = {row: drawn.count(row) for row in set(drawn)}
        assert max(counts.values()) - min(counts.values()) <= 1

    def test_image_and_label_stay_together_and_half_the_slices_are_aimed(self) -> None:
        labelled = 0
        for batch in batches("all", steps=40):
            for image, label, mask in zip(batch["image"], batch["label"], batch["mask"], strict=True):
                assert torch.equal(image[mask][0] > 10, label > 0)
                labelled += int(label.any())
        # 3 of 10 slices have tumour; half of the draws look for one: 0.5 + 0.5 * 0.3 of 120.
        assert 60 < labelled < 96

    def test_whole_patients_are_cut_back_to_their_size_slice_by_slice(self) -> None:
        seen = []

        def model(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            seen.append((tuple(x.shape), tuple(mask.shape)))
            return torch.stack([x[:, 0], 2 * x[:, 0]], dim=1)

        x, mask = torch.randn(2, 3, 5, 14, 21), torch.tensor([[True, True, False]] * 2)
        scores = predict_whole((16, 16), slices=4)(model, x, mask)
        assert torch.equal(scores[:, 1], 2 * x[:, 0])
        assert seen == [((4, 3, 16, 24), (4, 3))] * 2 + [((2, 3, 16, 24), (2, 3))]
        assert torch.equal(predict_whole((8, 8, 8))(model, x, mask)[:, 0], x[:, 0])
        assert seen[-1] == ((2, 3, 8, 16, 24), (2, 3))

    def test_centred_padding(self) -> None:
        assert centred(torch.ones(1, 2), (4,)).tolist() == [[0, 1, 1, 0]]
        assert centred(torch.ones(5), (4,)).tolist() == [1] * 5


COMMAND = [
    "--data",
    "tests.examples.test_experiment:cohort",
    "--strategies",
    "plain",
    "passion",
    "--no-hd95",
    "--threads",
    "1",
]


class TestRuns:
    def test_finished_cells_are_never_computed_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        trained = []
        original = runner.train

        def counted(*args: object, **kwargs: object) -> object:
            trained.append(kwargs["name"])
            if len(trained) == 3:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(runner, "train", counted)
        command = [*COMMAND, "--results", str(tmp_path), "--folds", "0", "1"]
        with pytest.raises(KeyboardInterrupt):
            main(command)
        before = {path: path.read_bytes() for path in tmp_path.glob("cells/*")}
        assert len(before) == 2
        assert main(command) == 2
        assert trained == ["plain", "passion", "plain", "plain", "passion"]
        assert main(command) == 0
        assert {path: path.read_bytes() for path in before} == before
        # What a run has finished, it has packed too.
        for path in tmp_path.glob("cells/*"):
            path.unlink()
        assert main(command) == 0, "what is packed is finished too"

    def test_a_killed_process_leaves_only_complete_cells(self, tmp_path: Path) -> None:
        command = [*COMMAND, "--results", str(tmp_path), "--seeds", *map(str, range(50))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
        process = subprocess.Popen(
            [sys.executable, "-m", "examples.experiment", *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("cells/*.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        records = Store(tmp_path).records()
        assert records
        assert all(record["scores"] for record in records)
        assert main([*COMMAND, "--results", str(tmp_path)]) == 2 - len([r for r in records if not r["cell"]["seed"]])

    def test_every_score_of_every_subset_is_there(self, tmp_path: Path) -> None:
        main([*COMMAND[:-3], "--results", str(tmp_path), "--strategies", "passion@even"])
        (record,) = Store(tmp_path).records()
        keys = [tuple(score[:4]) for score in record["scores"]]
        assert len(keys) == len(set(keys)) == 7 * 2 * 2 * 2
        assert {key[1] for key in keys} == {"test_0_0", "test_0_1"}
        assert record["run"]["steps"] == 2
        assert record["run"]["missing"] == "ct=0.1667,pet=0.6667,t1=0.5"
        assert len(record["history"]) == 1
        assert len(record["history"][0]) == 1 + 2 * 3
        assert list(tmp_path.glob("models/*.pt"))

    def test_the_commit_is_told_where_there_is_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def describe(command: list[str], **_: object) -> subprocess.CompletedProcess:
            assert command[0] == "git"
            return subprocess.CompletedProcess(command, 0, stdout="1a2b3c4-dirty\n")

        def nothing(*_: object, **__: object) -> None:
            raise FileNotFoundError("git")

        monkeypatch.setattr(subprocess, "run", describe)
        assert runner._package.__wrapped__() == f"{passion_plugin.__version__}+g1a2b3c4-dirty"
        monkeypatch.setattr(subprocess, "run", nothing)
        assert runner._package.__wrapped__() == passion_plugin.__version__

    def test_slow_weights_count_every_step(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        bursts = []
        original = SlowWeights.step

        def counted(slow: SlowWeights) -> bool:
            bursts.append(slow.every)
            return original(slow)

        monkeypatch.setattr(SlowWeights, "step", counted)
        main([*COMMAND, "--results", str(tmp_path), "--no-models", "--strategies", "even", "even+slow"])
        drawings = [record["run"]["drawing"] for record in Store(tmp_path).records()]
        assert sorted(drawings) == ["even", "even+slow"]
        assert bursts == [7, 7], "two steps of one training, three modalities"

    def test_strategies_start_from_the_same_weights_and_the_same_batches(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: dict[str, list[torch.Tensor]] = {}

        def spy(model: torch.nn.Module, loader: Batches, *, name: str, **_: object) -> list[object]:
            images = [batch["image"] for batch in loader]
            seen[name] = [*(p.detach().clone() for p in model.parameters()), *images]
            return []

        monkeypatch.setattr(runner, "train", spy)
        names = ["plain", "passion", "ogm-ge", "even", "passion@even"]
        main([*COMMAND, "--results", str(tmp_path), "--no-models", "--strategies", *names])
        same = {
            (a, b): all(torch.equal(x, y) for x, y in zip(seen[a], seen[b], strict=True))
            for a, b in itertools.combinations(names, 2)
        }
        expected = {("plain", "passion"), ("plain", "ogm-ge"), ("passion", "ogm-ge"), ("even", "passion@even")}
        assert {pair for pair, equal in same.items() if equal} == expected

    def test_a_diverged_training_is_a_result(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def diverge(*_: object, **__: object) -> None:
            raise FloatingPointError("the loss is nan at step 1 of 2")

        monkeypatch.setattr(runner, "train", diverge)
        command = [*COMMAND, "--results", str(tmp_path)]
        assert main(command) == 2
        assert {r["run"]["status"] for r in Store(tmp_path).records()} == {"failed: the loss is nan at step 1 of 2"}
        assert main(command) == 0

    def test_presence_depends_on_fold_seed_and_assignment_alone(self) -> None:
        def drawn(**changed: object) -> list[list[bool]]:
            settings = {"backbone": "uhemis", "assignment": "ct=0.2,pet=0.6,t1=0.5", "fold": 0, "seed": 0}
            cell = Cell(**{**settings, "batch_size": 2, "strategy": "plain", **changed})
            return runner.presence_of(cohort(), cell).presence.tolist()

        assert drawn() == drawn(backbone="rfnet", strategy="passion@even", batch_size=4)
        for change in ({"fold": 1}, {"seed": 1}, {"assignment": "ct=0.6,pet=0.2,t1=0.5"}):
            assert drawn() != drawn(**change)


class TestCommandLine:
    def test_all_mistakes_come_at_once_with_close_matches(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            main([*COMMAND, "--backbone", "uhmis", "--strategies", "pasion", "passion@evn", "--shard", "3/2"])
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        for expected in ("'uhemis'", "'passion'", "'even'", "--shard '3/2'", "4 problems"):
            assert expected in message

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (["--rates", ".9,.9,.9"], "at most 2"),
            (["--rates", "ct=.2,pet=.5,t=.8"], "'t1'"),
            (["--data", "nowhere"], "no folder with index.json"),
            (["--data", "tests.examples.test_experiment:cohrt"], "no attribute 'cohrt'"),
            (["--held-out", "nowhere"], "--held-out 'nowhere' with --data"),
        ],
    )
    def test_wrong_rates_and_data(self, change: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main([*COMMAND, *change])
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (["--steps", "-1"], "-1 is not 1 or more"),
            (["--patch", "0"], "0 is not 1 or more"),
            (["--patch", "8"], "network 'uhemis' with --widths [4, 4, 4, 4] and --patch 8"),
            (["--backbone", "mmformer", "--widths", "4", "6"], "network 'mmformer' with --widths [4, 6]"),
        ],
    )
    def test_sizes_that_cannot_be_trained(
        self, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            main([*COMMAND, *change])
        assert message in capsys.readouterr().err

    def test_a_strategy_that_the_data_does_not_allow_is_named_before_anything_is_trained(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rates = {"ct": 0.2, "pet": 0.6}
        monkeypatch.setattr(
            "tests.examples.test_experiment.cohort",
            lambda fold=0: replace(cohort(fold), modalities=MODALITIES[:2], missing_rates=rates),
        )
        with pytest.raises(SystemExit):
            main([*COMMAND, "--results", str(tmp_path), "--strategies", "plain", "passion:subset_students=True"])
        assert "'passion:subset_students=True' needs three modalities, and the data has ct, pet" in (
            capsys.readouterr().err
        )
        assert not list(tmp_path.iterdir())

    def test_folds_are_looked_at_before_anything_is_trained(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def changing(fold: int = 0) -> Cohort:
            return replace(cohort(fold), name=f"boxes, fold {fold}", primary=("rim",))

        monkeypatch.setattr("tests.examples.test_experiment.cohort", changing)
        with pytest.raises(SystemExit):
            main([*COMMAND, "--results", str(tmp_path), "--folds", "0", "1"])
        message = capsys.readouterr().err
        assert "folds 0 and 1 of the data differ in name" in message
        assert "primary region 'rim'" in message
        assert not list(tmp_path.iterdir())

    def test_a_folder_keeps_its_patients(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = [*COMMAND, "--results", str(tmp_path)]
        main(command)
        monkeypatch.setattr("tests.examples.test_experiment.cohort", lambda fold=0: cohort(fold + 1))
        for packed in (False, True):
            if packed:
                Store(tmp_path).pack()
                for path in tmp_path.glob("cells/*"):
                    path.unlink()
            with pytest.raises(SystemExit):
                main(command)
            assert "on other patients than those given now" in capsys.readouterr().err

    def test_a_folder_keeps_its_settings(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        main([*COMMAND, "--results", str(tmp_path), "--strategies", "plain"])
        with pytest.raises(SystemExit):
            main([*COMMAND, "--results", str(tmp_path), "--steps", "3", "--lr", "0.1"])
        message = capsys.readouterr().err
        assert "steps was 2 and is 3 now" in message
        assert "lr was 0.003 and is 0.1 now" in message
        assert Study(**json.loads((tmp_path / "study.json").read_text())).steps == 2


@pytest.mark.data
@pytest.mark.slow
def test_four_mr_modalities_of_real_patients_go_through(data_dir: Path, tmp_path: Path) -> None:
    options = ["--strategies", "passion", "--steps", "2", "--patch", "16", "--widths", "4", "4", "4", "4", "--no-hd95"]
    assert main(["--data", str(data_dir / "ms4"), "--results", str(tmp_path), *options, "--no-models"]) == 1
    (found,) = Store(tmp_path).records()
    assert found["run"]["status"] == "ok"
    assert {row[0] for row in found["scores"]} >= {"flair", "t1ce", "t1", "t2", "flair+t1ce+t1+t2"}


@pytest.mark.data
def test_real_slices_have_two_nested_regions(data_dir: Path) -> None:
    found = runner.load(str(data_dir / "sts"), 0)
    item = found.test[0]
    assert item["image"].shape == (3, *item["label"].shape)
    assert item["label"].unique().tolist() == [0, 1, 2]
    assert item["spacing"].tolist() == pytest.approx([3.27, 3.906, 3.906], abs=0.01)
    assert len(found.train) + len(found.test) == 35

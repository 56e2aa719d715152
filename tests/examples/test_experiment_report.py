"""Statistics, packed files, tables and pages of experiments."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.experiment import packing
from examples.experiment.__main__ import main
from examples.experiment.cells import Cell
from examples.experiment.comparison import Comparison, rarest
from examples.experiment.report import CAPTIONS, report
from examples.experiment.stats import Sample, Scores, bootstrap, by_patient, by_run
from examples.experiment.store import Store, Study
from examples.experiment.tables import TABLES
from examples.markdown import marked_blocks
from passion_plugin.errors import ConfigError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "examples" / "results"
STUDY = Study(
    name="boxes",
    credit="nobody in particular",
    modalities=["ct", "pet"],
    classes=["background", "tumour"],
    regions={"gtv": [1]},
    ndim=2,
    steps=5,
    patch=16,
    lr=0.003,
    widths=[4, 4],
    task="ce+dice",
    hd95=True,
)


def record(strategy: str, values: dict[str, list[float]], *, fold: int = 0, seed: int = 0, **cell: str) -> dict:
    """A finished cell with one target; ``values``: subset -> Dice of patients f<fold>p0, f<fold>p1, …"""
    settings = {"backbone": "uhemis", "assignment": "ct=0.2,pet=0.8", "batch_size": 2, "fold": fold, "seed": seed}
    scores = [
        [subset, f"f{fold}p{i}", "gtv", metric, value if metric == "dice" else 100 * (1 - value), "ok"]
        for subset, dice in values.items()
        for i, value in enumerate(dice)
        for metric in ("dice", "hd95")
    ]
    run = {"status": "ok", "missing": "ct=0.25,pet=0.75", "training_seconds": 2.0 if strategy == "plain" else 3.0}
    run |= {"steps": 5, "patch": 16, "weights": 100, "threads": 1, "device": "cpu", "package": "0.1.0", "torch": "2.13"}
    run |= {"python": "3.11.7", "evaluation_seconds": 1.0, "rule": strategy.partition("@")[0], "drawing": "all"}
    run["parameters"] = {"temperature": 4.0} if strategy == "passion" else {}
    history = [[0, 1.1, 0.9, 0.01, -0.02], [1, 1.2, 0.8, 0.0, 0.0]] if strategy == "passion" else []
    return {"cell": {**settings, "strategy": strategy, **cell}, "run": run, "history": history, "scores": scores}


def records() -> list[dict]:
    """Two folds with two and one patients; fold 0 has two seeds."""
    plain = {"ct": [0.5, 0.6], "pet": [0.2, 0.3], "ct+pet": [0.6, 0.7]}
    better = {"ct": [0.5, 0.6], "pet": [0.5, 0.4], "ct+pet": [0.6, 0.6]}
    return [
        record("plain", plain),
        record("passion", better),
        record("plain", plain, seed=1),
        record("passion", plain, seed=1),
        record("plain", {"ct": [0.4], "pet": [0.1], "ct+pet": [0.5]}, fold=1),
        record("passion", {"ct": [0.4], "pet": [0.4], "ct+pet": [0.5]}, fold=1),
    ]


def everything(*_: object) -> bool:
    return True


def test_tables_are_about_the_primary_targets_unless_one_is_named() -> None:
    both = [
        {**each, "scores": each["scores"] + [[*row[:2], "mtv", row[3], 0.0, "ok"] for row in each["scores"]]}
        for each in records()
    ]
    regions = {"gtv": [1, 2], "mtv": [2]}
    group = ("uhemis", 2)
    means = {}
    for primary in ([], ["gtv"]):
        of = Comparison(replace(STUDY, regions=regions, primary=primary), both)
        means[of.about] = by_patient(of.scores().level("plain", of.within(group))).mean
        assert by_patient(of.scores().level("plain", of.within(group, target="mtv"))).mean == 0
    assert means["gtv, mtv"] == pytest.approx(means["gtv"] / 2)


class TestStatistics:
    def test_differences_are_paired_by_block_and_patient(self) -> None:
        samples = Scores(records()).difference("passion", "plain", everything)
        found = {(s.fold, s.seed, s.patient): round(s.value, 6) for s in samples}
        assert found == {
            (0, 0, "f0p0"): 0.1,
            (0, 0, "f0p1"): 0.0,
            (0, 1, "f0p0"): 0.0,
            (0, 1, "f0p1"): 0.0,
            (1, 0, "f1p0"): 0.1,
        }

    def test_a_patient_is_averaged_over_its_blocks_before_patients_are(self) -> None:
        result = by_patient(Scores(records()).difference("passion", "plain", everything))
        # (0.1 + 0) / 2, 0, 0.1: not the mean of the five samples.
        assert result.mean == pytest.approx((0.05 + 0 + 0.1) / 3)
        assert (result.units, result.runs) == (3, 3)

    def test_a_patient_tested_in_several_folds_is_one_unit(self) -> None:
        change = dict(enumerate((-0.2, 0.1, 0.15, -0.05, 0.2, 0.3)))
        samples = [Sample((fold,), fold, 0, f"p{i}", value) for fold in range(5) for i, value in change.items()]
        assert by_patient(samples)[:4] == pytest.approx(by_patient(samples[:6])[:4])
        assert by_patient(samples).units == 6

    def test_by_run_averages_fold_and_seed_first(self) -> None:
        result = by_run(Scores(records()).difference("passion", "plain", everything))
        assert result.mean == pytest.approx((0.05 + 0 + 0.1) / 3)
        assert result.units == 3

    def test_blocks_without_a_partner_and_scores_without_a_partner_are_left_out(self) -> None:
        lonely = [*records(), record("passion", {"ct": [0.9, 0.9]}, seed=2)]
        scores = Scores(lonely)
        assert len(scores.difference("passion", "plain", everything)) == 5
        assert len(scores.level("passion", everything)) == 7
        lonely[1]["scores"][0][4] = None  # ct, f0p0, Dice: both masks empty
        samples = Scores(lonely).difference("passion", "plain", everything)
        first = next(s.value for s in samples if (s.seed, s.patient) == (0, "f0p0"))
        assert first == pytest.approx((0.3 + 0) / 2)

    def test_another_network_assignment_or_batch_size_is_another_block(self) -> None:
        for change in ({"backbone": "rfnet"}, {"assignment": "ct=0.8,pet=0.2"}, {"batch_size": 4}):
            pair = [record("plain", {"ct": [0.5]}), record("passion", {"ct": [0.6]}, **change)]
            assert Scores(pair).difference("passion", "plain", everything) == []

    def test_selection_sees_the_rates_of_the_cell(self) -> None:
        pair = [record(s, {"ct": [0.1], "pet": [0.9]}, assignment="ct=0.8,pet=0.2") for s in ("plain", "passion")]
        assert by_patient(Scores(pair).level("plain", rarest)).mean == pytest.approx(0.1)
        assert by_patient(Scores(records()).level("plain", rarest)).mean == pytest.approx((0.2 + 0.3 + 0.1) / 3)

    def test_bootstrap_of_a_normal_sample_is_near_the_textbook(self) -> None:
        values = [math.sin(12.9898 * i) for i in range(200)]
        low, high = bootstrap(values, [0] * 200)
        mean, error = statistics.fmean(values), statistics.pstdev(values) / math.sqrt(200)
        assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
        assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)

    def test_small_strata_do_not_shrink_the_interval(self) -> None:
        # Forty strata of two: the standard error is that of the deviations within strata, with n - 1.
        values = [math.sin(12.9898 * i) for i in range(80)]
        pairs = zip(values[::2], values[1::2], strict=True)
        error = math.sqrt(sum(2 * statistics.variance(pair) for pair in pairs)) / 80
        low, high = bootstrap(values, [i // 2 for i in range(80)])
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)

    def test_strata_are_not_mixed(self) -> None:
        # Within a fold everybody is alike: then there is nothing to draw differently.
        assert bootstrap([0.0, 0.0, 1.0, 1.0], [0, 0, 1, 1]) == pytest.approx((0.5, 0.5))
        low, high = bootstrap([0.0, 0.0, 1.0, 1.0], [0] * 4)
        assert low < 0.1
        assert high > 0.9

    def test_a_stratum_of_one_is_no_certainty(self) -> None:
        values = [-0.1, 0.3, 0.05, 0.2, 0.0]
        assert bootstrap(values, range(5)) == bootstrap(values, [0] * 5)

    def test_two_values_have_the_interval_that_can_be_counted(self) -> None:
        # Means 0, 0.5 and 1 with probabilities 1/4, 1/2, 1/4, and deviations from 0.5 times the root of 2.
        assert bootstrap([0.0, 1.0], [0, 0]) == pytest.approx((0.5 - math.sqrt(0.5), 0.5 + math.sqrt(0.5)))

    def test_few_units_have_no_interval_and_none_has_no_mean(self) -> None:
        one = by_patient([Sample(("b",), 0, 0, "p", 0.5), Sample(("c",), 0, 1, "p", 0.7)])
        assert one.mean == pytest.approx(0.6)
        assert (one.units, one.runs) == (1, 2)
        assert math.isnan(one.low)
        assert math.isnan(by_patient([]).mean)
        samples = [Sample((fold,), fold, 0, f"p{fold}", float(fold)) for fold in range(5)]
        for found in (by_patient, by_run):
            assert math.isnan(found(samples[:4]).low)
            assert found(samples).low < found(samples).mean == 2 < found(samples).high


def stored(folder: Path, *extra: dict) -> Store:
    store = Store(folder)
    store.claim(STUDY)
    for each in (*records(), *extra):
        content = {key: value for key, value in each.items() if key != "cell"}
        store.save(Cell(**each["cell"]), content)
    return store


class TestFiles:
    def test_packed_files_give_the_records_back(self, tmp_path: Path) -> None:
        failed = record("passion", {}, seed=7)
        failed["run"], failed["history"] = {"status": "failed: the loss is nan, at once"}, []
        empty = record("plain", {"ct": [0.5]}, seed=8)
        empty["scores"][0][4:] = [None, "both empty"]
        empty["scores"][1][5] = "both empty"
        store = stored(tmp_path, failed, empty)
        before = {Cell(**each["cell"]).key: each for each in store.records()}
        store.pack()
        for path in tmp_path.glob("cells/*"):
            path.unlink()
        assert packing.unpack(tmp_path) == before
        assert {Cell(**each["cell"]).key: each for each in Store(tmp_path).records()} == before
        assert Store(tmp_path).has(Cell(**failed["cell"]), "anybody")

    def test_packing_again_changes_no_byte(self, tmp_path: Path) -> None:
        store = stored(tmp_path)
        for each in records():
            # Two targets, by metric as an evaluation gives them.
            scores = [[*row[:2], target, *row[3:]] for row in each["scores"] for target in ("gtv", "mtv")]
            content = {"run": each["run"], "history": each["history"], "scores": sorted(scores, key=lambda row: row[3])}
            store.save(Cell(**each["cell"]), content)
        Store(tmp_path).pack()
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        for path in tmp_path.glob("cells/*"):
            path.unlink()
        Store(tmp_path).pack()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before

    def test_cells_have_a_row_for_each_training_and_subset(self, tmp_path: Path) -> None:
        stored(tmp_path).pack()
        with (tmp_path / "cells.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 6 * 3
        row = next(
            r for r in rows if (r["strategy"], r["fold"], r["seed"], r["subset"]) == ("passion", "0", "0", "pet")
        )
        assert float(row["dice gtv"]) == pytest.approx(0.45)
        assert float(row["hd95 gtv"]) == pytest.approx(55)
        assert row["missing"] == "ct=0.25,pet=0.75"
        with gzip.open(tmp_path / "patients.csv.gz", "rt", newline="") as file:
            assert len(list(csv.DictReader(file))) == 2 * 3 * (2 + 2 + 1)


def lines_of(table: str) -> list[dict[str, str]]:
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.strip().splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


class TestTables:
    def tables(self, tmp_path: Path) -> dict[str, str]:
        of = Comparison.read(stored(tmp_path))
        return {name: table(of) for name, table in TABLES.items()}

    def test_summary_and_gains_by_hand(self, tmp_path: Path) -> None:
        tables = self.tables(tmp_path)
        plain, passion = lines_of(tables["summary"])
        # Patients' own means: 13/30, 16/30, 10/30.
        assert plain["Dice of gtv"] == "43.3"
        assert plain["rarest alone"] == "20.0"
        assert plain["gain on plain"] == "–"
        assert passion["gain on plain"] == "+5.0"
        # pet: p0 (0.3 + 0) / 2, p1 (0.1 + 0) / 2, the third patient 0.3.
        assert passion["on the rarest alone"] == "+16.7"
        assert (plain["time"], passion["time"]) == ("1.00×", "1.50×")
        (gain,) = lines_of(tables["gains"])
        assert gain["passion minus"] == "plain (best other)"
        # Seed 0: 0.1, 0 and 0.1 by patient; seed 1 changes nothing, and leaves fold 1 out.
        assert gain["each seed"] == "+6.7, +0.0"
        # Only one patient changes there, in one seed: 0.1 less.
        assert gain["complete set"] == "-1.7"
        assert (gain["patients"], gain["runs"]) == ("3", "3")

    def test_subsets_end_with_the_one_that_gains_least(self, tmp_path: Path) -> None:
        *subsets, last = lines_of(self.tables(tmp_path)["subsets"])
        assert [line["modalities"] for line in subsets] == ["ct", "pet", "ct+pet"]
        assert last["modalities"] == "least gain: ct+pet"
        # One of three patients loses 10 points in one of two seeds.
        assert last["passion − plain"] == "-1.7"
        assert [line["passion − best other"] for line in subsets] == [line["passion − plain"] for line in subsets]

    def test_other_tables(self, tmp_path: Path) -> None:
        tables = self.tables(tmp_path)
        (line,) = lines_of(tables["assignments"])
        assert line["missing rates"] == "ct=0.2, pet=0.8"
        plain, passion = lines_of(tables["hd95"])
        assert plain["gtv, mm"] == "56.7"
        assert passion["minus plain"] == "-5.0"
        for expected in ("nobody in particular", "5 steps of 2 slices of 16×16", "Trainings: 6", "Failed trainings: 0"):
            assert expected in tables["runs"]

    def test_a_failed_training_is_told_and_counts_in_no_mean(self, tmp_path: Path) -> None:
        failed = record("passion", {}, seed=7)
        failed["run"], failed["history"] = {"status": "failed: the loss is nan"}, []
        of = Comparison.read(stored(tmp_path / "with", failed))
        assert "Failed trainings: 1; passion: failed: the loss is nan." in TABLES["runs"](of)
        assert TABLES["summary"](of) == self.tables(tmp_path / "without")["summary"]

    def test_the_best_other_strategy_is_no_passion_and_as_often_run_as_any(self, tmp_path: Path) -> None:
        good, better = ({"ct": [0.6, 0.7], "pet": [value] * 2, "ct+pet": [0.7, 0.8]} for value in (0.5, 0.9))
        extra = [record("drop", good), record("drop", good, seed=1), record("drop", good, fold=1)]
        extra += [record("even", better), *(record("passion-both", better, seed=seed) for seed in (0, 1))]
        of = Comparison.read(stored(tmp_path, *extra))
        assert of.best_other(("uhemis", 2)) == "drop"
        assert [line["passion minus"] for line in lines_of(TABLES["gains"](of))] == [
            "plain",
            "drop (best other)",
            "even",
            "passion-both",
        ]

    def test_levels_are_shown_of_strategies_that_were_run_as_often_as_any(self, tmp_path: Path) -> None:
        values = {"ct": [0.6, 0.7], "pet": [0.5, 0.5], "ct+pet": [0.7, 0.8]}
        network = [record(name, values, backbone="rfnet") for name in ("plain", "even")]
        of = Comparison.read(stored(tmp_path, record("drop", values), record("even", values), *network))
        assert of.fully_run(("uhemis", 2)) == ["plain", "passion"]
        assert of.fully_run(("rfnet", 2)) == ["plain", "even"]
        subsets = lines_of(TABLES["subsets"](of))
        assert list(subsets[0])[2:5] == ["plain", "even", "passion"]
        assert [line["even"] for line in subsets if line["modalities"] == "ct"] == ["–", "65.0"]
        assert {(line["network"], line["strategy"]) for line in lines_of(TABLES["hd95"](of))} == {
            ("uhemis", "plain"),
            ("uhemis", "passion"),
            ("rfnet", "plain"),
            ("rfnet", "even"),
        }

    def test_variations_have_a_table_of_their_own_and_are_elsewhere_where_run_as_often_as_any(
        self, tmp_path: Path
    ) -> None:
        same = [each for each in records() if each["cell"]["strategy"] == "passion"]
        same = [{**each, "cell": {**each["cell"], "strategy": "passion:eta=0"}} for each in same]
        # Of two patients one gains 10 points with PET alone, the rarest, and both 10 with everything.
        once = record("passion@drop", {"ct": [0.5, 0.6], "pet": [0.6, 0.4], "ct+pet": [0.7, 0.7]})
        of = Comparison.read(stored(tmp_path, *same, once, record("passion-both", {"ct": [0.6, 0.7]})))
        often, seldom = lines_of(TABLES["variations"](of))
        assert often == {"passion with": "passion:eta=0", "runs": "3"} | often
        assert [often[name] for name in ("all subsets", "rarest alone", "complete set")] == ["+0.0"] * 3
        assert seldom == {"passion with": "passion@drop", "runs": "1"} | seldom
        assert [seldom[name] for name in ("all subsets", "rarest alone", "complete set")] == ["+5.0", "+5.0", "+10.0"]
        for table in ("summary", "gains"):
            text = TABLES[table](of)
            assert "passion:eta=0" in text, table
            assert "passion-both" in text, table
            assert "passion@drop" not in text, table
        assert TABLES["variations"](Comparison.read(stored(tmp_path / "none"))).startswith("No variation of passion")

    def test_drawings_beside_no_rule_are_no_variations_of_plain_training(self, tmp_path: Path) -> None:
        drop = [{**each, "cell": {**each["cell"], "strategy": "drop"}} for each in records()[1::2]]
        once = record("even", {"ct": [0.5, 0.6], "pet": [0.6, 0.4], "ct+pet": [0.7, 0.7]})
        of = Comparison.read(stored(tmp_path, *drop, once), "drop")
        assert [line["strategy"] for line in lines_of(TABLES["summary"](of))] == ["plain", "drop", "even", "passion"]
        assert TABLES["variations"](of).startswith("No variation of drop")

    def test_distances_are_also_compared_where_neither_mask_is_empty(self, tmp_path: Path) -> None:
        changed = records()
        for row in changed[0]["scores"]:
            if row[:2] == ["pet", "f0p0"] and row[3] == "hd95":
                row[4:] = [373.1, "one empty"]
        of = Comparison(STUDY, changed)
        passion = lines_of(TABLES["hd95"](of))[1]
        assert list(passion)[-1] == "one mask empty (373)"
        # In place of -30 mm, of three subsets and two seeds of one of three patients.
        assert passion["minus plain"] == f"{-5 - (373.1 - 80) / 18:+.1f}"
        # f0p0: (0 + 0) / 2 = 0 in seed 0, where PET is left out; f0p1 and f1p0 as before, -10 / 6 and -10.
        assert passion["where both predict"] == f"{(0 + 0 - 10) / 3:+.1f}"

    def test_empty_masks_are_counted_of_the_target_that_they_stand_beside(self) -> None:
        both = []
        for each in records():
            other = [[*row[:2], "mtv", *row[3:5], "one empty"] for row in each["scores"]]
            both.append({**each, "scores": each["scores"] + other})
        of = Comparison(replace(STUDY, regions={"gtv": [1, 2], "mtv": [2]}, primary=["gtv"]), both)
        assert [line["one mask empty (373)"] for line in lines_of(TABLES["hd95"](of))] == ["0.0%", "0.0%"]

    def test_where_several_modalities_are_rarest_all_of_them_are(self) -> None:
        pair = [record(s, {"ct": [0.1], "pet": [0.9]}, assignment="ct=0.5,pet=0.5") for s in ("plain", "passion")]
        assert by_patient(Scores(pair).level("plain", rarest)).mean == pytest.approx(0.5)

    def test_a_strategy_that_was_not_run_is_an_error_and_without_passion_the_last_is_compared(
        self, tmp_path: Path
    ) -> None:
        store = stored(tmp_path)
        assert Comparison.read(store).focus == "passion"
        with pytest.raises(ConfigError, match=r"no strategy 'pasion'.*'passion'"):
            Comparison.read(store, focus="pasion")
        others = [each for each in records() if each["cell"]["strategy"] == "plain"]
        others.append(record("redcore", {"ct": [0.5, 0.5]}))
        last = Store(tmp_path / "others")
        last.claim(STUDY)
        for each in others:
            last.save(Cell(**each["cell"]), {key: value for key, value in each.items() if key != "cell"})
        assert Comparison.read(last).focus == "redcore"


class TestPage:
    def test_a_study_that_a_page_does_not_show_is_put_at_its_end(self, tmp_path: Path) -> None:
        mine = "# Mine\n\n<!-- begin: elsewhere gains -->\nkept\n<!-- end: elsewhere gains -->\n"
        (tmp_path / "results.md").write_text(mine)
        assert report({"boxes": stored(tmp_path / "boxes")}, tmp_path) == len(TABLES) + len(CAPTIONS)
        page = (tmp_path / "results.md").read_text()
        assert page.startswith(f"{mine}\n## boxes\n\n### runs\n")
        assert "| network | " in page

    def test_without_out_the_page_is_beside_the_results(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = stored(tmp_path / "boxes").folder
        main(["report", "--results", str(folder)])
        assert "+5.0" in (folder / "results.md").read_text()
        assert str(folder / "results.md") in capsys.readouterr().out

    def test_a_folder_that_a_page_cannot_refer_to_is_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = stored(tmp_path / "my boxes").folder
        with pytest.raises(SystemExit):
            main(["report", "--results", str(folder)])
        assert "'my boxes'" in capsys.readouterr().err

    def test_a_new_page_has_everything_and_a_second_report_changes_nothing(self, tmp_path: Path) -> None:
        store = stored(tmp_path / "boxes")
        assert report({"boxes": store}, tmp_path) == len(TABLES) + len(CAPTIONS)
        page = (tmp_path / "results.md").read_text()
        for name in ("gain", "heatmap", "preference"):
            picture = tmp_path / "images" / f"results_boxes_{name}.png"
            assert picture.read_bytes().startswith(b"\x89PNG")
            assert f"](images/{picture.name})" in page
        assert "nobody in particular" in page
        assert "Not drawn." in page, "there are no weights to draw overlays from"
        report({"boxes": store}, tmp_path)
        assert (tmp_path / "results.md").read_text() == page

    def test_prose_and_other_studies_stay_and_a_block_may_name_its_focus(self, tmp_path: Path) -> None:
        other = "<!-- begin: elsewhere gains -->\nkept\n<!-- end: elsewhere gains -->\n"
        mine = "<!-- begin: boxes gains plain -->\nstale words\n<!-- end: boxes gains plain -->\n"
        (tmp_path / "results.md").write_text(f"# Mine\n\nWhat I think.\n\n{mine}{other}The end.\n")
        assert report({"boxes": stored(tmp_path / "boxes")}, tmp_path) == 1
        page = (tmp_path / "results.md").read_text()
        assert page.startswith("# Mine\n\nWhat I think.\n\n<!-- begin: boxes gains plain -->\n| network | ")
        assert page.endswith(f"{other}The end.\n")
        assert "plain minus" in page
        assert "stale words" not in page

    def test_a_table_that_does_not_exist_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "results.md").write_text("<!-- begin: boxes gain_s -->\n<!-- end: boxes gain_s -->\n")
        with pytest.raises(ConfigError, match=r"no table 'gain_s'.*'gains'"):
            report({"boxes": stored(tmp_path / "boxes")}, tmp_path)

    def test_a_block_about_a_strategy_that_was_not_run_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "results.md").write_text("<!-- begin: boxes gains plian -->\n<!-- end: boxes gains plian -->\n")
        with pytest.raises(ConfigError, match=r"no strategy 'plian'.*'plain'"):
            report({"boxes": stored(tmp_path / "boxes")}, tmp_path)

    def test_a_network_of_which_every_training_failed_is_left_out_of_pictures(self, tmp_path: Path) -> None:
        failed = record("passion", {}, backbone="rfnet")
        failed["run"], failed["history"] = {"status": "failed: the loss is nan"}, []
        report({"boxes": stored(tmp_path / "boxes", failed)}, tmp_path)
        assert (tmp_path / "images" / "results_boxes_heatmap.png").is_file()

    def test_two_folders_of_one_name_are_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folders = [str(stored(tmp_path / parent / "boxes").folder) for parent in ("a", "b")]
        with pytest.raises(SystemExit):
            main(["report", "--results", *folders, "--out", str(tmp_path)])
        assert "same name" in capsys.readouterr().err

    def test_one_table_on_the_command_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        of = Comparison.read(stored(tmp_path))
        main(["report", "--results", str(tmp_path), "--table", "gains"])
        assert capsys.readouterr().out.strip() == TABLES["gains"](of).strip()

    def test_a_folder_without_results_says_so(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["report", "--results", str(tmp_path), "--out", str(tmp_path)])
        assert "study.json" in capsys.readouterr().err


def test_training_and_report_go_together_and_patients_are_drawn(tmp_path: Path) -> None:
    data = ["--data", "tests.examples.test_experiment:cohort"]
    main([*data, "--results", str(tmp_path / "boxes"), "--no-hd95", "--seeds", "0", "1"])
    main(["report", *data, "--results", str(tmp_path / "boxes"), "--out", str(tmp_path)])
    page = (tmp_path / "results.md").read_text()
    assert "HD95 was not computed." in page
    assert len(re.findall(r"!\[.*\]\(images/results_boxes_\w+\.png\)", page)) == len(CAPTIONS)
    assert len(list(tmp_path.glob("images/*.png"))) == len(CAPTIONS)


def write_patients(folder: Path, names: list[str]) -> str:
    """Tiny patients in the format of the sarcoma data, the tumour bright in PET."""
    folder.mkdir()
    for i, name in enumerate(names):
        images = np.random.default_rng(i).integers(1, 90, (3, 6, 18, 20), dtype=np.uint8)
        gtv = np.zeros((6, 18, 20), dtype=np.uint8)
        gtv[2:5, 6:12, 7:13] = 1
        stored = dict(zip(("ct", "pet", "t1"), images, strict=True))
        np.savez(folder / f"{name}.npz", **stored, gtv=gtv, mtv=gtv * (images[1] > 45), spacing=np.float32([3, 2, 2]))
    subjects = {name: {"fold": i % 2} for i, name in enumerate(names)}
    (folder / "index.json").write_text(json.dumps({"subjects": subjects}))
    return str(folder)


def test_held_out_patients_are_tested_once_per_repetition_and_drawn(tmp_path: Path) -> None:
    data = write_patients(tmp_path / "known", [f"known_{i}" for i in range(6)])
    others = write_patients(tmp_path / "others", ["other_0", "other_1"])
    where = ["--data", data, "--held-out", others, "--results", str(tmp_path / "boxes")]
    assert main([*where, "--steps", "2", "--patch", "16", "--widths", *"4444", "--folds", "0", "7"]) == 4
    assert {score[1] for each in Store(tmp_path / "boxes").records() for score in each["scores"]} == {
        "other_0",
        "other_1",
    }
    main(["report", *where, "--out", str(tmp_path)])
    page = (tmp_path / "results.md").read_text()
    assert "2 test patients of a folder of their own" in page
    assert (tmp_path / "images" / "results_boxes_overlays.png").is_file()


def committed(folder: Path) -> dict[str, Store]:
    """The results of the repository by study, without cells of runs that are not packed yet."""
    stores = {}
    for study in RESULTS.glob("*/study.json"):
        copy = folder / study.parent.name
        copy.mkdir()
        for path in (study, *study.parent.glob("*.csv*")):
            (copy / path.name).symlink_to(path)
        stores[copy.name] = Store(copy)
    return stores


def test_the_page_says_what_the_committed_results_say(tmp_path: Path) -> None:
    page = ROOT / "docs" / "results.md"
    stores = committed(tmp_path)
    copy = tmp_path / "results.md"
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "images").symlink_to(page.parent / "images")
    report(stores, tmp_path, draw=False)
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8"), "run the report, see docs/results.md"
    assert set(stores) <= {name.split(" ")[0] for name in marked_blocks(page.read_text(encoding="utf-8"))}


def test_the_readme_says_what_the_committed_results_say(tmp_path: Path) -> None:
    lines = lines_of(TABLES["gains"](Comparison.read(committed(tmp_path)["sts"])))
    names = {
        "U-HeMIS-like": "uhemis",
        "RFNet-like": "rfnet",
        "plain": "plain",
        "modality dropping": "drop (best other)",
    }
    rows = re.findall(
        r"^\| (.*-like), (\d+) +\| (.*?) +\| +(.*?) +\| +(.*?) +\| +(.*?) +\|$", (ROOT / "README.md").read_text(), re.M
    )
    assert len(rows) == 4
    for network, runs, other, *gains in rows:
        (line,) = [each for each in lines if (each["network"], each["passion minus"]) == (names[network], names[other])]
        assert gains == [line["all subsets"], line["rarest alone"], line["complete set"]]
        assert runs == line["runs"]

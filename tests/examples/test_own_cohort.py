"""Data of one's own in an experiment, as examples/own_cohort.py shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from examples.experiment.__main__ import main
from examples.experiment.store import Store
from examples.own_cohort import cohort
from passion_plugin.errors import ConfigError
from patients import change, fake_own

COMMAND = [
    *("--data", "examples.own_cohort:cohort", "--strategies", "plain", "passion", "--steps", "1", "--patch", "16"),
    *("--widths", "4", "4", "4", "4", "--no-models", "--threads", "1"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "patients"
    path.mkdir()
    monkeypatch.setenv("OWN_DATA", str(path))
    return path


def test_every_patient_is_tested_on_once_and_shown_as_it_is_stored(folder: Path) -> None:
    fake_own(folder)
    found = [cohort(fold) for fold in range(5)]
    assert [each.test.ids for each in found] == [["a", "f"], ["b", "g"], ["c"], ["d"], ["e"]]
    assert all(sorted([*each.train.ids, *each.test.ids]) == list("abcdefg") for each in found)
    item = found[0].test[1]
    assert item["image"].shape == (2, 3, 15, 12)
    assert item["spacing"].tolist() == [3, 1, 1]
    with np.load(folder / "f.npz") as file:
        for channel, name in zip(item["image"], found[0].modalities, strict=True):
            assert np.corrcoef(channel.numpy().ravel(), file[name].ravel())[0, 1] == pytest.approx(1)


def test_two_folds_are_trained_and_names_of_modalities_reach_the_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_own(folder)
    results = tmp_path / "results"
    assert main([*COMMAND, "--results", str(results), "--folds", "0", "1"]) == 4
    tested = {(each["cell"]["fold"], score[1]) for each in Store(results).records() for score in each["scores"]}
    assert tested == {(0, "a"), (0, "f"), (1, "b"), (1, "g")}
    assert Store(results).study().unit == "mm"
    capsys.readouterr()
    main(["report", "--results", str(results), "--table", "subsets"])
    cells = {cell.strip() for cell in capsys.readouterr().out.split("|")}
    assert cells >= {"Perfusion", "adc map", "Perfusion+adc map"}


def test_what_is_wrong_is_said_before_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*options: str) -> str:
        with pytest.raises(SystemExit):
            main([*COMMAND, "--results", str(tmp_path / "results"), *options])
        return capsys.readouterr().err

    fake_own(folder, 4)
    assert "fold 0 with 4 *.npz files" in refused()
    fake_own(folder)
    assert "give a fold from 0 to 4" in refused("--folds", "0", "5")
    change(folder / "d.npz", **{"adc map": None, "label": np.full((3, 13, 12), 2)})
    message = refused()
    assert "d.npz: adc map missing; it has" in message
    assert "d.npz: label has values other than" in message
    (folder / "a.npz").write_text("text")
    assert "a.npz: not an .npz file" in refused()
    monkeypatch.delenv("OWN_DATA")
    assert "OWN_DATA=None" in refused()
    assert not (tmp_path / "results").exists()


def test_a_function_that_returns_something_else_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--data", "tests.examples.test_own_cohort:nothing"])
    assert "returned NoneType; it must be an examples.data.Cohort" in capsys.readouterr().err


def nothing(fold: int) -> None:
    """Stands for a function that forgot to return."""


def test_mistakes_inside_the_function_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistaken(fold: int) -> None:
        raise AttributeError("a mistake in the function")

    monkeypatch.setattr("tests.examples.test_own_cohort.nothing", mistaken)
    with pytest.raises(AttributeError, match="a mistake in the function"):
        main(["--data", "tests.examples.test_own_cohort:nothing"])


def test_fold_is_checked_without_the_runner(folder: Path) -> None:
    fake_own(folder)
    with pytest.raises(ConfigError, match="fold -1 with 7"):
        cohort(-1)

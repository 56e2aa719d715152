"""The folder of a run is written safely, read strictly, and becomes one page that loads and runs nothing."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from passion_plugin import __version__
from passion_plugin.cli import main
from passion_plugin.errors import ConfigError
from passion_plugin.evaluation import Convention, Row, SubsetResults

pytest.importorskip("matplotlib")

from passion_plugin.report import RunLog, read_run, write_report

EVIL = "<script>alert(1)<script>&\"'"
MODALITIES = ("ct", "<img src=x onerror=alert(2)>")
PNG = b"\x89PNG\r\n\x1a\n rest"
DICE, HD95 = Convention("fraction", None, 0.0), Convention("mm", 0.0, 373.13)


def metrics(epoch: int) -> dict[str, float]:
    by_name = {name: 1.0 + epoch / 10 + m for m, name in enumerate(MODALITIES)}
    return {"epoch": float(epoch), **{f"beta/{name}": value for name, value in by_name.items()}}


def scores(metric: str = "dice", convention: Convention = DICE) -> SubsetResults:
    values = enumerate([*MODALITIES, "+".join(MODALITIES)])
    rows = [Row(subset, s, EVIL, metric, 0.25 * (n + 1), "ok") for n, subset in values for s in ("a", "b")]
    return SubsetResults(MODALITIES, tuple(rows), {metric: convention})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete run; everything that can have a name has an evil one."""
    run = tmp_path / f"run {EVIL.replace('/', '')}"
    log = RunLog(run)
    for epoch in range(3):
        log({**metrics(epoch), "epoch_distance/ct": 0.5, "relative_preference/ct": 0.125}, step=10 * epoch)
    scores().to_csv(run / "results-PASSION.csv")
    scores().to_csv(run / f"results-{EVIL}.csv")
    (run / "overlays").mkdir()
    (run / "overlays" / f"{EVIL}.png").write_bytes(PNG)
    (run / "run.json").write_text(json.dumps({"options": {"seed": 123456789, EVIL: [EVIL]}, "lr": 0.003}))
    return run


class Page(HTMLParser):
    """Tags with their attributes, and the text of the cells by line."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.in_cell = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.in_cell = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        elif self.in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def images(self) -> dict[str, bytes]:
        found = {}
        for tag, attributes in self.tags:
            if tag == "img":
                kind, _, data = (attributes["src"] or "").partition(",")
                assert kind == "data:image/png;base64"
                found[attributes["alt"] or ""] = base64.b64decode(data)
        return found


class TestPage:
    def test_it_is_one_file_that_loads_and_runs_nothing(self, folder: Path) -> None:
        path, _ = write_report(folder, command=f"report {EVIL}")
        page = Page(path)
        assert path == folder / "report.html"
        allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "ul", "li", "p", "img", "div"}
        allowed |= {"table", "tr", "td", "th", "details", "summary", "footer", "code", "pre"}
        assert {tag for tag, _ in page.tags} <= allowed
        for tag, attributes in page.tags:
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
            assert {"href", "srcset", "style"}.isdisjoint(attributes)
            assert (tag == "img") == ("src" in attributes)
        source = path.read_text(encoding="utf-8")
        assert "url(" not in source
        assert "default-src 'none'; img-src data:;" in source
        assert page.text.count(EVIL) >= 6, "names are told as they are"

    def test_it_holds_every_picture_and_the_overlays_as_they_are(self, folder: Path) -> None:
        images = Page(write_report(folder)[0]).images()
        assert list(images) == [
            "Preference by modality over the epochs",
            "Distance to the fused prediction by modality over the epochs",
            "dice by model and subset",
            f"dice of {EVIL} by subset and target",
            "dice of PASSION by subset and target",
            f"Predictions of {EVIL} from subsets of modalities",
        ]
        assert all(data.startswith(b"\x89PNG") for data in images.values())
        assert images[f"Predictions of {EVIL} from subsets of modalities"] == PNG

    def test_tables_say_the_last_epoch_the_results_and_the_facts(self, folder: Path) -> None:
        page = Page(write_report(folder, command="the command")[0])
        assert ["modality", "beta", "relative preference", "mean distance"] in page.rows
        assert ["ct", "1.2000", "0.1250", "0.5000"] in page.rows
        assert [MODALITIES[1], "2.2000", "n/a", "n/a"] in page.rows
        assert page.rows.count(["subset", EVIL, "n"]) == 2
        assert page.rows.count(["ct", "25.0 ± 0.0", "2"]) == 2
        assert page.rows.count(["all subsets", "50.0 ± 0.0", "2"]) == 2
        assert '"seed": 123456789' in page.text
        assert '"lr": 0.003' in page.text
        assert "Last epoch: 2" in page.text
        assert "Both masks empty: skipped; exactly one empty: 0" in page.text
        assert f"Made by the command with passion-plugin {__version__}, torch {torch.__version__}" in page.text

    def test_the_same_run_gives_the_same_page(self, folder: Path, tmp_path: Path) -> None:
        first, _ = write_report(folder, tmp_path / "a.html")
        second, _ = write_report(folder, tmp_path / "b.htm")
        assert first.read_bytes() == second.read_bytes()

    def test_models_that_cannot_be_compared_are_shown_one_by_one(self, tmp_path: Path) -> None:
        scores().to_csv(tmp_path / "results-a.csv")
        scores(convention=Convention("fraction", 1.0, 0.0)).to_csv(tmp_path / "results-b.csv")
        scores("hd95", HD95).to_csv(tmp_path / "results-c.csv")
        page = Page(write_report(tmp_path)[0])
        assert "The models are not compared by dice." in page.text
        assert "'b' and 'a' do not fit on one scale" in page.text
        pictures = [f"{what} by subset and target" for what in ("dice of a", "dice of b", "hd95 of c")]
        assert list(page.images()) == ["hd95 by model and subset", *pictures]


class TestPartialRuns:
    def test_of_a_run_in_its_first_epoch_there_is_a_note(self, tmp_path: Path) -> None:
        RunLog(tmp_path)({"pixel/ct": 0.5}, step=1)
        page = Page(write_report(tmp_path)[0])
        assert "No epoch has ended yet" in page.text
        assert "There is no results.csv" in page.text
        assert page.images() == {}

    def test_results_alone_and_pictures_alone_are_reported(self, tmp_path: Path) -> None:
        scores().to_csv(tmp_path / "results.csv")
        assert list(Page(write_report(tmp_path)[0]).images()) == ["dice of results by subset and target"]
        other = tmp_path / "other"
        (other / "overlays").mkdir(parents=True)
        (other / "overlays" / "case.png").write_bytes(PNG)
        assert len(Page(write_report(other)[0]).images()) == 1

    def test_half_a_last_line_is_noted_and_the_rest_reported(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"epoch": 3.0, "bet')
        assert main(["report", str(folder)]) == 0
        out, err = capsys.readouterr()
        assert out == f"{folder / 'report.html'}\n"
        assert err == "note: metrics.jsonl, line 4: incomplete, left out.\n"
        assert "Last epoch: 2" in Page(folder / "report.html").text

    def test_a_resumed_run_shows_its_last_attempt(self, folder: Path) -> None:
        RunLog(folder)(metrics(1))
        assert "Last epoch: 1" in Page(write_report(folder)[0]).text

    def test_results_with_another_name_are_not_left_out(self, folder: Path) -> None:
        scores().to_csv(folder / "results_old.csv")
        assert list(write_report(folder)[1].results) == [EVIL, "PASSION", "results_old"]


Break = Callable[[Path], Any]


class TestMistakes:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("epoch 1", "line 2: not JSON (Expecting value: line 1 column 1 (char 0)): epoch 1"),
            ("[1, 2]", "line 2: not an object: [1, 2]"),
            ('{"epoch": 1.0}{"epoch": 2.0}', "line 2: not JSON (Extra data"),
            ('{"epoch": "one"}', "line 2: 'epoch' is 'one', not a number"),
            ('{"epoch": 1, "beta/ct": [1]}', "line 2: 'beta/ct' is [1], not a number"),
            ("\x00\x01", "line 2: not JSON ("),
        ],
        ids=["text", "list", "two", "epoch", "beta", "binary"],
    )
    def test_a_broken_line_is_exit_code_1_with_its_number(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
    ) -> None:
        (tmp_path / "metrics.jsonl").write_text(f'{{"epoch": 0}}\n{line}\n{{"epoch": 2}}\n')
        assert main(["report", str(tmp_path)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"error: {tmp_path}: metrics.jsonl, {message}")
        assert not (tmp_path / "report.html").exists()

    def test_every_broken_file_is_told_at_once(self, folder: Path) -> None:
        (folder / "metrics.jsonl").write_bytes(b"\xff\n{}\n[]\n\n{}\n")
        (folder / "results.csv").write_text("a,b\n1,2\n")
        (folder / "results-PASSION.csv").write_bytes(b"\xff\xfe\x00")
        with (folder / f"results-{EVIL}.csv").open("a") as file:
            file.write("ct,1,0,b,WT,dice,much,ok,fraction,,0.0\n")
        (folder / "overlays" / "page.png").write_text("<html>")
        (folder / "run.json").write_text("[]")
        with pytest.raises(ConfigError) as error:
            read_run(folder)
        lines = str(error.value).splitlines()
        assert lines[0].endswith("7 problems")
        for line, part in zip(
            lines[1:],
            (
                *("metrics.jsonl, line 1: not JSON", "metrics.jsonl, line 3: not an object"),
                *("line 8: could not convert string to float: 'much'", "results-PASSION.csv: not UTF-8 text"),
                *("results.csv: columns [", "overlays/page.png: not a PNG file", "run.json: not an object"),
            ),
            strict=True,
        ):
            assert part in line

    def test_what_is_not_finite_is_not_drawn(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_text('{"epoch": 0, "beta/ct": NaN, "beta/pet": null}\n')
        assert "Last epoch" not in Page(write_report(tmp_path)[0]).text

    @pytest.mark.parametrize(
        ("prepare", "message"),
        [
            (lambda path: None, "no such folder; pass that of a run"),
            (lambda path: path.write_text(""), "not a folder; pass that of a run"),
            (lambda path: path.mkdir(), "nothing to report: need metrics.jsonl with a record in it"),
            (lambda path: (path / "src").mkdir(parents=True), "found src"),
            (lambda path: RunLog(path).path.write_text("\n"), "found metrics.jsonl"),
        ],
        ids=["absent", "file", "empty", "other", "no-record"],
    )
    def test_a_wrong_folder_is_exit_code_1_and_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Break, message: str
    ) -> None:
        prepare(tmp_path / "run")
        assert main(["report", str(tmp_path / "run")]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith(f"error: {tmp_path / 'run'}: ")
        assert message in line

    def test_no_other_file_is_written_over(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = (folder / "metrics.jsonl").read_bytes()
        assert main(["report", str(folder), "--out", str(folder / "metrics.jsonl")]) == 1
        assert "give it a name that ends in .html" in capsys.readouterr().err
        assert (folder / "metrics.jsonl").read_bytes() == before
        assert main(["report", str(folder), "--out", str(folder / "no" / "such.html")]) == 1
        assert "such.html" in capsys.readouterr().err

    def test_without_matplotlib_the_extra_is_named(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert main(["report", str(folder)]) == 1
        assert 'pip install "passion-plugin[plot]"' in capsys.readouterr().err


def test_the_command_is_told_as_it_could_be_typed(folder: Path, tmp_path: Path) -> None:
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    text = Page(tmp_path / "page.html").text
    assert "Made by python -m passion_plugin report '" in text

"""The command line says what the library says, and answers every mistake with a line and an exit code."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from passion_plugin.backbone._presets import PRESETS, Preset
from passion_plugin.cli import main
from passion_plugin.data import PresenceTable, draw_presence, read_split_csv, write_split_csv

NETS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, dtype=None):
        super().__init__()
        self.t1_encoder, self.t2_encoder = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Conv2d(8, 3, 1)
        self.dtype = dtype

    def forward(self, x, mask):
        assert self.dtype in (None, mask.dtype)
        parts = [self.t1_encoder(x[:, :1]), self.t2_encoder(x[:, 1:])]
        return self.head(torch.cat([part * mask[:, m, None, None, None] for m, part in enumerate(parts)], 1))


class Blind(Net):
    def forward(self, x):
        return super().forward(x, torch.ones(len(x), 2))


class Deaf(Net):
    def forward(self, x, mask):
        return torch.zeros_like(x)


class Dropped(Net):
    def __init__(self):
        super().__init__()
        self.t0_encoder = self.__dict__["_modules"].pop("t2_encoder")
        self.first = True

    def forward(self, x, drop):
        assert not (self.first and drop.any()), "the example misses nothing"
        self.first = False
        parts = [self.t0_encoder(x[:, :1]), self.t1_encoder(x[:, 1:])]
        return self.head(torch.cat([part * ~drop[:, m, None, None, None] for m, part in enumerate(parts)], 1))


def ints():
    return Net(torch.int64)


def broken():
    raise ValueError("no weights\\nfound")


def wide(width):
    return Net()


built = Net()
number = float
"""

RATES = "flair=.2,t1ce=.4,t1=.6,t2=.8"
PATIENTS = [f"patient {n}" for n in range(10)]

Run = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in a folder with ``cli_nets.py`` and ``names.txt``: exit code, report, lines of errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "cli_nets", raising=False)
    (tmp_path / "cli_nets.py").write_text(NETS)
    (tmp_path / "names.txt").write_text("\n".join(PATIENTS) + "\n\n")

    def command(*words: str) -> tuple[int, str, list[str]]:
        try:
            code = main(words)
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return command


@pytest.mark.parametrize("name", ["Net", "built"])
def test_a_class_and_a_model_of_the_current_directory_are_reported(run: Run, name: str) -> None:
    code, report, errors = run("inspect", f"cli_nets:{name}", "--input", "2,2,8,8", "--modalities", "t1,t2")
    assert (code, errors) == (0, [])
    assert "Net with 2 modalities: t1, t2" in report
    assert "can be wrapped: encoder outputs of the fused pass are replayed" in report
    assert "t1: t1_encoder" in report
    assert "head" in report


def test_the_report_is_the_same_each_time(run: Run) -> None:
    words = ("inspect", "cli_nets:Net", "--input", "2,2,8,8")
    first = run(*words)
    del sys.modules["cli_nets"]
    assert run(*words) == first


def test_a_model_that_cannot_be_wrapped_is_exit_code_1_and_a_report(run: Run) -> None:
    code, report, errors = run("inspect", "cli_nets:Deaf", "--input", "2,2,8,8")
    assert (code, errors) == (1, [])
    assert "cannot be wrapped as it is" in report


def test_the_mask_is_of_the_type_that_the_model_takes(run: Run) -> None:
    assert run("inspect", "cli_nets:ints", "--input", "2,2,8,8", "--mask", "int")[0] == 0
    assert run("inspect", "cli_nets:Blind", "--input", "2,2,8,8", "--mask", "none")[0] == 0
    code, report, _ = run("inspect", "cli_nets:Blind", "--input", "2,2,8,8")
    assert code == 1
    assert "the backbone could not be run: TypeError" in " ".join(report.split())


def test_a_preset_is_checked_against_the_model(run: Run) -> None:
    code, _, errors = run("inspect", "cli_nets:Net", "--input", "2,4,8,8", "--spec", "rfnet")
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: Net is no rfnet: it has no module ['flair_encoder', ")


def test_a_preset_is_used(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "backbone")
    code, report, errors = run("inspect", "test_presets:SmallRFNet", "--input", "1,4,8,8,8", "--spec", "rfnet")
    assert (code, errors) == (0, [])
    assert "decoder_fuse.seg_layer" in report


def test_a_preset_whose_mask_says_what_is_missing_gets_such_a_mask(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"classifier": "head", "mask_argument": "drop", "mask_meaning": "missing"}
    entry = Preset("dropped", "made up", ("head",), ("t{k}_encoder",), ("1", "2"), known)
    monkeypatch.setitem(PRESETS, "dropped", entry)
    code, report, _ = run("inspect", "cli_nets:Dropped", "--input", "2,2,8,8", "--spec", "dropped")
    assert code == 0, report


def test_every_mistake_of_inspect_is_one_line(run: Run) -> None:
    code, report, errors = run(
        *("inspect", "nets/unet.py", "--input", "1,4", "--modalities", "t1,t1", "--spec", "rfnett", "--mask", "int")
    )
    assert (code, report) == (2, "")
    starts = ("--input: '1,4' is no shape", "--modalities: modality 't1' is named more than once")
    for line, start in zip(errors, (*starts, "model: 'nets/unet.py' is not"), strict=True):
        assert line.startswith(f"error: {start}")


def test_an_unknown_preset_is_one_line(run: Run) -> None:
    code, report, errors = run("inspect", "cli_nets:Net", "--input", "2,2,8,8", "--spec", "rfnett")
    assert (code, report) == (2, "")
    assert errors == ["error: unknown preset 'rfnett'. Did you mean 'rfnet'?"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no_such_nets:Net", "ModuleNotFoundError: No module named 'no_such_nets'"),
        ("cli_nets:Nett", "module 'cli_nets' has no 'Nett'. Did you mean 'Net'"),
        ("cli_nets:broken", "ValueError: no weights found (line "),
        ("cli_nets:wide", "TypeError: wide() missing 1 required positional argument: 'width'"),
        ("cli_nets:number", "cli_nets:number gives float; need a torch.nn.Module"),
        ("cli_script:Net", "SystemExit: 3 (line 1 of "),
        ("cli_typo:Net", "SyntaxError: "),
    ],
)
def test_a_model_that_cannot_be_made_is_one_line(run: Run, tmp_path: Path, model: str, message: str) -> None:
    (tmp_path / "cli_script.py").write_text("raise SystemExit(3)")
    (tmp_path / "cli_typo.py").write_text("def Net(:")
    code, report, errors = run("inspect", model, "--input", "2,2,8,8")
    assert (code, report, len(errors)) == (2, "", 1)
    assert message in errors[0]


@pytest.mark.parametrize("shape", ["1,0,8,8", "2,x,8"])
def test_shapes_that_make_no_sense(run: Run, shape: str) -> None:
    code, _, errors = run("inspect", "cli_nets:Net", "--input", shape)
    assert (code, len(errors)) == (2, 1)
    assert "is no shape" in errors[0]


@pytest.mark.parametrize(
    ("names", "message"), [("t1", "at least two modalities"), ("a,b,c", "must have shape (batch, 3 × channels")]
)
def test_names_that_do_not_fit_are_in_the_report(run: Run, names: str, message: str) -> None:
    code, report, errors = run("inspect", "cli_nets:Net", "--input", "1,4,8,8", "--modalities", names)
    assert (code, errors) == (1, [])
    assert message in report


@pytest.mark.parametrize(
    "words", [(), ("inspekt",), ("inspect", "cli_nets:Net"), ("split", "names.txt", "--seed", "0")]
)
def test_an_incomplete_command_is_a_usage_error(run: Run, words: tuple[str, ...]) -> None:
    code, _, errors = run(*words)
    assert code == 2
    assert errors[-1].startswith("python -m passion_plugin")


def test_a_split_is_what_draw_presence_draws(run: Run, tmp_path: Path) -> None:
    code, report, errors = run(
        *("split", "names.txt", "--rates", RATES, "--seed", "3", "--out", "split.csv", "--table", "table.csv")
    )
    rates = {"flair": 0.2, "t1ce": 0.4, "t1": 0.6, "t2": 0.8}
    table = draw_presence(PATIENTS, rates, seed=3)
    assert (code, errors, report) == (0, [], f"{table.describe()}\n")
    assert PresenceTable.load("table.csv") == table
    assert (read_split_csv("split.csv", tuple(rates)).presence == table.presence).all()
    write_split_csv(table, "expected.csv")
    assert Path("split.csv").read_bytes() == Path("expected.csv").read_bytes()


def test_names_may_come_from_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n\n c \n"))
    code, report, _ = run("split", "--rates", "ct=0, pet=.34", "--seed", "0", "-")
    assert code == 0
    assert report == draw_presence(("a", "b", "c"), {"ct": 0.0, "pet": 0.34}, seed=0).describe() + "\n"


def test_every_mistake_of_split_is_reported_and_nothing_is_written(run: Run) -> None:
    code, report, errors = run(
        *("split", "name.txt", "--rates", "flair=.2,t1,flair=2,t2=x", "--seed", "-1", "--out", "split.csv")
    )
    assert (code, report) == (2, "")
    assert errors == [
        "error: name.txt: No such file or directory",
        "error: --rates: 'flair' is named more than once",
        "error: --out: the format is for four modalities, here are 3; use --table for any number",
        "error: draw_presence: 4 problems",
        "  1. rates['flair']=2.0: need a number in [0, 1)",
        "  2. rates['t1']='': need a number in [0, 1)",
        "  3. rates['t2']='x': need a number in [0, 1)",
        "  4. seed=-1: pass a whole number, 0 or more, so that the draw can be repeated",
    ]
    assert not Path("split.csv").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b" \n\n", "no names in it"), (b"a\xff\n", "not UTF-8 text"), (b"a\nb\na\n", "more than once: 'a'")],
)
def test_files_of_names_that_are_no_use(run: Run, content: bytes, message: str) -> None:
    Path("odd.txt").write_bytes(content)
    code, _, errors = run("split", "odd.txt", "--rates", RATES, "--seed", "0")
    assert (code, len(errors)) == (2, 1)
    assert message in errors[0]


def test_a_folder_that_does_not_exist_is_one_line(run: Run) -> None:
    code, _, errors = run("split", "names.txt", "--rates", RATES, "--seed", "0", "--out", "nowhere/split.csv")
    assert (code, len(errors)) == (2, 1)
    assert "nowhere/split.csv" in errors[0]


def test_python_m_runs_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "passion_plugin", "split", "--rates", "ct=0,pet=.5", "--seed", "0", "-"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    how: Any = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, input="a\nb\n", **how)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == draw_presence(("a", "b"), {"ct": 0.0, "pet": 0.5}, seed=0).describe() + "\n"
    failed = subprocess.run(command[:-1], **how)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_images_are_of_the_precision_of_the_model(run: Run, tmp_path: Path, dtype: str) -> None:
    (tmp_path / f"cli_{dtype}.py").write_text(
        f"import torch, cli_nets\nbuild = lambda: cli_nets.Net().to(torch.{dtype})"
    )
    code, report, _ = run("inspect", f"cli_{dtype}:build", "--input", "2,2,8,8")
    assert code == 0, report


@pytest.mark.parametrize(
    "words",
    [("--out", "names.txt"), ("--table", "./names.txt"), ("--out", "same.csv", "--table", "same.csv")],
    ids=["out", "table", "both"],
)
def test_no_file_is_written_over_another(run: Run, words: tuple[str, ...]) -> None:
    before = Path("names.txt").read_text()
    code, report, errors = run("split", "names.txt", "--rates", RATES, "--seed", "0", *words)
    assert (code, report, len(errors)) == (2, "", 1)
    assert "name the same file" in errors[0]
    assert Path("names.txt").read_text() == before
    assert not Path("same.csv").exists()


def test_where_one_file_cannot_be_written_neither_is(run: Run) -> None:
    words = ("split", "names.txt", "--rates", RATES, "--seed", "0", "--out", "split.csv")
    for table in ("nowhere/table.csv", "."):
        code, report, errors = run(*words, "--table", table)
        assert (code, report, errors) == (2, "", [f"error: {table}: no file can be written there"])
    assert not Path("split.csv").exists()


def test_a_terminal_that_cannot_show_a_name_is_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "passion_plugin", "split", "--rates", "ä=0,b=.5", "--seed", "0", "-"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    environment |= {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, input=b"a\nb\n", cwd=tmp_path, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\\x") >= 1


def test_the_page_shows_what_the_commands_say(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    network, log = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "my_networks.py").write_text(network)
    (tmp_path / "names.txt").write_text("".join(f"case_{number:03d}\n" for number in range(1, 11)))
    exec(log, {})
    codes = []
    for block in re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL):
        said: list[str] = []
        shown = [line for line in block.splitlines() if not line.startswith("$ ")]
        for command in re.findall(r"^\$ (.*)$", block, flags=re.MULTILINE):
            if command.startswith("python -m passion_plugin "):
                code, out, errors = run(*shlex.split(command)[3:])
                said += [*out.splitlines(), *errors]
                codes.append(code)
            elif command == "echo $?":
                said.append(str(codes[-1]))
            else:
                subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        # How large an effect is, and whether a rounding difference is left, differs with the build of torch.
        number = re.compile(r"\d\.\de[+-]\d\d|(?<=true run )0$")
        assert [number.sub("#", line) for line in said] == [number.sub("#", line) for line in shown]
    assert codes == [0, 1, 2, 0, 2, 0, 1, 1]

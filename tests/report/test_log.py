"""The log of a run: one line for each call, and a file that a killed training left can be used again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from passion_plugin.errors import InputError, PassionWarning
from passion_plugin.report import RunLog, read_run


def test_a_line_per_call_of_numbers_of_any_kind(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "new" / "run")
    log({"a": 1, "b": torch.tensor(0.5), "c": np.float32(2), "d": math.nan, "e": -math.inf, "f": True}, 7)
    RunLog(log.path.parent)({})
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"step": 7, "a": 1.0, "b": 0.5, "c": 2.0, "d": None, "e": None, "f": 1.0},
        {},
    ]


def test_what_is_no_number_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for value in ("three", torch.ones(2), None, [1.0]):
        with pytest.raises(InputError, match=r"'odd' is .*; pass a number"):
            log({"fine": 1.0, "odd": value}, step=2)
    assert not log.path.exists()


def test_half_a_line_of_a_killed_training_is_removed_with_a_warning(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log({"epoch": 0.0})
    with log.path.open("a") as file:
        file.write('{"epoch": 1.0, "be')
    with pytest.warns(PassionWarning, match="the last line is incomplete and was removed.*epoch"):
        RunLog(tmp_path)({"epoch": 1.0})
    assert [record["epoch"] for record in read_run(tmp_path).records] == [0, 1]


def test_a_whole_line_without_its_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0.0}')
    assert [record["epoch"] for record in read_run(tmp_path).records] == [0]
    RunLog(tmp_path)({"epoch": 1.0})
    assert [record["epoch"] for record in read_run(tmp_path).records] == [0, 1]

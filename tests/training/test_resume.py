"""The example of a training that stops and goes on, in processes of its own."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples import resume
from passion_plugin import get_passion_state_dict

ROOT = Path(__file__).parents[2]
STEPS = 5


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Everything in nested dicts and lists, by where it is."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, inner in items for name, leaf in leaves(inner, f"{path}/{key}").items()}
    return {path: value}


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same(found: Any, expected: Any) -> None:
    one, other = leaves(found), leaves(expected)
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        same = torch.equal(leaf, other[name]) if isinstance(leaf, Tensor) else leaf == other[name]
        assert same, name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint after all steps in one go."""
    folder = tmp_path_factory.mktemp("whole")
    resume.main(["--steps", str(STEPS), "--out", str(folder)])
    return checkpoint(folder)


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a process leaves which stops within the second epoch; an epoch has three steps."""
    return in_new_process(tmp_path_factory.mktemp("halfway"), "--stop-after", "4")


def in_new_process(folder: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "examples.resume", "--steps", str(STEPS), "--out", str(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    return folder


def test_a_training_that_goes_on_in_a_new_process_is_the_same_bit_for_bit(
    whole: dict[str, Any], halfway: Path, tmp_path: Path
) -> None:
    state = checkpoint(halfway)
    assert state["step"] == 4
    packed = io.BytesIO(state["passion"]["_extra_state"]["strategy_state"])
    preference = torch.load(packed, weights_only=True)
    assert preference["epoch"] == 1
    assert preference["samples_seen"] == resume.BATCH
    assert preference["sums"].any()
    shutil.copy(halfway / "checkpoint.pt", tmp_path)
    assert_same(checkpoint(in_new_process(tmp_path)), whole)


def test_it_may_stop_between_epochs(whole: dict[str, Any], tmp_path: Path) -> None:
    for _ in range(2):
        training = resume.main(["--steps", str(STEPS), "--stop-after", "3", "--out", str(tmp_path)])
    assert training.step == STEPS
    assert_same(checkpoint(tmp_path), whole)


@pytest.mark.parametrize("lost", ["random", "passion", "optimizer"])
def test_every_part_of_the_checkpoint_is_needed(
    lost: str, whole: dict[str, Any], halfway: Path, tmp_path: Path
) -> None:
    state, fresh = checkpoint(halfway), resume.Training(STEPS)
    state[lost] = {
        "random": {"cpu": torch.Generator().manual_seed(9).get_state(), "cuda": []},
        "passion": get_passion_state_dict(fresh.model),
        "optimizer": fresh.optimizer.state_dict(),
    }[lost]
    torch.save(state, tmp_path / "checkpoint.pt")
    resume.main(["--steps", str(STEPS), "--out", str(tmp_path)])
    with pytest.raises(AssertionError, match="/backbone/"):
        assert_same(checkpoint(tmp_path), whole)

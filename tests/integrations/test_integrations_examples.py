"""The examples of the trainers run, and give the losses of the plain loop, bit for bit."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples import accelerate_loop, fabric_loop, lightning_callback, monai_trainer, tensorboard_log, three_lines

SMALL = {"epochs": 2, "patients": 6, "size": 16}
M = ("flair", "t1ce", "t1", "t2")


@pytest.fixture(scope="module")
def plain() -> list[float]:
    losses = three_lines.main(**SMALL)
    assert len(losses) == 6
    return losses


@pytest.mark.parametrize(
    "main",
    [
        pytest.param(lightning_callback.main, id="lightning"),
        pytest.param(fabric_loop.main, id="fabric"),
        pytest.param(accelerate_loop.main, id="accelerate"),
        pytest.param(tensorboard_log.main, id="tensorboard"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*")
def test_a_trainer_gives_the_losses_of_the_plain_loop(
    main: Callable[..., list[float]], plain: list[float], tmp_path: Path
) -> None:
    assert main(tmp_path, **SMALL) == plain
    assert any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*LeafSpec.*")
def test_lightning_leaves_terms_by_step_and_weights_by_epoch(tmp_path: Path) -> None:
    lightning_callback.main(tmp_path, **SMALL)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    pixel = [row for row in rows if any(value for name, value in row.items() if name.startswith("passion/pixel/"))]
    assert pixel
    assert {int(row["step"]) for row in pixel if not row["epoch"]} <= {1, 3, 5}
    assert [float(row["passion/epoch"]) for row in rows if row["epoch"] and row["passion/epoch"]] == [0, 1]


def test_tensorboard_holds_terms_and_weights(tmp_path: Path) -> None:
    tensorboard_log.main(tmp_path, **SMALL)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"passion/beta/{name}" for name in M} <= tags
    assert [event.step for event in events.Scalars("passion/beta/flair")] == [4, 6]
    assert any(tag.startswith("passion/pixel/") for tag in tags)


@pytest.mark.parametrize("network", ["encoders", "unet"])
def test_monai_networks_train_and_are_scored_by_windows(network: str) -> None:
    results = monai_trainer.main(network, **SMALL)
    assert len(results.subsets) == 15
    assert results.targets == ("WT", "TC", "ET")
    assert not math.isnan(results.mean())

"""PassionHandler in MONAI's trainer: the loop of the trainer, the numbers of a plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import PrepareBatchExtraInput
from monai.handlers import CheckpointLoader, CheckpointSaver, ValidationHandler
from torch.nn import functional as F

from models import NAMES, MeanNet, batch, spec_of
from passion_plugin.errors import UsageError
from passion_plugin.evaluation import sliding_window_predict
from passion_plugin.integrations.logging import MetricsLogger
from passion_plugin.integrations.loss import PassionLoss
from passion_plugin.integrations.monai import PassionHandler
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
KEYS = ("image", "mask", "label")
BATCHES = [dict(zip(KEYS, batch([[1, 1, 0], [1, 1, 1]], side=8, seed=seed), strict=True)) for seed in range(3)]


def wrap() -> PassionWrapper:
    torch.manual_seed(0)
    net = MeanNet(M)
    return PassionWrapper(net, M, missing_rates=[0.5] * 3, spec=spec_of(net))


def trainer_of(model: PassionWrapper, *handlers: Any, batches: Any = BATCHES, epochs: int = 2) -> SupervisedTrainer:
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=batches,
        network=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-2),
        loss_function=PassionLoss(F.cross_entropy, model),
        prepare_batch=PrepareBatchExtraInput("mask"),
        train_handlers=list(handlers),
    )


def plain(epochs: int = 2) -> PassionWrapper:
    model = wrap()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for item in BATCHES:
            optimizer.zero_grad()
            prediction = model(item["image"], item["mask"])
            (F.cross_entropy(prediction, item["label"]) + model.passion_loss(item["label"])).backward()
            optimizer.step()
        model.end_epoch()
    return model


def assert_equal(ours: PassionWrapper, theirs: PassionWrapper) -> None:
    assert torch.equal(ours.passion.preference.beta, theirs.passion.preference.beta)
    assert ours.passion.preference.epoch == theirs.passion.preference.epoch
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_the_trainer_gives_the_weights_of_a_plain_loop() -> None:
    model = wrap()
    trainer_of(model, PassionHandler(model)).run()
    assert_equal(model, plain())


def test_meta_tensors_are_tensors() -> None:
    model = wrap()
    batches = [{**item, "image": MetaTensor(item["image"]), "label": MetaTensor(item["label"])} for item in BATCHES]
    trainer_of(model, PassionHandler(model), batches=batches).run()
    assert_equal(model, plain())


def test_metrics_reach_the_state_of_the_engine_and_a_logger() -> None:
    model, steps = wrap(), []
    logger = MetricsLogger(lambda metrics, step: steps.append((step, metrics)), every=2)
    trainer = trainer_of(model, PassionHandler(model, logger=logger, prefix="p/"))
    trainer.run()
    assert [step for step, _ in steps] == [2, 4, 6]
    assert "passion/pixel/flair" in steps[0][1]
    ours = {name.removeprefix("p/"): value for name, value in trainer.state.metrics.items() if name.startswith("p/")}
    assert ours == model.passion.metrics()
    assert ours["epoch"] == 1


def test_validation_in_between_ends_no_epoch_and_an_evaluator_is_refused() -> None:
    model = wrap()
    windows = sliding_window_predict((4, 4))
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=BATCHES,
        network=model,
        prepare_batch=PrepareBatchExtraInput("mask"),
        inferer=lambda x, network, mask: windows(network, x, mask),
        decollate=False,
    )
    with pytest.raises(UsageError, match="not to a SupervisedEvaluator"):
        PassionHandler(model).attach(evaluator)
    trainer_of(model, ValidationHandler(1, evaluator), PassionHandler(model)).run()
    assert evaluator.state.output["pred"].shape == (2, 3, 8, 8)
    assert_equal(model, plain())


def test_a_plain_ignite_engine_will_do() -> None:
    model = wrap()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss = PassionLoss(F.cross_entropy, model)

    def step(engine: Engine, item: Any) -> None:
        optimizer.zero_grad()
        loss(model(item["image"], item["mask"]), item["label"]).backward()
        optimizer.step()

    engine = Engine(step)
    PassionHandler(model).attach(engine)
    engine.run(BATCHES, max_epochs=2)
    assert_equal(model, plain())


def test_checkpoints_hold_the_engine(tmp_path: Path) -> None:
    def parts(model: PassionWrapper, trainer: SupervisedTrainer) -> dict[str, Any]:
        return {"net": model, "optimizer": trainer.optimizer, "trainer": trainer}

    first = wrap()
    trainer = trainer_of(first, PassionHandler(first), epochs=1)
    CheckpointSaver(str(tmp_path), parts(first, trainer), save_final=True, final_filename="last.pt").attach(trainer)
    trainer.run()
    resumed = wrap()
    trainer = trainer_of(resumed, PassionHandler(resumed), epochs=2)
    CheckpointLoader(str(tmp_path / "last.pt"), parts(resumed, trainer)).attach(trainer)
    ended: list[int] = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: ended.append(engine.state.epoch))
    trainer.run()
    assert ended == [2]
    assert_equal(resumed, plain())

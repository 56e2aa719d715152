"""PassionCallback: one end of the epoch per epoch, the right numbers in the log, and runs that can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from models import NAMES, MeanNet, batch, spec_of
from passion_plugin.baselines import AGM
from passion_plugin.errors import UsageError
from passion_plugin.integrations.lightning import PassionCallback
from passion_plugin.training import PassionEngine, Strategy, attach, get_passion_state_dict
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
PRESENCE = [[1, 1, 0], [1, 1, 1]]
BATCHES = 4

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


class Batches:
    """A loader that can be resumed in the middle of an epoch."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for index in range(self.next % BATCHES, BATCHES):
            self.next = index + 1
            yield batch(PRESENCE, seed=index)

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Module(pl.LightningModule):
    def __init__(self, strategy: Callable[[], Strategy] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        net = MeanNet(M)
        self.network = PassionWrapper(
            net, M, missing_rates=[0.5] * 3, spec=spec_of(net), strategy=strategy and strategy()
        )

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        x, mask, y = batch
        return nn.functional.cross_entropy(self.network(x, mask), y) + self.network.passion_loss(y)

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        x, mask, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.network(x, mask), y), batch_size=2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Rows(Logger):
    """Remembers what it is given."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


def fit(module: pl.LightningModule, *callbacks: Any, epochs: int = 2, ckpt: Path | None = None, **options: Any) -> Any:
    """Train on the four batches; every other option is of the Trainer."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), enable_checkpointing=checkpoints, **{**quiet, **options}
    )
    trainer.fit(module, Batches(), Batches(), ckpt_path=ckpt)
    return trainer


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[PassionEngine]:
    """Every engine whose epoch was ended, in order."""
    ended: list[PassionEngine] = []
    end_epoch = PassionEngine.end_epoch
    monkeypatch.setattr(PassionEngine, "end_epoch", lambda self: ended.append(self) or end_epoch(self))  # type: ignore[func-returns-value]
    return ended


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_weights_are_those_of_a_plain_loop(accumulate: int, ends: list[PassionEngine]) -> None:
    module = Module()
    fit(module, PassionCallback(), epochs=3, num_sanity_val_steps=2, accumulate_grad_batches=accumulate)
    assert ends == [module.network.passion] * 3

    plain = Module()
    optimizer = plain.configure_optimizers()
    for _ in range(3):
        for index, item in enumerate(Batches(), start=1):
            (plain.training_step(item, 0) / accumulate).backward()
            if index % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        plain.network.end_epoch()
    assert torch.equal(module.network.passion.preference.beta, plain.network.passion.preference.beta)
    assert (plain.network.passion.preference.beta != 1).any()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_validation_of_its_own_ends_no_epoch(ends: list[PassionEngine]) -> None:
    module = Module()
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, callbacks=[PassionCallback()], accelerator="cpu")
    trainer.validate(module, Batches(), verbose=False)
    assert ends == []


def test_an_epoch_that_nothing_was_trained_in_is_not_ended(ends: list[PassionEngine]) -> None:
    module, callback = Module(), PassionCallback()
    trainer = fit(module, callback, epochs=1)
    callback.on_train_epoch_end(trainer, module)
    assert len(ends) == 1


@pytest.mark.parametrize(("accumulate", "steps"), [(1, [1, 3, 5, 7]), (2, [1, 3])])
def test_terms_are_logged_at_lightnings_steps_and_weights_at_the_end_of_the_epoch(
    accumulate: int, steps: list[int]
) -> None:
    logger = Rows()
    trainer = fit(
        Module(), PassionCallback(prefix="p/"), logger=logger, log_every_n_steps=2, accumulate_grad_batches=accumulate
    )
    by_step = [step for step, row in logger.rows if "p/pixel/flair" in row and "epoch" not in row]
    assert by_step == steps
    by_epoch = [row for _, row in logger.rows if "p/beta/flair" in row and "epoch" in row]
    assert [row["p/epoch"] for row in by_epoch] == [0, 1]
    assert {"p/relative_preference/flair", "p/gate/t1", "p/beta/t1"} <= set(by_epoch[-1])
    assert float(trainer.callback_metrics["p/beta/flair"]) == pytest.approx(by_epoch[-1]["p/beta/flair"])


def test_no_steps_are_logged_where_lightning_logs_none() -> None:
    logger = Rows()
    fit(Module(), PassionCallback(), epochs=1, logger=logger, log_every_n_steps=0)
    names = [{name.split("/")[1] for name in row if name.startswith("passion/")} for _, row in logger.rows]
    assert any("beta" in row for row in names)
    assert all("epoch_distance" in row for row in names if "pixel" in row)


def test_nothing_is_asked_for_between_epochs_without_a_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    metrics = PassionEngine.metrics
    monkeypatch.setattr(PassionEngine, "metrics", lambda self: asked.append(None) or metrics(self))  # type: ignore[func-returns-value]
    fit(Module(), PassionCallback(), epochs=2, log_every_n_steps=1)
    assert len(asked) == 2


def same(ours: Any, theirs: Any) -> bool:
    """Whether two states are equal, bit for bit."""
    (our_leaves, our_tree), (their_leaves, their_tree) = tree_flatten(ours), tree_flatten(theirs)
    pairs = zip(our_leaves, their_leaves, strict=True)
    return our_tree == their_tree and all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


SAVED = {
    "epoch end": {"save_on_train_epoch_end": True},
    "validation end": {"monitor": "val_loss", "save_on_train_epoch_end": False},
    "last batch": {"every_n_train_steps": BATCHES},
    "middle": {"every_n_train_steps": BATCHES + 2},
}


def first_checkpoint(module: Module, when: str, folder: Path) -> Path:
    """Train for two epochs and return the first checkpoint."""
    saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **SAVED[when])
    fit(module, PassionCallback(), saving, epochs=2)
    return min(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1].split("-")[0]))


@pytest.mark.parametrize("strategy", [None, AGM])
@pytest.mark.parametrize("when", SAVED)
def test_a_resumed_run_is_the_uninterrupted_one(
    when: str, strategy: Callable[[], Strategy] | None, tmp_path: Path, ends: list[PassionEngine]
) -> None:
    whole = Module(strategy)
    fit(whole, PassionCallback(), epochs=4)
    assert len(ends) == 4

    resumed = Module(strategy)
    fit(resumed, PassionCallback(), epochs=4, ckpt=first_checkpoint(Module(strategy), when, tmp_path))

    assert same(get_passion_state_dict(resumed), get_passion_state_dict(whole))
    assert resumed.network.passion.metrics() == whole.network.passion.metrics()
    for name, value in resumed.network.backbone.state_dict().items():
        assert torch.equal(value, whole.network.backbone.state_dict()[name])


def test_no_wrapper_is_an_error_that_says_so() -> None:
    class Bare(Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = self.network.unwrap()

    with pytest.raises(UsageError, match="no PassionWrapper in this Bare"):
        fit(Bare(), PassionCallback())
    with pytest.raises(UsageError, match="no PassionWrapper in this Linear"):
        PassionCallback(nn.Linear(1, 1))


class Two(Module):
    """A second network, trained beside the first."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Module().network

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        x, mask, y = batch
        self.other(x, mask)
        return super().training_step(batch, batch_idx) + self.other.passion_loss(y)


def test_of_several_wrappers_each_gets_a_callback_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 engines in this Two: 'network', 'other'"):
        fit(Two(), PassionCallback())
    module = Two()
    callbacks = [PassionCallback(module.network, prefix="a/"), PassionCallback(module.other, prefix="b/")]
    trainer = fit(module, *callbacks, epochs=2)
    assert module.network.passion.preference.epoch == module.other.passion.preference.epoch == 2
    assert {"a/beta/flair", "b/beta/flair"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)
    assert {"network.passion._extra_state", "other.passion._extra_state"} <= set(saved["state_dict"])
    ours = [state for key, state in saved["callbacks"].items() if "PassionCallback" in key]
    assert ours == [{"open_epoch": None}] * 2, "a wrapper in the module is saved once, with the module"


class Attached(Module):
    """Trains a network with an attached engine, which is no part of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.network = self.network.unwrap()
        self.engines = [attach(self.network, modalities=M, missing_rates=[0.5] * 3, spec=spec_of(self.network))]

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        x, mask, y = batch
        return nn.functional.cross_entropy(self.network(x, mask), y) + self.engines[0].loss(y)


def test_an_attached_engine_is_found() -> None:
    attached, wrapped = Attached(), Module()
    fit(attached, PassionCallback())
    fit(wrapped, PassionCallback())
    assert torch.equal(attached.engines[0].preference.beta, wrapped.network.passion.preference.beta)


@pytest.mark.parametrize("when", SAVED)
def test_a_resumed_run_of_an_attached_engine_is_the_uninterrupted_one(when: str, tmp_path: Path) -> None:
    whole = Attached()
    fit(whole, PassionCallback(), epochs=3)
    resumed = Attached()
    fit(resumed, PassionCallback(), epochs=3, ckpt=first_checkpoint(Attached(), when, tmp_path))
    assert same(get_passion_state_dict(resumed), get_passion_state_dict(whole))
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)

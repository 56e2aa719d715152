"""What loggers get, where the loss is added, and that nothing optional is imported before it is used."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import NAMES, MeanNet, batch, spec_of
from passion_plugin.errors import ConfigError, InputError, UsageError
from passion_plugin.integrations.logging import MetricsLogger, log_metrics
from passion_plugin.integrations.loss import PassionLoss
from passion_plugin.integrations.tensorboard import TensorBoardLog
from passion_plugin.training import PassionEngine, attach, find_engine
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
X, MASK, Y = batch([[1, 1, 0], [1, 1, 1]])


def wrap(**options: Any) -> PassionWrapper:
    torch.manual_seed(0)
    net = MeanNet(M, **options)
    return PassionWrapper(net, M, missing_rates=[0.5] * 3, spec=spec_of(net))


@pytest.fixture
def trained() -> PassionWrapper:
    model = wrap()
    model(X, MASK)
    model.passion_loss(Y)
    model.end_epoch()
    return model


def test_a_logger_is_called_with_a_step_only_where_there_is_one(trained: PassionWrapper) -> None:
    calls: list[Any] = []
    expected = {f"passion/{name}": value for name, value in trained.passion.metrics().items()}
    assert log_metrics(trained, lambda metrics: calls.append(metrics)) == expected
    log_metrics(trained, lambda metrics, step: calls.append((step, metrics)), 7, prefix="")
    assert calls == [expected, (7, trained.passion.metrics())]


def test_nothing_is_logged_before_there_is_anything() -> None:
    assert log_metrics(wrap(), pytest.fail) == {}


def test_a_metrics_logger_asks_only_when_it_is_time_to(
    trained: PassionWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[None] = []
    metrics = PassionEngine.metrics
    monkeypatch.setattr(PassionEngine, "metrics", lambda self: asked.append(None) or metrics(self))  # type: ignore[func-returns-value]
    steps: list[int] = []
    logger = MetricsLogger(lambda metrics, step: steps.append(step), every=3)
    for step in range(7):
        logger(trained, step)
    assert steps == [0, 3, 6]
    assert len(asked) == 3
    with pytest.raises(ConfigError, match="every=0"):
        MetricsLogger(print, every=0)


def test_a_writer_that_exists_is_used_as_it_is(trained: PassionWrapper) -> None:
    class Writer:
        def __init__(self) -> None:
            self.scalars: dict[str, tuple[float, int]] = {}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.scalars[name] = value, step

    writer = Writer()
    logged = log_metrics(trained, TensorBoardLog(writer), 3)
    assert writer.scalars == {name: (value, 3) for name, value in logged.items()}


def test_the_engine_is_found_inside_of_anything() -> None:
    model = wrap()
    for outer in (model, model.passion, nn.Sequential(model), nn.ModuleDict({"a": model, "b": model})):
        assert find_engine(outer) is model.passion
    bare = MeanNet(M)
    passion = attach(bare, modalities=M, missing_rates=[0.5] * 3, spec=spec_of(bare))
    assert find_engine(nn.Sequential(bare)) is passion


@pytest.mark.parametrize("what", [None, "text", MeanNet(M)], ids=["none", "text", "bare"])
def test_where_there_is_no_engine_the_error_says_what_to_do(what: Any) -> None:
    with pytest.raises(UsageError, match=rf"no PassionWrapper in this {type(what).__name__}.*wrap the network"):
        find_engine(what)


@pytest.mark.parametrize(
    "target", [Y, Y[:, None], F.one_hot(Y, 3).movedim(-1, 1), [Y[:, None], Y[:, None, ::2, ::2]]],
    ids=["labels", "channel", "one-hot", "list"],
)  # fmt: skip
def test_the_loss_is_the_users_plus_the_distillation(target: Any) -> None:
    plain, model = wrap(), wrap()
    plain(X, MASK)
    expected = plain.passion_loss(Y)

    seen: list[Any] = []
    loss = PassionLoss(lambda prediction, target: seen.append(target) or prediction.mean(), model)  # type: ignore[func-returns-value]
    prediction = model(X, MASK)
    assert torch.equal(loss(prediction, target), prediction.mean() + expected)
    assert seen[0] is target
    assert (list(loss.modules()), list(loss.state_dict())) == ([loss], []), "the engine is no part of the loss"


def test_the_loss_of_several_outputs_is_that_of_the_first() -> None:
    plain, model = wrap(), wrap(returns="tuple")
    plain(X, MASK)
    expected = plain.passion_loss(Y)
    loss = PassionLoss(lambda prediction, target: torch.zeros(2, 1), model)
    assert torch.equal(loss(model(X, MASK), Y[:, None]), expected.expand(2, 1))


def test_in_validation_the_loss_is_the_users_alone() -> None:
    model = wrap()
    loss = PassionLoss(F.cross_entropy, model)
    expected = F.cross_entropy(model.backbone(X, MASK), Y)
    with torch.no_grad():
        assert torch.equal(loss(model(X, MASK), Y), expected)
    model.eval()
    assert torch.equal(loss(model(X, MASK), Y), expected)


def test_a_loss_without_a_forward_and_a_wrong_target_are_refused() -> None:
    model = wrap()
    loss = PassionLoss(lambda prediction, target: prediction.mean(), model)
    with pytest.raises(UsageError, match="call forward"):
        loss(torch.zeros(2, 3, 4, 4), Y)
    with pytest.raises(InputError, match=r"labels\.long"):
        loss(model(X, MASK), Y[:, None].float())


def test_a_loop_like_that_of_nnunet_trains() -> None:
    """Deep supervision with a list of outputs and of targets, a network without a mask, presence by the name."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.small = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 3, 1)
            self.seg_layer = nn.Conv2d(6, 3, 1)
            self.deep_supervision = True

        def forward(self, x: Tensor) -> Any:
            features = self.body(x).relu()
            fine = self.seg_layer(features)
            return [fine, self.small(F.avg_pool2d(features, 2))] if self.deep_supervision else fine

    def deep_loss(outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
        weights = (2 / 3, 1 / 3)
        pairs = zip(weights, outputs, targets, strict=True)
        return sum(w * F.cross_entropy(output, target[:, 0].long()) for w, output, target in pairs)  # type: ignore[return-value]

    torch.manual_seed(0)
    network = Deep()
    keys = set(network.state_dict())
    passion = attach(network, modalities=M, missing_rates=[0.5] * 3)
    loss = PassionLoss(deep_loss, passion)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2, momentum=0.99, nesterov=True)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=2, power=0.9)
    targets = [Y[:, None].short(), Y[:, None, ::2, ::2].short()]

    def tell(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "passion_presence": MASK}

    for _ in range(2):
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            handle = network.register_forward_pre_hook(tell, with_kwargs=True)
            total = loss(network(X), targets)
            handle.remove()
            total.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
            optimizer.step()
        assert passion.end_epoch().counts.tolist() == [4, 4, 2]
        schedule.step()
    assert passion.loss_terms().pixel[0, 2] == 0 < passion.loss_terms().pixel[1, 2]
    assert set(network.state_dict()) == keys
    network.eval()
    with torch.no_grad():
        assert loss(network(X), targets) == deep_loss(network(X), targets)
        network.deep_supervision = False
        assert network(X).shape == (2, 3, 4, 4)


OPTIONAL = ("lightning", "pytorch_lightning", "accelerate", "monai", "ignite", "tensorboard", "wandb", "mlflow")


def test_nothing_optional_is_imported_before_it_is_used() -> None:
    code = f"""
import sys, passion_plugin
import passion_plugin.integrations.logging, passion_plugin.integrations.loss
import passion_plugin.integrations.monai, passion_plugin.integrations.tensorboard
found = [name for name in {OPTIONAL} if name in sys.modules]
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(Path(__file__).parents[2] / "src")})


def use_lightning() -> None:
    sys.modules.pop("passion_plugin.integrations.lightning", None)
    importlib.import_module("passion_plugin.integrations.lightning")


def use_monai() -> None:
    importlib.import_module("passion_plugin.integrations.monai").PassionHandler(wrap())


@pytest.mark.parametrize(
    ("missing", "extra", "use"),
    [
        pytest.param("lightning.pytorch", "lightning", use_lightning, id="lightning"),
        pytest.param("ignite.engine", "monai", use_monai, id="ignite"),
        pytest.param("monai.engines", "monai", use_monai, id="monai"),
        pytest.param("tensorboard", "tensorboard", lambda: TensorBoardLog("runs/x"), id="tensorboard"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    missing: str, extra: str, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'pip install "passion-plugin\[{extra}\]"'):
        use()

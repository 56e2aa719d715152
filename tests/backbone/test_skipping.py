"""Encoders of missing modalities that are left out change nothing but the time a step takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import NAMES, DeepNet, MeanNet, batch, copies_gradients
from passion_plugin import detect_spec
from passion_plugin.backbone import BackboneSpec
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError
from passion_plugin.wrapper import PassionWrapper

THREE = NAMES[:3]
LACKING = [[1, 0, 1]]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 1, 1]]


def trained(net: nn.Module, table: list[list[int]], skip: Any, **changes: Any) -> tuple[Tensor, Tensor, PassionWrapper]:
    """One step: prediction, total loss and the wrapper."""
    x, mask, y = batch(table)
    net.zero_grad(set_to_none=True)
    config = PassionConfig(skip_missing_encoders=skip, **changes)
    model = PassionWrapper(net, THREE, missing_rates=(0.2, 0.4, 0.6), config=config)
    prediction = model(x, mask)
    loss = F.cross_entropy(prediction, y) + model.passion_loss(y)
    loss.backward()
    return prediction.detach(), loss.detach(), model


def counting(module: Any) -> list[int]:
    """Rows of every call of a module from now on; runs of the checks are cleared by the caller."""
    rows: list[int] = []
    # Its first layer: hooks of the encoder itself fire for replayed features too.
    module[0].register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


@pytest.mark.parametrize("changes", [{}, {"memory": "low"}, {"modulation": "encoder"}, {"mode": "official"}])
def test_auto_leaves_out_what_the_whole_batch_lacks_and_changes_no_bit(changes: dict[str, Any]) -> None:
    net = MeanNet(THREE)
    wanted, loss, model = trained(net, LACKING, False, **changes)
    model.unwrap()
    gradients = copies_gradients(net)
    found, skipped_loss, model = trained(net, LACKING, "auto", **changes)
    assert model.passion.adapter.spec.can_skip_encoders
    assert torch.equal(found, wanted)
    assert torch.equal(skipped_loss, loss)
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in copies_gradients(net).items())
    x, mask, y = batch(LACKING)
    rows = counting(net.encoders["t1ce"])
    model(x, mask)
    model.passion_loss(y)
    assert rows == []


def test_auto_runs_an_encoder_on_all_rows_when_one_has_the_modality() -> None:
    net = MeanNet(THREE)
    model = trained(net, MIXED, "auto")[2]
    rows = counting(net.encoders["t1"])
    x, mask, _ = batch(MIXED)
    model(x, mask)
    assert rows == [3]


def test_by_rows_runs_each_encoder_on_the_rows_that_have_its_modality() -> None:
    net = MeanNet(THREE).double()
    x, mask, y = batch(MIXED, dtype=torch.float64)
    results = []
    model = None
    for skip in (False, True):
        net.zero_grad(set_to_none=True)
        if model is not None:
            model.unwrap()
        model = PassionWrapper(
            net, THREE, missing_rates=(0.2, 0.4, 0.6), config=PassionConfig(skip_missing_encoders=skip)
        )
        loss = F.cross_entropy(model(x, mask), y) + model.passion_loss(y)
        loss.backward()
        results.append((loss.detach(), copies_gradients(net)))
        torch.testing.assert_close(loss.detach(), results[0][0], rtol=1e-12, atol=0)
    for name, gradient in results[1][1].items():
        torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-9, atol=1e-13)
    rows = {name: counting(net.encoders[name]) for name in THREE}
    model(x, mask)
    assert rows == {"flair": [2], "t1ce": [3], "t1": [2]}


def test_left_out_encoders_get_a_zero_gradient_and_not_none() -> None:
    net = MeanNet(THREE)
    trained(net, LACKING, "auto")
    for parameter in net.encoders["t1ce"].parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_frozen_encoders_stay_without_gradient() -> None:
    net = MeanNet(THREE)
    net.encoders["t1ce"].requires_grad_(False)
    trained(net, LACKING, "auto")
    assert all(parameter.grad is None for parameter in net.encoders["t1ce"].parameters())


def test_shapes_are_learned_again_for_another_size_and_under_autocast() -> None:
    net = MeanNet(THREE)
    model = trained(net, LACKING, "auto")[2]
    for side in (4, 8):
        x, mask, y = batch(LACKING, side=side)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=side == 8):
            prediction = model(x, mask)
        assert prediction.shape[2:] == (side, side)
        model.passion_loss(y).backward()
    x, mask, y = batch([[1, 0, 1], [0, 0, 1]], side=8)
    assert len(model(x, mask)) == 2
    model.passion_loss(y).backward()


class Unmasked(MeanNet):
    """Masks nothing: what the encoder makes of a blank image takes part."""

    def fuse(self, encoded: Any, mask: Tensor) -> Tensor:
        return torch.stack(list(encoded)).mean(0) * mask.any(1).view(-1, 1, 1, 1)


class CheckpointedWhileTraining(MeanNet):
    """Encoders run again in backward, skipped or not."""

    def encode(self, x: Tensor) -> list[Tensor]:
        def stage(name: str, part: Tensor) -> Tensor:
            return self.encoders[name](part).tanh()

        parts = zip(self.names, x.chunk(len(self.names), 1), strict=True)
        if not self.training:
            return [stage(name, part) for name, part in parts]
        return [checkpoint(stage, name, part, use_reentrant=False) for name, part in parts]


class DeepWhileTraining(DeepNet):
    def forward(self, x: Tensor, mask: Tensor) -> Any:
        result = super().forward(x, mask)
        return result if self.training else result[0]


def with_layer(layer: Callable[[], nn.Module]) -> nn.Module:
    net = MeanNet(THREE)
    for name in THREE:
        net.encoders[name].append(layer())
    return net


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: Unmasked(THREE), id="features are not masked"),
        pytest.param(lambda: DeepNet(THREE), id="uni-modal outputs of missing modalities are returned"),
        pytest.param(lambda: DeepWhileTraining(THREE), id="they are returned in training only"),
        pytest.param(lambda: CheckpointedWhileTraining(THREE), id="encoders run again in backward"),
        pytest.param(lambda: with_layer(lambda: nn.BatchNorm2d(4)), id="batch statistics in an encoder"),
    ],
)
def test_nothing_is_left_out_where_it_would_change_something(build: Callable[[], nn.Module]) -> None:
    net = build()
    x, mask, _ = batch([[1, 1, 1]] * 2, side=8)
    spec = detect_spec(net, x, mask, modalities=THREE)
    assert not spec.can_skip_encoders
    model = PassionWrapper(
        net, THREE, missing_rates=(0.2, 0.4, 0.6), spec=spec, config=PassionConfig(skip_missing_encoders=True)
    )
    with pytest.raises(ConfigError, match="skip_missing_encoders=True, but the checks"):
        model(x, mask)


def test_nothing_is_left_out_in_front_of_batch_statistics() -> None:
    net = with_layer(lambda: nn.BatchNorm2d(4))
    x, mask, _ = batch([[1, 1, 1]] * 2, side=8)
    named = {name: f"encoders.{name}.0" for name in THREE}
    assert not detect_spec(net, x, mask, modalities=THREE, encoders=named).can_skip_encoders


def test_batch_statistics_behind_the_mask_are_no_obstacle() -> None:
    net = MeanNet(THREE, norm="batch")
    x, mask, _ = batch([[1, 1, 1]] * 2, side=8)
    assert detect_spec(net, x, mask, modalities=THREE).can_skip_encoders


def test_nothing_is_left_out_where_the_mask_is_no_argument() -> None:
    class AttributeMask(MeanNet):
        present: Tensor | None = None

        def forward(self, x: Tensor) -> Any:
            everything = torch.ones(len(x), len(self.names), dtype=torch.bool)
            return super().forward(x, everything if self.present is None else self.present)

    def with_mask(net: Any, x: Tensor, mask: Tensor) -> Any:
        net.present = mask
        try:
            return net(x)
        finally:
            net.present = None

    net = AttributeMask(THREE)
    for name in THREE:
        nn.init.zeros_(net.encoders[name][0].bias)  # features of a blank image are zero, for now
    x, mask, _ = batch([[1, 1, 1]] * 2, side=8)
    spec = detect_spec(net, x, mask, modalities=THREE, mask_argument=None, forward_fn=with_mask)
    assert spec.students == "replay"
    assert not spec.can_skip_encoders


def test_dropout_in_an_encoder_is_no_obstacle() -> None:
    net = with_layer(lambda: nn.Dropout(0.5))
    assert trained(net, LACKING, "auto")[2].passion.adapter.spec.can_skip_encoders  # type: ignore[union-attr]


def test_by_rows_refuses_outputs_without_a_batch() -> None:
    class Odd(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), torch.zeros(5)

    from passion_plugin.backbone._patching import patched_forward
    from passion_plugin.backbone._skipping import skipping
    from passion_plugin.errors import BackboneError

    encoders = {"a": (Odd(nn.Identity()),), "b": (Odd(nn.Identity()),)}
    handlers = skipping(encoders, ("a", "b"), torch.tensor([[True, False], [True, True]]), {}, by_rows=True)
    with patched_forward(handlers), pytest.raises(BackboneError, match="no batch in front"):
        encoders["b"][0](torch.zeros(2, 1, 3, 3))


@pytest.mark.parametrize("value", ["yes", None, 2])
def test_unknown_setting_is_an_error(value: Any) -> None:
    with pytest.raises(ConfigError, match="skip_missing_encoders must be"):
        PassionConfig(skip_missing_encoders=value)


def test_skippable_needs_encoders() -> None:
    with pytest.raises(ConfigError, match="can_skip_encoders=True needs"):
        BackboneSpec(classifier="c", can_skip_encoders=True)


class Warm(nn.Module):
    """An encoder that is given a number which changes at every step, such as a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.rows: list[int] = []

    def forward(self, x: Tensor, temperature: float, flag: bool) -> Tensor:
        self.rows.append(len(x))
        return self.conv(x) * temperature


class WarmNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: Warm() for name in THREE})
        self.classifier = nn.Conv2d(4, 3, 1)
        self.temperature = 1.0

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.temperature *= 0.99
        features = [self.encoders[name](x[:, m : m + 1], self.temperature, True) for m, name in enumerate(THREE)]
        weight = mask[:, :, None, None, None].float()
        return self.classifier((torch.stack(features, 1) * weight).sum(1))


def test_a_number_that_changes_at_every_step_neither_runs_the_encoder_nor_fills_memory() -> None:
    net = WarmNet()
    spec = BackboneSpec(
        classifier="classifier",
        encoders={name: f"encoders.{name}" for name in THREE},
        students="replay",
        can_skip_encoders=True,
    )
    model = PassionWrapper(net, THREE, missing_rates=(0.2, 0.4, 0.6), spec=spec)
    x, mask, y = batch(LACKING)
    for _ in range(5):
        model(x, mask, passion_target=y)
    assert net.encoders["t1ce"].rows == [1], "only the first step had to find out which shapes it returns"
    assert len(model.passion.adapter.layouts) == 1

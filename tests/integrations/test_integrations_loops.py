"""Fabric and Accelerate wrap the wrapper again: everything stays reachable and right."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn import functional as F

from models import NAMES, MeanNet, batch, spec_of
from passion_plugin.baselines import AGM
from passion_plugin.training import Strategy, attach, find_engine
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
ITEM = batch([[1, 1, 0], [1, 1, 1]])


def wrap(strategy: Strategy | None = None) -> PassionWrapper:
    torch.manual_seed(0)
    net = MeanNet(M)
    return PassionWrapper(net, M, missing_rates=[0.5] * 3, spec=spec_of(net), strategy=strategy)


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def train(model: Any, optimizer: Any, backward: Any, *, steps: int = 3, one_call: bool = False) -> list[Tensor]:
    """Losses of some steps with ``model``, whatever it is by now."""
    x, mask, y = ITEM
    losses = []
    for _ in range(steps):
        if one_call:
            prediction, passion_loss = model(x, mask, passion_target=y)
        else:
            prediction = model(x, mask)
            passion_loss = model.passion_loss(y)
        loss = F.cross_entropy(prediction, y) + passion_loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@pytest.fixture
def plain() -> tuple[list[Tensor], PassionWrapper]:
    model = wrap()
    losses = train(model, adam(model), Tensor.backward)
    model.end_epoch()
    return losses, model


@pytest.fixture(autouse=True)
def _no_accelerator_of_others() -> Iterator[None]:
    """Accelerate keeps the device and the precision of the first Accelerator for all that follow."""

    def forget() -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    forget()
    yield
    forget()


def assert_the_same(model: Any, losses: list[Tensor], plain: tuple[list[Tensor], PassionWrapper]) -> None:
    """Methods called on the outer module do what they do on the plain wrapper."""
    expected, reference = plain
    assert losses == expected
    model.end_epoch()
    assert model.passion.metrics() == reference.passion.metrics()
    assert torch.equal(find_engine(model).preference.beta, reference.passion.preference.beta)
    assert find_engine(model).metrics() == reference.passion.metrics()


@pytest.mark.parametrize("one_call", [False, True])
def test_fabric(one_call: bool, plain: tuple[list[Tensor], PassionWrapper]) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapper = wrap()
    model, optimizer = fabric.setup(wrapper, adam(wrapper))
    assert model is not wrapper
    assert_the_same(model, train(model, optimizer, fabric.backward, one_call=one_call), plain)


@pytest.mark.parametrize("one_call", [False, True])
def test_fabric_with_ddp_needs_no_marked_method(
    one_call: bool, plain: tuple[list[Tensor], PassionWrapper], tmp_path: Path
) -> None:
    # Put back afterwards: Fabric leaves variables that make an Accelerator think it is one process of many.
    with mock.patch.dict(os.environ, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}):
        # A group of our own, which Fabric takes over: it meets in a file, and needs no free port.
        store = f"file://{tmp_path}/rendezvous"
        torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        try:
            trained_with_ddp(one_call, plain)
        finally:
            # DistributedDataParallel has to be gone before its group, or may wait for gloo while gloo waits for it.
            gc.collect()
            torch.distributed.destroy_process_group()


def trained_with_ddp(one_call: bool, plain: tuple[list[Tensor], PassionWrapper]) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, strategy="ddp")
    fabric.launch()
    wrapper = wrap()
    model, optimizer = fabric.setup(wrapper, adam(wrapper))
    assert type(model._forward_module) is torch.nn.parallel.DistributedDataParallel
    assert_the_same(model, train(model, optimizer, fabric.backward, one_call=one_call), plain)


@pytest.mark.parametrize("strategy", [None, AGM])
def test_fabric_checkpoints_hold_the_engine(strategy: Any, tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapper = wrap(strategy and strategy())
    model, optimizer = fabric.setup(wrapper, adam(wrapper))
    train(model, optimizer, fabric.backward)
    fabric.save(tmp_path / "x.ckpt", {"model": model, "optimizer": optimizer})
    again = wrap(strategy and strategy())
    restored, other = fabric.setup(again, adam(again))
    fabric.load(tmp_path / "x.ckpt", {"model": restored, "optimizer": other})
    assert train(restored, other, fabric.backward) == train(model, optimizer, fabric.backward)
    assert again.end_epoch().beta.tolist() == wrapper.end_epoch().beta.tolist()


@pytest.mark.parametrize("one_call", [False, True])
def test_accelerate(one_call: bool, plain: tuple[list[Tensor], PassionWrapper]) -> None:
    accelerator = Accelerator(cpu=True)
    wrapper = wrap()
    model, optimizer = accelerator.prepare(wrapper, adam(wrapper))
    losses = train(model, optimizer, accelerator.backward, one_call=one_call)
    assert_the_same(accelerator.unwrap_model(model), losses, plain)


@pytest.mark.parametrize("one_call", [False, True])
def test_accelerate_with_a_forward_patched_for_autocast(one_call: bool) -> None:
    plain = wrap()
    x, mask, y = ITEM
    with torch.autocast("cpu", torch.bfloat16):
        prediction = plain(x, mask)
    expected = F.cross_entropy(prediction.float(), y) + plain.passion_loss(y)

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    wrapper = wrap()
    model, optimizer = accelerator.prepare(wrapper, adam(wrapper))
    assert "forward" in vars(model)
    loss = train(model, optimizer, accelerator.backward, steps=1, one_call=one_call)[0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.detach())
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x, mask), wrapper.backbone(x, mask).float())


@pytest.mark.parametrize("strategy", [None, AGM])
def test_accelerate_checkpoints_hold_the_engine(strategy: Any, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    wrapper = wrap(strategy and strategy())
    model, optimizer = accelerator.prepare(wrapper, adam(wrapper))
    train(model, optimizer, accelerator.backward)
    accelerator.save_state(str(tmp_path), safe_serialization=False)
    expected = train(model, optimizer, accelerator.backward), wrapper.end_epoch().beta.tolist()
    accelerator.load_state(str(tmp_path))
    assert (train(model, optimizer, accelerator.backward), wrapper.end_epoch().beta.tolist()) == expected


def test_an_attached_network_goes_into_safetensors_files(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    net = wrap().unwrap()
    passion = attach(net, modalities=M, missing_rates=[0.5] * 3, spec=spec_of(net))
    model, optimizer = accelerator.prepare(net, adam(net))
    accelerator.register_for_checkpointing(passion)

    def step() -> list[float]:
        prediction, passion_loss = model(ITEM[0], ITEM[1], passion_target=ITEM[2])
        accelerator.backward(F.cross_entropy(prediction, ITEM[2]) + passion_loss)
        optimizer.step()
        optimizer.zero_grad()
        return [passion_loss.item(), *passion.end_epoch().beta.tolist()]

    step()
    accelerator.save_state(str(tmp_path))
    assert (tmp_path / "model.safetensors").is_file()
    expected = step()
    accelerator.load_state(str(tmp_path))
    assert step() == expected

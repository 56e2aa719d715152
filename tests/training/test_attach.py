"""The engine without a wrapper: the same numbers, the same class of backbone, nothing left after detach."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import NAMES, DeepNet, MeanNet, batch, copies_gradients, spec_of
from passion_plugin import attach
from passion_plugin.backbone import BackboneSpec
from passion_plugin.config import PassionConfig
from passion_plugin.errors import UsageError
from passion_plugin.training import PassionEngine
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]
RATES = dict(zip(M, (0.1, 0.2, 0.5), strict=True))


def attached(net: MeanNet, *, config: PassionConfig | None = None, **spec: Any) -> PassionEngine:
    return attach(net, modalities=M, missing_rates=RATES, spec=spec_of(net, **spec), config=config)


def engine_of(net: nn.Module) -> PassionEngine:
    engine = getattr(net.forward, "__self__", None)
    assert isinstance(engine, PassionEngine)
    return engine


@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("students", ["replay", "rerun"])
def test_an_attached_engine_gives_the_losses_and_gradients_of_the_wrapper(memory: Any, students: Any) -> None:
    net = DeepNet(M, norm="batch")
    config = PassionConfig(memory=memory)
    wrapped = PassionWrapper(
        copy.deepcopy(net), M, missing_rates=RATES, spec=spec_of(net, students=students), config=config
    )
    passion = attached(net, config=config, students=students)
    x, mask, y = batch(MIXED)
    for _ in range(2):
        found, wanted = net(x, mask), wrapped(x, mask)
        assert torch.equal(found[0], wanted[0])
        one, other = passion.loss(y), wrapped.passion_loss(y)
        assert torch.equal(one, other)
        (F.nll_loss(found[0].log(), y) + one).backward()
        (F.nll_loss(wanted[0].log(), y) + other).backward()
        expected = copies_gradients(wrapped.backbone)
        assert all(torch.equal(value, expected[name]) for name, value in copies_gradients(net).items())
        assert torch.equal(passion.end_epoch().beta, wrapped.end_epoch().beta)
    for name, buffer in wrapped.backbone.named_buffers():
        assert torch.equal(net.get_buffer(name), buffer)


def test_the_backbone_keeps_its_class_and_its_checkpoints() -> None:
    net = MeanNet(M)
    keys = list(net.state_dict())
    names = [name for name, _ in net.named_modules()]
    attached(net)
    assert type(net) is MeanNet
    assert list(net.state_dict()) == keys
    assert [name for name, _ in net.named_modules()] == names


@pytest.mark.parametrize("detected", [False, True])
def test_mask_and_images_may_be_keywords(detected: bool) -> None:
    net = MeanNet(M)
    spec = None if detected else spec_of(net)
    passion = attach(net, modalities=M, missing_rates=RATES, spec=spec)
    x, mask, y = batch(MIXED)
    net(x, mask=mask)
    loss = passion.loss(y)
    net(mask=mask, x=x)
    assert torch.equal(passion.loss(y), loss)
    net(x, mask)
    assert torch.equal(passion.loss(y), loss)


def test_single_call_style_and_presence_work_on_the_backbone_itself() -> None:
    net = MeanNet(M)
    passion = attached(net)
    x, mask, y = batch(MIXED)
    net(x, mask)
    wanted = passion.loss(y)
    prediction, loss = net(x, mask, passion_target=y, passion_presence=mask)
    assert torch.equal(loss, wanted)
    net.eval()
    found, zero = net(x, mask, passion_target=y)
    assert zero.item() == 0
    assert torch.equal(found, prediction)


def test_eval_and_disabled_run_the_backbone_once() -> None:
    net = MeanNet(M)
    bare = copy.deepcopy(net)
    passion = attached(net)
    calls: list[int] = []
    net.decoder.register_forward_hook(lambda *_: calls.append(1))
    x, mask, _ = batch(MIXED)
    with passion.disabled():
        assert torch.equal(net(x, mask), bare(x, mask))
    net.eval()
    assert torch.equal(net(x, mask), bare(x, mask))
    assert len(calls) == 2
    net.train()(x, mask)
    assert len(calls) > 4


def test_hooks_on_the_backbone_fire_once_per_forward() -> None:
    net = MeanNet(M)
    fired: list[int] = []
    net.register_forward_hook(lambda *_: fired.append(1))
    attached(net)
    x, mask, _ = batch(MIXED)
    net(x, mask)
    assert fired == [1]


@pytest.mark.parametrize("modulation", ["distillation", "encoder"])
def test_detach_leaves_nothing(modulation: Any) -> None:
    net = DeepNet(M, norm="batch")
    before = {name: set(vars(module)) for name, module in net.named_modules()}
    passion = attached(net, config=PassionConfig(modulation=modulation))
    x, mask, y = batch(MIXED)
    net(x, mask)
    passion.loss(y).backward()
    net(x, mask)
    assert passion.detach() is net
    assert {name: set(vars(module)) for name, module in net.named_modules()} == before
    assert not any(p._backward_hooks for p in net.parameters())
    assert not any(value for module in net.modules() for key, value in vars(module).items() if key.endswith("_hooks"))
    net.zero_grad()
    fresh = DeepNet(M, norm="batch")
    fresh.load_state_dict(net.state_dict())
    with pytest.raises(TypeError, match="passion_target"):
        net(x, mask, passion_target=y)
    assert torch.equal(net(x, mask)[0], fresh(x, mask)[0])
    with pytest.raises(UsageError, match="nothing to compute a loss from"):
        passion.loss(y)


def test_detach_puts_back_a_forward_that_was_overridden_before() -> None:
    net = MeanNet(M)
    original = net.forward
    calls: list[int] = []

    def noted(x: Tensor, mask: Tensor) -> Any:
        calls.append(1)
        return original(x, mask)

    net.forward = noted  # type: ignore[method-assign]
    passion = attached(net)
    x, mask, y = batch([[1, 1, 0]])
    net(x, mask)
    assert passion.loss(y) > 0
    assert len(calls) == 3
    passion.detach()
    assert net.__dict__["forward"] is noted


def test_a_second_engine_is_refused_until_the_first_is_gone() -> None:
    net = MeanNet(M)
    passion = attached(net)
    with pytest.raises(UsageError, match=r"has a PassionEngine already; unwrap\(\) or detach\(\) that first"):
        attached(net)
    with pytest.raises((UsageError, ValueError), match=r"(?i)detach"):
        PassionWrapper(net, M, missing_rates=RATES, spec=spec_of(net))
    passion.detach()
    attached(net)


def test_a_wrapper_is_not_wrapped_again() -> None:
    net = MeanNet(M)
    model = PassionWrapper(net, M, missing_rates=RATES, spec=spec_of(net))
    with pytest.raises((UsageError, ValueError), match=r"(?i)unwrap|wrapped already"):
        PassionWrapper(model, M, missing_rates=RATES)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_the_engine_of_a_copy_acts_on_the_copy(how: str) -> None:
    net = MeanNet(M).double()
    passion = attached(net, config=PassionConfig(modulation="encoder"))
    passion.preference._beta = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    x, mask, y = batch(MIXED, dtype=torch.float64)
    net(x, mask, passion_target=y)[1].backward()
    other = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
    engine = engine_of(other)
    assert engine is not passion
    assert engine.backbone is other
    wanted = copies_gradients(net)
    other.zero_grad()
    other(x, mask)
    engine.loss(y).backward()
    assert all(torch.equal(value, wanted[name]) for name, value in copies_gradients(other).items())
    assert all(p.grad is None for p in net.parameters())
    engine.detach()
    assert "forward" not in vars(other)
    assert "forward" in vars(net)
    assert any(p._backward_hooks for p in net.parameters())
    assert not any(p._backward_hooks for p in other.parameters())


@pytest.mark.parametrize("memory", ["default", "low"])
def test_a_custom_call_that_goes_through_the_backbone_is_not_intercepted(memory: Any) -> None:
    net = MeanNet(M)
    seen: list[Tensor] = []

    def call(backbone: nn.Module, x: Tensor, mask: Tensor) -> Any:
        seen.append(mask)
        return backbone(x, mask)

    x, mask, y = batch(MIXED)
    plain = attached(copy.deepcopy(net), config=PassionConfig(memory=memory))
    plain.backbone(x, mask, passion_target=y)[1].backward()
    forwards: list[int] = []
    passion = attached(net, config=PassionConfig(memory=memory), forward_fn=call)
    inner = passion._bare_forward
    passion._bare_forward = lambda *a, **k: forwards.append(1) or inner(*a, **k)  # type: ignore[func-returns-value, method-assign]
    net(x, mask, passion_target=y)[1].backward()
    wanted = copies_gradients(plain.backbone)
    assert all(torch.equal(value, wanted[name]) for name, value in copies_gradients(net).items())
    assert [one.sum(0).tolist() for one in seen[:3]] == [[2, 0, 0], [0, 2, 0], [0, 0, 1]]
    assert len(seen) == (3 if memory == "default" else 6)
    assert len(forwards) == 1 + len(seen)


def test_an_example_settles_everything_before_the_first_batch() -> None:
    net = MeanNet(M)
    x, mask, y = batch([[1, 1, 1]] * 2)
    passion = attach(net, modalities=M, missing_rates=RATES, example_input=x, example_mask=mask)
    assert passion.adapter is not None
    assert isinstance(passion.adapter.spec, BackboneSpec)
    assert passion.adapter.spec.students == "replay"
    net(x, mask)
    assert passion.loss(y) > 0

"""Number formats: losses in float32 under autocast, float64 all the way, half-precision weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from models import NAMES, DeepNet, MeanNet, batch, copies_gradients, spec_of
from passion_plugin import PassionConfig, PassionWrapper

M = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]
RATES = (0.2, 0.5, 0.75)


def wrap(net: MeanNet, detected: bool = False, **config: Any) -> PassionWrapper:
    spec = None if detected else spec_of(net)
    return PassionWrapper(net, M, missing_rates=RATES, spec=spec, config=PassionConfig(**config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", ["default", "low"])
@pytest.mark.parametrize("inside", [True, False])
def test_under_autocast_the_losses_are_float32(dtype: torch.dtype, memory: Any, inside: bool) -> None:
    net = DeepNet(M)
    x, mask, y = batch(MIXED)
    wanted = wrap(copy.deepcopy(net))(x, mask, passion_target=y)[1]
    model = wrap(net, memory=memory)
    with torch.autocast("cpu", dtype):
        prediction = model(x, mask)
        inner = model.passion_loss(y) if inside else None
    loss = inner if inner is not None else model.passion_loss(y)
    assert loss.dtype == torch.float32
    assert {getattr(model.loss_terms(), name).dtype for name in ("pixel", "prototype", "unimodal")} == {torch.float32}
    assert loss.item() == pytest.approx(wanted.item(), rel=0.05)
    (F.nll_loss(prediction[0].float().log(), y) + loss).backward()
    gradients = copies_gradients(net)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in gradients.values())
    assert gradients["encoders.t1.0.weight"].any()


def test_the_loss_is_the_same_inside_and_outside_the_autocast_block() -> None:
    net = MeanNet(M)
    x, mask, y = batch(MIXED)
    found = []
    for inside in (True, False):
        model = wrap(copy.deepcopy(net))
        with torch.autocast("cpu", torch.bfloat16):
            model(x, mask)
            if inside:
                found.append(model.passion_loss(y))
        if not inside:
            found.append(model.passion_loss(y))
    assert torch.equal(found[0], found[1])


def test_the_terms_of_low_precision_logits_are_those_of_the_same_numbers_in_float32() -> None:
    net = MeanNet(M)
    x, mask, y = batch(MIXED)
    model = wrap(net)
    kept: dict[str, torch.Tensor] = {}
    net.classifier.register_forward_hook(lambda _m, _a, out: kept.setdefault(str(len(kept)), out.detach()))
    with torch.autocast("cpu", torch.bfloat16):
        model(x, mask)
        model.passion_loss(y)
    teacher, student = kept["0"].float(), kept["1"].float()
    assert kept["0"].dtype == torch.bfloat16
    log_teacher, log_student = (teacher[:2] / 4).log_softmax(1), (student / 4).log_softmax(1)
    wanted = 16 * (log_teacher.exp() * (log_teacher - log_student)).flatten(1).mean(1)
    torch.testing.assert_close(model.loss_terms().pixel[:2, 0], wanted, rtol=1e-4, atol=1e-7)


def test_the_first_batch_may_come_under_autocast_before_anything_was_detected() -> None:
    net = MeanNet(M)
    x, mask, y = batch(MIXED)
    model = wrap(net, detected=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, mask, passion_target=y)[1]
    assert loss.dtype == torch.float32
    assert model.passion.bound is not None
    assert model.passion.bound.spec.classifier == "classifier"
    assert model.passion.bound.spec.students == "replay"


@pytest.mark.parametrize("mode", ["default", "official"])
def test_float64_stays_float64(mode: Any) -> None:
    net = MeanNet(M).double()
    x, mask, y = batch(MIXED, dtype=torch.float64)
    model = wrap(net, mode=mode)
    loss = model(x, mask, passion_target=y)[1]
    assert loss.dtype == torch.float64
    assert model.loss_terms().distance.dtype == torch.float64
    single = wrap(copy.deepcopy(net).float(), mode=mode)
    other = single(x.float(), mask, passion_target=y)[1]
    assert other.item() == pytest.approx(loss.item(), rel=1e-4)
    assert other.item() != loss.item()


def test_weights_in_bfloat16_train_too() -> None:
    net = MeanNet(M).bfloat16()
    x, mask, y = batch(MIXED, dtype=torch.bfloat16)
    model = wrap(net)
    loss = model(x, mask, passion_target=y)[1]
    assert loss.dtype == torch.float32
    loss.backward()
    assert net.encoders["t1"][0].weight.grad.isfinite().all()
    assert net.encoders["t1"][0].weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_heads_follow_the_number_format_of_the_backbone(dtype: torch.dtype) -> None:
    net = MeanNet(M).to(dtype)
    x, mask, y = batch([[1, 1, 1]] * 2, dtype=dtype)
    spec = spec_of(net, students="heads")
    model = PassionWrapper(net, M, missing_rates=RATES, spec=spec, example_input=x, example_mask=mask)
    loss = model(x, mask, passion_target=y)[1]
    assert loss.isfinite()
    assert {p.dtype for p in model.heads.parameters()} == {dtype}


def test_heads_made_under_autocast_keep_full_precision_weights() -> None:
    net = MeanNet(M)
    x, mask, y = batch([[1, 1, 1]] * 2)
    with torch.autocast("cpu", torch.bfloat16):
        spec = spec_of(net, students="heads")
        model = PassionWrapper(net, M, missing_rates=RATES, spec=spec, example_input=x, example_mask=mask)
        loss = model(x, mask, passion_target=y)[1]
    assert {p.dtype for p in model.heads.parameters()} == {torch.float32}
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_huge_logits_give_finite_terms_and_gradients(scale: float) -> None:
    net = MeanNet(M)
    with torch.no_grad():
        net.classifier.weight.mul_(scale)
    x, mask, y = batch(MIXED)
    for mode in ("default", "official"):
        model = wrap(net, mode=mode)
        model(x, mask, passion_target=y)[1].backward()
        assert all(bool(value.isfinite().all()) for value in copies_gradients(net).values())

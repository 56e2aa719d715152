"""Number formats and layouts: autocast, gradient scaling, whole models in one format, determinism, channels last."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import NAMES, DeepNet, MeanNet, batch, copies_gradients, options_of, spec_of
from passion_plugin.config import PassionConfig
from passion_plugin.errors import PassionWarning
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]
TOGETHER = [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
RATES = (0.2, 0.5, 0.75)
RULES = ("passion", "passion-official", "ogm-ge", "agm", "pmr", "redcore")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def batch_on(device: str, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, mask, y = batch(*args, **kwargs)
    return x.to(device), mask.to(device), y.to(device)


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
    assert {getattr(model.passion.loss_terms(), name).dtype for name in ("pixel", "prototype", "unimodal")} == {
        torch.float32
    }
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
    torch.testing.assert_close(model.passion.loss_terms().pixel[:2, 0], wanted, rtol=1e-4, atol=1e-7)


def test_the_first_batch_may_come_under_autocast_before_anything_was_detected() -> None:
    net = MeanNet(M)
    x, mask, y = batch(MIXED)
    model = wrap(net, detected=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, mask, passion_target=y)[1]
    assert loss.dtype == torch.float32
    assert model.passion.adapter is not None
    assert model.passion.adapter.spec.classifier == "classifier"
    assert model.passion.adapter.spec.students == "replay"


@pytest.mark.parametrize("mode", ["default", "official"])
def test_float64_stays_float64(mode: Any) -> None:
    net = MeanNet(M).double()
    x, mask, y = batch(MIXED, dtype=torch.float64)
    model = wrap(net, mode=mode)
    loss = model(x, mask, passion_target=y)[1]
    assert loss.dtype == torch.float64
    assert model.passion.loss_terms().distance.dtype == torch.float64
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


class FloatMasked(MeanNet):
    """Multiplies by the mask as it comes, in whatever number format that is."""

    def fuse(self, encoded: Sequence[Tensor], mask: Tensor) -> Tensor:
        weight = mask[:, :, None, None, None]
        return (torch.stack(list(encoded), dim=1) * weight).sum(1) / weight.sum(1)


@pytest.mark.parametrize("detected", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_students_get_a_float_mask_in_the_number_format_of_the_call(dtype: torch.dtype, detected: bool) -> None:
    net = FloatMasked(M).to(dtype)
    x, mask, y = batch(TOGETHER, dtype=dtype)
    spec = None if detected else spec_of(net, mask_format="float")
    model = PassionWrapper(net, M, missing_rates=RATES, spec=spec)
    model(x, mask.to(dtype), passion_target=y)[1].backward()
    assert model.passion.adapter is not None
    assert model.passion.adapter.spec.mask_format == "float"
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
    assert {p.dtype for p in model.passion.heads.parameters()} == {dtype}


def test_heads_made_under_autocast_keep_full_precision_weights() -> None:
    net = MeanNet(M)
    x, mask, y = batch([[1, 1, 1]] * 2)
    with torch.autocast("cpu", torch.bfloat16):
        spec = spec_of(net, students="heads")
        model = PassionWrapper(net, M, missing_rates=RATES, spec=spec, example_input=x, example_mask=mask)
        loss = model(x, mask, passion_target=y)[1]
    assert {p.dtype for p in model.passion.heads.parameters()} == {torch.float32}
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
        model.unwrap()
        assert all(bool(value.isfinite().all()) for value in copies_gradients(net).values())


def ruled(net: MeanNet, rule: str) -> PassionWrapper:
    return PassionWrapper(net, M, missing_rates=RATES, spec=spec_of(net), **options_of(rule))


class Scaled:
    """A training in float16 with a gradient scaler, one batch at a time."""

    def __init__(self, net: MeanNet, rule: str = "passion", device: str = "cpu", *, init_scale: float = 2.0**8) -> None:
        self.device = device
        self.model = ruled(net.to(device), rule)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        self.scaler = torch.amp.GradScaler(device, init_scale=init_scale)

    def step(self, seed: int, *, brightness: float = 1.0) -> tuple[Tensor, bool]:
        """Return the loss of ours, and whether the scaler left the step out."""
        x, mask, y = batch_on(self.device, TOGETHER, seed=seed)
        with torch.autocast(self.device, torch.float16):
            prediction = self.model(x * brightness, mask)
            loss = self.model.passion_loss(y)
            total = F.cross_entropy(prediction.float(), y) + loss
        before = self.scaler.get_scale()
        self.scaler.scale(total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach(), self.scaler.get_scale() < before


@pytest.fixture
def _repeatable() -> Iterator[None]:
    """Convolutions on a GPU that give the same bits twice."""
    with torch.backends.cudnn.flags(deterministic=True):
        yield


@pytest.mark.usefixtures("_repeatable")
@on_each_device
@pytest.mark.parametrize("rule", ["passion", "passion-official", "agm", "pmr", "redcore"])
def test_a_batch_that_overflows_in_float16_is_as_if_it_had_not_been(rule: str, device: str) -> None:
    net = MeanNet(M)
    with_overflow, without = Scaled(net, rule, device), Scaled(copy.deepcopy(net), rule, device)
    for seed in range(4):
        assert not with_overflow.step(seed)[1]
        assert not without.step(seed)[1]
        if seed == 1:
            _, skipped = with_overflow.step(9, brightness=1e6)  # finite in float32, infinite in float16
            assert skipped
    ours, theirs = (scaled.model.backbone.state_dict() for scaled in (with_overflow, without))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.warns(PassionWarning, match="NaN or infinite"):
        found = with_overflow.model.end_epoch()
    wanted = without.model.end_epoch()
    assert found.beta.isfinite().all()
    if rule in ("passion", "passion-official", "redcore"):
        assert torch.equal(found.beta, wanted.beta)
        assert torch.equal(found.counts, wanted.counts)
        assert not torch.equal(found.beta, torch.ones(3, dtype=torch.float64))


def test_noise_and_factors_survive_an_overflow_in_float16() -> None:
    run = Scaled(MeanNet(M), "ogm-ge")
    for seed in range(4):
        run.step(seed, brightness=1e6 if seed == 1 else 1.0)
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    with pytest.warns(PassionWarning, match="NaN or infinite"):
        assert run.model.end_epoch().beta.isfinite().all()


@pytest.mark.usefixtures("_repeatable")
@on_each_device
def test_when_only_gradients_overflow_the_weights_rest_and_the_distances_count(device: str) -> None:
    net = MeanNet(M).to(device)
    before = copy.deepcopy(net.state_dict())
    plain, run = ruled(copy.deepcopy(net), "passion"), Scaled(net, device=device, init_scale=2.0**120)
    loss, skipped = run.step(0)
    assert skipped
    assert loss.isfinite()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    x, mask, y = batch_on(device, TOGETHER)
    with torch.autocast(device, torch.float16):
        wanted = plain(x, mask, passion_target=y)[1]
    assert torch.equal(loss, wanted)
    # The forward was sound, and so is what it measured.
    found = run.model.end_epoch()
    assert torch.equal(found.beta, plain.end_epoch().beta)
    assert found.skipped is not None
    assert not found.skipped.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_under_autocast(rule: str, dtype: torch.dtype) -> None:
    net = DeepNet(M)
    model = ruled(net, rule)
    x, mask, y = batch(MIXED)
    with torch.autocast("cpu", dtype):
        prediction, loss = model(x, mask, passion_target=y)
    assert loss.dtype == torch.float32
    (F.nll_loss(prediction[0].float().log(), y) + loss).backward()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in copies_gradients(net).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_a_whole_model_in_one_format_trains_with_every_rule(rule: str, dtype: torch.dtype) -> None:
    ndim = 2 if dtype == torch.bfloat16 else 3  # torch has no bfloat16 pooling of volumes on the CPU
    net = DeepNet(M, ndim=ndim).to(dtype)
    model = ruled(net, rule)
    x, mask, y = batch(MIXED, ndim=ndim, dtype=dtype)
    for _ in range(2):
        prediction, loss = model(x, mask, passion_target=y)
        assert prediction[0].dtype == dtype
        assert loss.isfinite()
        if "passion" in rule:
            assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert loss.dtype != torch.bfloat16
        (prediction[0].square().mean() + loss).backward()
        assert all(value.dtype == dtype and value.isfinite().all() for value in copies_gradients(net).values())
    assert model.end_epoch().beta.isfinite().all()


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ndim", [2, 3])
def test_deterministic_algorithms_give_the_same_bits_twice(rule: str, ndim: int) -> None:
    net = DeepNet(M, ndim=ndim, norm="batch", dropout=0.25)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = ruled(copy.deepcopy(net), rule)
        optimizer = torch.optim.AdamW(model.parameters())
        for seed in range(3):
            x, mask, y = batch(MIXED, ndim=ndim, seed=seed)
            prediction, loss = model(x, mask, passion_target=y)
            (F.nll_loss(prediction[0].log(), y) + loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([*model.backbone.state_dict().values(), model.end_epoch().beta])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.gpu
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ndim", [2, 3])
def test_deterministic_algorithms_give_the_same_bits_twice_on_a_gpu(rule: str, ndim: int) -> None:
    # No pooling of volumes and no cross-entropy of pixels: PyTorch has no deterministic ones on CUDA.
    net = MeanNet(M, ndim=ndim, norm="batch", dropout=0.25).cuda()
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = ruled(copy.deepcopy(net), rule)
        optimizer = torch.optim.AdamW(model.parameters())
        for seed in range(3):
            x, mask, y = batch_on("cuda", MIXED, ndim=ndim, seed=seed)
            prediction, loss = model(x, mask, passion_target=y)
            (prediction.square().mean() + loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([*model.backbone.state_dict().values(), model.end_epoch().beta])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


@on_each_device
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("ndim", "layout"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_channels_last_gives_the_losses_and_gradients_of_contiguous(
    rule: str, ndim: int, layout: torch.memory_format, device: str
) -> None:
    net = DeepNet(M, ndim=ndim).to(device, torch.float64)
    found = []
    for memory_format in (torch.contiguous_format, layout):
        torch.manual_seed(0)
        copied = copy.deepcopy(net).to(memory_format=memory_format)
        x, mask, y = batch_on(device, MIXED, ndim=ndim, dtype=torch.float64)
        x = x.contiguous(memory_format=memory_format)
        prediction, loss = ruled(copied, rule)(x, mask, passion_target=y)
        (prediction[0].square().mean() + loss).backward()
        found.append((loss.detach(), copies_gradients(copied)))
        assert copied.encoders["t1"][0].weight.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(found[1][0], found[0][0])
    for name, gradient in found[0][1].items():
        if rule == "ogm-ge" and name.startswith("encoders"):
            continue  # noise, drawn in the order of memory
        torch.testing.assert_close(found[1][1][name], gradient)
    assert any(bool(gradient.any()) for gradient in found[0][1].values())

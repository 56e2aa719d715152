"""Whatever goes wrong in a step, nothing is left behind, nothing is poisoned, and training goes on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from models import NAMES, DeepNet, MeanNet, NoMaskNet, batch, copies_gradients, options_of, set_beta, spec_of
from passion_plugin import attach, get_passion_state_dict
from passion_plugin.baselines import AGM
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError, ConfigError, InputError, PassionWarning, UsageError
from passion_plugin.losses import prototype_distillation
from passion_plugin.training import Strategy
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
RATES = (0.2, 0.5, 0.75)
RULES = (None, "ogm-ge", "agm", "pmr", "redcore")


def wrap(net: Any = None, *, strategy: Any = None, students: str = "replay", **config: Any) -> PassionWrapper:
    net = MeanNet(M) if net is None else net
    settings = PassionConfig(**config) if config else None
    spec = spec_of(net, students=students)
    options = (
        {"strategy": strategy, "config": settings} if isinstance(strategy, Strategy) else options_of(strategy, settings)
    )
    return PassionWrapper(net, M, missing_rates=RATES, spec=spec, **options)


def step(model: Any, presence: Any = MIXED, seed: int = 0, **shape: Any) -> Tensor:
    """Forward, loss and backward on a batch of its own; returns the loss of ours."""
    x, mask, y = batch(presence, seed=seed, **shape)
    prediction = model(x, mask)
    loss: Tensor = model.passion_loss(y)
    (tree_leaves(prediction)[0].float().square().mean() + loss).backward()
    return loss.detach()


def overflowing(rows: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of finite images, some so bright that the features of their samples are not finite."""
    x, mask, y = batch(MIXED, seed=seed)
    x[rows] = torch.where(mask[rows, :, None, None], 3e38, 0)
    return x, mask, y


def holdings(net: nn.Module) -> dict[str, Any]:
    """Everything that hangs on a network, by identity, and what its buffers hold."""
    found: dict[str, Any] = {}
    for name, module in net.named_modules():
        for key, value in vars(module).items():
            inside = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else value
            found[f"{name}:{key}"] = inside if isinstance(value, (dict, bool, int, float, str)) else id(value)
    for name, parameter in net.named_parameters():
        found[f"{name}:hooks"] = len(parameter._backward_hooks or {})
    for name, buffer in net.named_buffers():
        found[f"{name}:value"] = buffer.tolist()
    return found


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def same(first: Any, second: Any) -> bool:
    """Whether two nested states are equal bit for bit."""
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def goes_on(model: PassionWrapper) -> None:
    """The next steps give the loss and gradients of a new wrapper on a copy of the network."""
    adapter = model.passion.adapter
    students = "replay" if adapter is None else adapter.spec.students
    fresh = wrap(copy.deepcopy(model.backbone), students=students, **model.passion.config.as_dict())
    for wrapper in (model, fresh):
        wrapper.zero_grad()
    for seed in (5, 6):
        assert torch.equal(step(model, seed=seed), step(fresh, seed=seed))
    ours, theirs = copies_gradients(model.backbone), copies_gradients(fresh.backbone)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(bool(gradient.any()) for gradient in ours.values())


@dataclass
class Fuse:
    """An object of its own, which the checks of a backbone do not put back as they do with its attributes."""

    left: int = 0
    error: BaseException | None = None


class Trap(nn.Module):
    """Passes on what it gets until it is set to raise in one of its next calls."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse = Fuse()

    def set(self, call: int, error: BaseException) -> None:
        """Raise ``error`` in the call number ``call`` from now, from 1."""
        self.fuse.left, self.fuse.error = call, error

    def forward(self, x: Tensor) -> Tensor:
        """Identity."""
        self.fuse.left -= 1
        if self.fuse.left == 0 and self.fuse.error is not None:
            raise self.fuse.error
        return x


class TrappedNet(DeepNet):
    """Traps in encoder, fusion and decoder; batch normalisation, dropout, and a mode for students."""

    def __init__(self) -> None:
        super().__init__(M, norm="batch", dropout=0.25)
        self.fusion_trap = Trap()
        self.encoders["t1ce"].append(Trap())
        self.decoder.append(Trap())

    def fuse(self, encoded: Any, mask: Tensor) -> Tensor:
        """As it was, and through the trap."""
        fused: Tensor = self.fusion_trap(super().fuse(encoded, mask))
        return fused

    def trap(self, place: str) -> Trap:
        """The trap of ``"encoder"``, ``"fusion"`` or ``"decoder"``."""
        traps = {"encoder": self.encoders["t1ce"][-1], "fusion": self.fusion_trap, "decoder": self.decoder[-1]}
        trap: Trap = traps[place]
        return trap


class TestExceptions:
    @pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
    @pytest.mark.parametrize("config", [{}, {"modulation": "encoder"}, {"share_random_state": True}])
    @pytest.mark.parametrize(
        ("place", "call", "students"),
        [
            ("encoder", 1, "replay"),
            ("encoder", 2, "rerun"),
            ("fusion", 1, "replay"),
            ("fusion", 2, "replay"),
            ("decoder", 1, "replay"),
            ("decoder", 2, "replay"),
            ("decoder", 4, "replay"),
            ("decoder", 3, "mixed"),
        ],
    )
    def test_in_a_pass_the_backbone_is_left_exactly_as_it_was(
        self, place: str, call: int, students: str, config: dict[str, Any], error: type[BaseException]
    ) -> None:
        net = TrappedNet()
        model = wrap(net, students=students, **config)
        step(model)
        bare, before = copy.deepcopy(net), holdings(net)
        x, mask, y = batch(MIXED)
        torch.manual_seed(3)
        net.trap(place).set(call, error("on purpose"))
        # Of a student pass, which the user never asked for, the error says so; a Ctrl-C stays one.
        explain_errors = call > 1 and issubclass(error, Exception)
        with pytest.raises(BackboneError if explain_errors else error, match="on purpose") as raised:
            model(x, mask, passion_target=y)
        assert isinstance(raised.value.__cause__ if explain_errors else raised.value, error)
        random_state = torch.get_rng_state()
        # The bare network fails in the same place of its only pass, or gets through it.
        torch.manual_seed(3)
        bare.trap(place).set(call, error("on purpose"))
        with pytest.raises(error) if call == 1 else _nothing():
            bare(x, mask)
        wanted_state = torch.get_rng_state()
        changed = differing(before, holdings(net))
        hooks = [f"{name}:hooks" for name, _ in net.named_parameters()] if config.get("modulation") else []
        assert set(changed) <= {*hooks, *(f"{name}:value" for name, _ in net.named_buffers())}
        assert not any(parameter._backward_hooks for parameter in net.parameters())
        for name, buffer in bare.named_buffers():
            assert torch.equal(net.get_buffer(name), buffer), "running statistics are those of the bare network"
        if config.get("share_random_state"):
            assert torch.equal(random_state, wanted_state)
        with pytest.raises(UsageError, match="nothing to compute a loss from"):
            model.passion_loss(y)
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        goes_on(model)

    def test_with_an_attached_engine_too(self) -> None:
        net = TrappedNet()
        passion = attach(net, modalities=M, missing_rates=RATES, spec=spec_of(net))
        x, mask, y = batch(MIXED)
        for call in range(1, 5):
            before = {key: value for key, value in holdings(net).items() if not key.endswith(":value")}
            net.trap("decoder").set(call, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                net(x, mask)
            after = {key: value for key, value in holdings(net).items() if not key.endswith(":value")}
            assert differing(before, after) == []
        assert net(x, mask, passion_target=y)[1] > 0
        assert "forward" not in vars(passion.detach())

    def test_during_detection_nothing_is_touched(self) -> None:
        net = TrappedNet()
        model = PassionWrapper(net, M, missing_rates=RATES)
        before = holdings(net)
        x, mask, y = batch(MIXED)
        for call in (1, 7, 40):
            net.trap("fusion").set(call, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                model(x, mask)
            assert differing(before, holdings(net)) == []
        assert model(x, mask, passion_target=y)[1] > 0

    @pytest.mark.parametrize("single", [True, False])
    @pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
    def test_in_the_loss_nothing_is_counted_and_no_hook_is_left(
        self, error: type[BaseException], single: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = wrap(modulation="encoder")
        x, mask, y = batch(MIXED)
        model(x, mask, passion_target=y)[1].backward()
        before = get_passion_state_dict(model)

        def failing(*_: Any, **__: Any) -> Any:
            raise error("on purpose")

        def both() -> Tensor:
            model(x, mask)
            return model.passion_loss(y)

        with monkeypatch.context() as patch:
            patch.setattr("passion_plugin.training._strategy.passion_objective", failing)
            with pytest.raises(error, match="on purpose"):
                model(x, mask, passion_target=y) if single else both()
        assert same(get_passion_state_dict(model), before)
        assert not any(parameter._backward_hooks for parameter in model.parameters())
        with pytest.raises(UsageError, match="nothing to compute a loss from"):
            model.passion_loss(y)
        goes_on(model)

    def test_when_a_student_is_recomputed_in_backward(self) -> None:
        net = TrappedNet()
        model = wrap(net, memory="low")
        x, mask, y = batch(MIXED)
        loss = model(x, mask, passion_target=y)[1]
        before = holdings(net)
        net.trap("decoder").set(2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            loss.backward()
        assert differing(before, holdings(net)) == []
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        goes_on(model)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class TestNotFinite:
    def test_in_the_images_the_batch_is_refused_and_training_goes_on_without_it(self) -> None:
        net = MeanNet(M, norm="batch")
        model, other = wrap(net), wrap(copy.deepcopy(net))
        for seed in range(3):
            step(model, seed=seed)
            step(other, seed=seed)
            x, mask, y = batch(MIXED, seed=seed + 10)
            x[1, 2, 0, 0] = float("inf") if seed % 2 else float("nan")
            with pytest.raises(InputError, match=r"marked present: 't1' of sample 1\. Mark it missing"):
                model(x, mask, passion_target=y)
        assert same(get_passion_state_dict(model), get_passion_state_dict(other))
        assert same(model.state_dict(), other.state_dict())
        assert torch.equal(model.end_epoch().beta, other.end_epoch().beta)

    @pytest.mark.parametrize("mode", ["default", "official"])
    def test_in_features_the_sample_is_skipped_and_reported(self, mode: Any) -> None:
        net = MeanNet(M)
        model, other = wrap(net, mode=mode), wrap(copy.deepcopy(net), mode=mode)
        x, mask, y = overflowing([1])
        loss = model(x, mask, passion_target=y)[1]
        assert not loss.isfinite(), "what went wrong is not hidden from the optimizer"
        rows = torch.tensor([0, 2])
        other(x[rows], mask[rows], passion_target=y[rows])
        with pytest.warns(PassionWarning, match=r"epoch 0 .*left out \('flair': 1, 't1ce': 1, 't1': 1\).*GradScaler"):
            found = model.end_epoch()
        wanted = other.end_epoch()
        assert found.beta.isfinite().all()
        torch.testing.assert_close(found.beta, wanted.beta, rtol=1e-7, atol=0)
        assert torch.equal(found.counts, wanted.counts)
        assert found.skipped is not None
        assert found.skipped.tolist() == [1, 1, 1]
        assert model.passion.metrics()["skipped/t1"] == 1
        assert "skipped/t1" not in other.passion.metrics()
        assert all(value == value for value in model.passion.metrics().values())
        model(*overflowing([2])[:2], passion_target=y)
        again = model.end_epoch()  # A second warning would be an error here.
        assert again.skipped is not None
        assert again.skipped.tolist() == [0, 1, 1]

    def test_in_the_weights_beta_stays_as_it_is(self) -> None:
        model = wrap()
        step(model)
        before = model.end_epoch().beta
        with torch.no_grad():
            model.backbone.decoder[0].weight[0, 0, 0, 0] = float("nan")
        step(model)
        with pytest.warns(PassionWarning) as caught:
            report = model.end_epoch()
        assert ["empty" in str(warning.message) for warning in caught] == [True, False]
        assert report.empty
        assert torch.equal(report.beta, before)

    @pytest.mark.parametrize("rule", RULES)
    def test_a_step_that_overflowed_leaves_every_rule_as_it_was(self, rule: Any) -> None:
        net = MeanNet(M)
        model, other = wrap(net, strategy=rule), wrap(copy.deepcopy(net), strategy=rule)
        for wrapper in (model, other):
            step(wrapper, seed=1)
        model(*overflowing([0, 1, 2])[:2])
        model.passion_loss(overflowing([])[2])
        assert all(value == value and abs(value) < float("inf") for value in _factors(model))
        model.zero_grad()
        other.zero_grad()
        step(model, seed=2)
        step(other, seed=2)
        assert _factors(model) == _factors(other)
        ours, theirs = copies_gradients(model.backbone), copies_gradients(other.backbone)
        if rule != "ogm-ge":  # whose noise is drawn at random
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        with pytest.warns(PassionWarning, match="NaN or infinite"):
            report = model.end_epoch()
        assert report.skipped is not None
        assert report.skipped.sum() > 0
        assert report.beta.isfinite().all()

    @pytest.mark.parametrize("rule", ["ogm-ge", "agm"])
    def test_a_sample_that_overflowed_says_nothing_about_the_others(self, rule: str) -> None:
        net = MeanNet(M)
        model, other = wrap(net, strategy=rule), wrap(copy.deepcopy(net), strategy=rule)
        x, mask, y = overflowing([2])
        rows = torch.tensor([0, 1])
        model(x, mask, passion_target=y)
        other(x[rows], mask[rows], passion_target=y[rows])
        assert _factors(model) == pytest.approx(_factors(other), rel=1e-5)

    def test_factors_of_confident_wrong_logits_are_numbers(self) -> None:
        net = MeanNet(M)
        with torch.no_grad():
            net.classifier.weight.mul_(1e5)
        model = wrap(net, strategy=AGM())
        for seed in range(3):
            step(model, seed=seed)
            factors = {key: value for key, value in model.passion.metrics().items() if key.startswith("factor/")}
            assert set(factors) == {f"factor/{name}" for name in M}
            assert all(0 <= value < float("inf") for value in factors.values())


def _factors(model: PassionWrapper) -> list[float]:
    """What a rule keeps of a step, and what it would go on with."""
    state = model.passion.strategy.state_dict()
    for key in ("_skipped", "skipped", "_sums", "_counts", "sums", "counts", "samples_seen"):
        state.pop(key, None)
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    factors = [value for key, value in model.passion.metrics().items() if key.startswith("factor/")]
    return [*factors, *(float(value) for tensor in tensors for value in tensor.flatten())]


class TestOddBatches:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("label", [0, 2])
    def test_classes_may_be_empty(self, rule: Any, label: int) -> None:
        model = wrap(strategy=rule)
        x, mask, y = batch(MIXED)
        y = torch.full_like(y, label)
        prediction, loss = model(x, mask, passion_target=y)
        (F.cross_entropy(prediction, y) + loss).backward()
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in copies_gradients(model.backbone).values())
        assert model.end_epoch().beta.isfinite().all()

    @pytest.mark.parametrize("rule", [*RULES, "passion-official"])
    @pytest.mark.parametrize("ndim", [2, 3])
    def test_one_voxel(self, rule: Any, ndim: int) -> None:
        net = MeanNet(M, ndim=ndim)
        model = wrap(net, strategy=rule)
        step(model, ndim=ndim, side=1)
        assert all(gradient.isfinite().all() for gradient in copies_gradients(net).values())
        assert model.end_epoch().beta.isfinite().all()

    @pytest.mark.parametrize("rule", RULES)
    def test_a_huge_number_of_classes(self, rule: Any) -> None:
        net = MeanNet(M, classes=500)
        model = wrap(net, strategy=rule)
        loss = step(model, classes=500)
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in copies_gradients(net).values())
        assert model.end_epoch().beta.isfinite().all()

    def test_classes_that_no_sample_has_change_no_distance(self) -> None:
        student, teacher = torch.randn(2, 2, 5, 4, 4, dtype=torch.float64)
        labels = torch.randint(3, (2, 4, 4))
        few = prototype_distillation(student, teacher, labels, num_classes=3)
        many = prototype_distillation(student, teacher, labels, num_classes=500)
        for a, b in zip(few, many, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("rule", RULES)
    def test_a_modality_may_be_absent_for_a_whole_epoch(self, rule: Any) -> None:
        net = MeanNet(M)
        model = wrap(net, strategy=rule)
        step(model)
        before = model.end_epoch().as_dict()["t1"]["beta"]
        model.zero_grad()
        for seed in range(2):
            step(model, [[1, 1, 0], [1, 0, 0]], seed=seed)
        gradients = copies_gradients(net)
        assert not any(gradient.any() for name, gradient in gradients.items() if ".t1." in name)
        assert any(gradient.any() for name, gradient in gradients.items() if ".t1ce." in name)
        report = model.end_epoch()
        assert report.counts[2] == 0
        assert report.as_dict()["t1"]["beta"] == (
            before if rule in (None, "redcore") else model.passion.strategy.default_factor
        )
        assert report.relative_preference[2] == 0
        assert not {"relative_preference/t1", "pixel/t1", "skipped/t1"} & set(model.passion.metrics())
        step(model, [[1, 1, 1]])
        assert any(gradient.any() for name, gradient in copies_gradients(net).items() if ".t1." in name)
        assert model.end_epoch().counts[2] > 0

    @pytest.mark.parametrize("rule", RULES)
    def test_all_samples_may_have_a_single_modality(self, rule: Any) -> None:
        net = MeanNet(M)
        model = wrap(net, strategy=rule)
        bare = copy.deepcopy(net)
        alone = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
        for seed in range(2):
            assert step(model, alone, seed=seed) == 0
            x, mask, _ = batch(alone, seed=seed)
            bare(x, mask).square().mean().backward()
        wanted = copies_gradients(bare)
        assert all(torch.equal(gradient, wanted[name]) for name, gradient in copies_gradients(net).items())
        with pytest.warns(PassionWarning, match="single modality") if rule in (None, "redcore") else _nothing():
            report = model.end_epoch()
        assert torch.equal(report.beta, torch.full((3,), model.passion.strategy.default_factor, dtype=torch.float64))
        goes_on(model) if rule is None else step(model)


class TestSomebodyElse:
    @pytest.mark.parametrize("rule", [None, "ogm-ge"])
    def test_clearing_the_hooks_of_all_modules_has_no_effect(self, rule: Any) -> None:
        net = MeanNet(M)
        found = []
        for clear in (True, False):
            model = wrap(copy.deepcopy(net), strategy=rule)
            x, mask, y = batch(MIXED)
            prediction = model(x, mask)
            if clear:
                _clear_module_hooks(model)
            loss = model.passion_loss(y)
            if clear:
                _clear_module_hooks(model)
            torch.manual_seed(0)
            (prediction.square().mean() + loss).backward()
            found.append(copies_gradients(model.backbone))
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])

    def test_taking_away_forward_overrides_between_forward_and_loss_has_no_effect_on_a_wrapper(self) -> None:
        net = MeanNet(M)
        wanted = step(wrap(copy.deepcopy(net)))
        model = wrap(net)
        x, mask, y = batch(MIXED)
        model(x, mask)
        for module in model.modules():
            module.__dict__.pop("forward", None)
        assert torch.equal(model.passion_loss(y), wanted)
        goes_on(model)

    def test_taking_away_the_forward_of_an_attached_engine_is_an_error_at_the_next_loss(self) -> None:
        net = MeanNet(M)
        passion = attach(net, modalities=M, missing_rates=RATES, spec=spec_of(net))
        x, mask, y = batch(MIXED)
        net(x, mask)
        del net.__dict__["forward"]
        assert passion.loss(y) > 0
        net(x, mask)
        with pytest.raises(UsageError, match="nothing to compute a loss from"):
            passion.loss(y)
        passion.detach()

    def test_detach_leaves_a_forward_that_somebody_put_around_ours(self) -> None:
        net = MeanNet(M)
        passion = attach(net, modalities=M, missing_rates=RATES, spec=spec_of(net))
        ours, calls = net.forward, []

        def theirs(*args: Any, **kwargs: Any) -> Any:
            calls.append(len(args))
            return ours(*args, **kwargs)

        net.forward = theirs
        x, mask, y = batch(MIXED)
        net(x, mask)
        assert passion.loss(y) > 0
        passion.detach()
        assert net.__dict__["forward"] is theirs
        assert torch.equal(net(x, mask), copy.deepcopy(MeanNet.forward)(net, x, mask))
        assert len(calls) >= 2

    @pytest.mark.parametrize("call", [1, 2, 3])
    def test_taking_away_overrides_in_the_middle_of_a_pass_is_an_error(self, call: int) -> None:
        net = MeanNet(M)
        model = wrap(net)
        step(model)
        before, calls = holdings(net), []

        def clearing(*_: Any) -> None:
            calls.append(None)
            if len(calls) == call:
                for module in net.modules():
                    module.__dict__.pop("forward", None)

        x, mask, _ = batch(MIXED)
        hook = net.decoder.register_forward_hook(clearing)
        with pytest.raises(BackboneError, match=r"called 0 times"):
            model(x, mask)
        hook.remove()
        assert differing(before, holdings(net)) == []
        goes_on(model)

    @pytest.mark.parametrize("rule", ["passion", "ogm-ge", "agm"])
    @pytest.mark.parametrize("how", ["clear", "none"])
    def test_taking_the_hooks_of_parameters_before_they_acted_is_an_error(self, rule: str, how: str) -> None:
        config = {"modulation": "encoder"} if rule == "passion" else {}
        model = wrap(strategy=None if rule == "passion" else rule, **config)
        x, mask, y = batch(MIXED)

        def take() -> None:
            for parameter in model.backbone.parameters():
                if how == "none":
                    parameter._backward_hooks = None
                elif parameter._backward_hooks:
                    parameter._backward_hooks.clear()

        message = "were taken off their parameters before they acted"
        if rule == "passion":
            model(x, mask)
            take()
            with pytest.raises(UsageError, match=message):
                model.passion_loss(y)
        for noticed in (lambda: model(x, mask), model.end_epoch):
            loss = model(x, mask, passion_target=y)[1]
            take()
            (model.backbone(x, mask).square().mean() + loss).backward()
            with pytest.raises(UsageError, match=message):
                noticed()
        step(model)
        take()  # after backward, which does no harm
        step(model)
        model.end_epoch()


def _clear_module_hooks(model: nn.Module) -> None:
    for module in model.modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, kind).clear()


class TestTwoEngines:
    @pytest.mark.parametrize("second", ["wrapper", "attached", "compiled", "inside"])
    def test_an_attached_backbone_takes_no_second_one_until_the_first_is_gone(self, second: str) -> None:
        net = MeanNet(M)

        def engine(how: str) -> Any:
            if how == "attached":
                return attach(net, modalities=M, missing_rates=RATES, spec=spec_of(net))
            around = {"wrapper": lambda: net, "inside": lambda: nn.Sequential(net)}
            other: Any = torch.compile(net, backend="eager") if how == "compiled" else around[how]()
            return PassionWrapper(other, M, missing_rates=RATES)

        one = engine("attached")
        with pytest.raises(UsageError, match=r"has a PassionEngine already; unwrap\(\) or detach\(\)"):
            engine(second)
        one.detach()
        engine(second)

    def test_a_wrapper_is_not_wrapped_again(self) -> None:
        model = wrap()
        for again in (lambda: PassionWrapper(model, M, missing_rates=RATES), lambda: attach(model, modalities=M)):
            with pytest.raises(UsageError, match="has a PassionEngine already"):
                again()

    @pytest.mark.parametrize("strategy", [None, "ogm-ge"])
    def test_the_same_network_wrapped_anew_is_scaled_once(self, strategy: Any) -> None:
        """As in a notebook, where the cell that wraps is run again and nobody unwraps."""
        config = {} if strategy else {"modulation": "encoder"}
        net, found = MeanNet(M), []
        for again in (False, True):
            own = copy.deepcopy(net)
            if again:
                stale = wrap(own, strategy=strategy, **config)
                set_beta(stale, torch.tensor([0.5, 1.0, 1.5])) if strategy is None else None
                x, mask, y = batch(MIXED)
                stale(x, mask, passion_target=y)  # and its hooks wait for a backward that never comes
            model = wrap(own, strategy=strategy, **config)
            if strategy is None:
                set_beta(model, torch.tensor([0.5, 1.0, 1.5]))
            torch.manual_seed(0)
            step(model)
            found.append(copies_gradients(own))
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])

    def test_a_set_up_that_failed_leaves_the_backbone_free(self) -> None:
        net = MeanNet(M)
        with pytest.raises(ConfigError) as kept:
            PassionWrapper(net, M, missing_rates=RATES, spec=spec_of(net, classifier="nowhere"))
        wrap(net)
        assert "nowhere" in str(kept.value)


def test_data_parallel_replicas_are_refused_in_training_and_evaluate() -> None:
    net = MeanNet(M)
    model = wrap(net)
    replica: Any = model._replicate_for_data_parallel()
    replica.backbone = net._replicate_for_data_parallel()
    for name, module in net.named_children():
        setattr(replica.backbone, name, module)
    x, mask, y = batch(MIXED)
    with pytest.raises(UsageError, match=r"replica of DataParallel \(use DistributedDataParallel\)"):
        replica(x, mask, passion_target=y)
    model.eval()
    replica.eval()
    with torch.no_grad():
        assert torch.equal(replica(x, mask), model(x, mask))
    goes_on(model.train())


class TestStudentsThatAreTheTeacher:
    def test_a_replay_that_hides_nothing_is_an_error_at_the_first_batch(self) -> None:
        net = NoMaskNet(M)
        spec = spec_of(net, students="replay", mask_argument=None)
        model = PassionWrapper(net, M, missing_rates=RATES, spec=spec)
        x, mask, y = batch([[1, 1, 1]] * 2)
        with pytest.raises(BackboneError, match=r"the very features of the teacher.*students='mixed'"):
            model(x, passion_presence=mask, passion_target=y)

    def test_mixed_replay_of_the_same_network_is_fine(self) -> None:
        net = NoMaskNet(M)
        spec = spec_of(net, students="mixed", mask_argument=None)
        model = PassionWrapper(net, M, missing_rates=RATES, spec=spec)
        x, mask, y = batch([[1, 1, 1]] * 2)
        assert model(x, passion_presence=mask, passion_target=y)[1] > 0

    def test_a_classifier_of_zeros_is_no_reason(self) -> None:
        net = MeanNet(M)
        nn.init.zeros_(net.classifier.weight)
        assert step(wrap(net)).isfinite()

    def test_a_first_batch_that_failed_does_not_count_as_looked_at(self) -> None:
        net = NoMaskNet(M)
        spec = spec_of(net, students="replay", mask_argument=None)
        model = PassionWrapper(net, M, missing_rates=RATES, spec=spec)
        x, mask, y = batch([[1, 1, 1]] * 2)
        with pytest.raises(InputError):
            model(x * float("nan"), passion_presence=mask, passion_target=y)
        with pytest.raises(BackboneError, match="the very features of the teacher"):
            model(x, passion_presence=mask, passion_target=y)

    @pytest.mark.parametrize("same", ["blank", "equal"])
    def test_images_that_cannot_tell_are_no_reason_and_the_next_batch_is_compared(self, same: str) -> None:
        net = NoMaskNet(M)
        model = PassionWrapper(net, M, missing_rates=RATES, spec=spec_of(net, students="replay", mask_argument=None))
        x, mask, y = batch([[1, 1, 1]] * 2)
        alike = torch.zeros_like(x) if same == "blank" else x[:, :1].expand_as(x).contiguous()
        model(alike, passion_presence=mask, passion_target=y)
        with pytest.raises(BackboneError, match="the very features of the teacher"):
            model(x, passion_presence=mask, passion_target=y)

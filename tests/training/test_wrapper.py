"""The wrapper: what it returns, what it costs, what it leaves behind."""

from __future__ import annotations

import copy
import linecache
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from models import NAMES, DeepNet, MeanNet, NoMaskNet, batch, copies_gradients, spec_of
from passion_plugin import attach, detect_spec
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError, PassionWarning
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:3]
PRESENCE = [[1, 1, 0], [1, 1, 1], [0, 0, 1]]


def wrap(net: MeanNet | NoMaskNet, *, config: PassionConfig | None = None, **spec: Any) -> PassionWrapper:
    rates = {name: 0.1 * (index + 1) for index, name in enumerate(net.names)}
    return PassionWrapper(net, net.names, missing_rates=rates, spec=spec_of(net, **spec), config=config)


def counting(net: nn.Module) -> Counter[str]:
    """Count the calls of every leaf module from now on."""
    calls: Counter[str] = Counter()

    def counter(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    for name, module in net.named_modules():
        if not list(module.children()):
            module.register_forward_hook(counter(name))
    return calls


def same(found: Any, wanted: Any) -> bool:
    pairs = zip(tree_leaves(found), tree_leaves(wanted), strict=True)
    return type(found) is type(wanted) and all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


def traces(net: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Everything that could hold something of ours: attributes, hooks, of every module and parameter."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name, module in net.named_modules():
        plain = {key: value for key, value in vars(module).items() if not isinstance(value, (dict, set))}
        sizes = {key: len(value) for key, value in vars(module).items() if isinstance(value, (dict, set))}
        found.append((name, {**plain, **sizes}))
    for name, parameter in net.named_parameters():
        found.append((name, {"hooks": len(parameter._backward_hooks or {})}))
    return found


@pytest.mark.parametrize("returns", ["tensor", "tuple", "dict"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_training_forward_returns_exactly_what_the_backbone_returns(returns: str, ndim: int) -> None:
    net = MeanNet(M, ndim=ndim, returns=returns, dropout=0.5, norm="batch")
    bare = copy.deepcopy(net)
    x, mask, _ = batch(PRESENCE, ndim=ndim)
    torch.manual_seed(1)
    found = wrap(net)(x, mask)
    torch.manual_seed(1)
    assert same(found, bare(x, mask))


@pytest.mark.parametrize("returns", ["tensor", "tuple", "dict"])
def test_eval_is_the_bare_backbone_bit_for_bit_with_no_further_call(returns: str) -> None:
    net = MeanNet(M, returns=returns, norm="batch", dropout=0.5)
    bare = copy.deepcopy(net).eval()
    model = wrap(net)
    calls, plain = counting(net), counting(bare)
    x, mask, _ = batch(PRESENCE)
    model.eval()
    assert not net.training
    assert same(model(x, mask), bare(x, mask))
    assert calls == plain
    assert set(calls.values()) == {1}


def test_training_without_gradients_runs_no_student() -> None:
    net = MeanNet(M)
    model, calls = wrap(net), counting(net)
    x, mask, _ = batch(PRESENCE)
    with torch.no_grad():
        model(x, mask)
    assert set(calls.values()) == {1}


@pytest.mark.parametrize("modulation", ["distillation", "encoder", "none"])
def test_both_call_styles_give_bitwise_identical_gradients(modulation: Any) -> None:
    net = MeanNet(M)
    x, mask, y = batch(PRESENCE)
    found = []
    for single in (True, False):
        model = wrap(copy.deepcopy(net), config=PassionConfig(modulation=modulation))
        model.passion.preference._beta = torch.tensor([0.5, 1.25, 2.0], dtype=torch.float64)
        if single:
            prediction, extra = model(x, mask, passion_target=y)
        else:
            prediction = model(x, mask)
            extra = model.passion_loss(y)
        (F.cross_entropy(prediction, y) + extra).backward()
        found.append((extra.detach(), copies_gradients(model.backbone)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    assert any(bool(gradient.any()) for gradient in found[0][1].values())


def test_single_call_style_gives_a_pair_with_zero_in_eval() -> None:
    model = wrap(MeanNet(M)).eval()
    x, mask, y = batch(PRESENCE)
    prediction, loss = model(x, mask, passion_target=y)
    assert torch.equal(prediction, model(x, mask))
    assert loss.shape == ()
    assert loss.item() == 0


def test_arguments_may_be_given_by_keyword() -> None:
    net = MeanNet(M)
    x, mask, y = batch(PRESENCE)
    model = wrap(net)
    model(x, mask)
    wanted = model.passion_loss(y)
    model(mask=mask, x=x)
    assert torch.equal(model.passion_loss(y), wanted)


def test_passion_disabled_trains_like_the_bare_backbone_and_keeps_the_pending_step() -> None:
    net = MeanNet(M, norm="batch")
    model = wrap(net)
    x, mask, y = batch(PRESENCE)
    model(x, mask)
    calls = counting(net)
    with model.passion.disabled():
        model(x, mask)
        assert set(calls.values()) == {1}
    assert model.passion_loss(y) > 0
    model(x, mask)
    assert calls["decoder.0"] > 2


def test_passion_disabled_leaves_gradients_alone_under_encoder_modulation() -> None:
    net = MeanNet(M)
    model = wrap(net, config=PassionConfig(modulation="encoder"))
    model.passion.preference._beta = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    x, mask, y = batch(PRESENCE)
    model(x, mask, passion_target=y)[1].backward()
    bare = copy.deepcopy(net)
    bare.zero_grad()
    bare(x, mask).square().sum().backward()
    net.zero_grad()
    with model.passion.disabled():
        model.backbone(x, mask).square().sum().backward()
    assert torch.equal(net.encoders["flair"][0].weight.grad, bare.encoders["flair"][0].weight.grad)
    model(x, mask, passion_target=y)
    model.eval()
    net.zero_grad()
    model(x, mask).square().sum().backward()
    assert torch.equal(net.encoders["flair"][0].weight.grad, bare.encoders["flair"][0].weight.grad)


@pytest.mark.parametrize("config", [PassionConfig(), PassionConfig(modulation="encoder", memory="low")])
@pytest.mark.parametrize("detected", [False, True])
def test_unwrap_leaves_nothing_behind(config: PassionConfig, detected: bool) -> None:
    net = DeepNet(M, norm="batch")
    before, keys = traces(net), list(net.state_dict())
    rates = dict.fromkeys(M, 0.1)
    spec = None if detected else spec_of(net)
    if detected:
        x, mask, _ = batch(PRESENCE)
        spec = detect_spec(net, x, torch.ones_like(mask), modalities=M)
    model = PassionWrapper(net, M, missing_rates=rates, spec=spec, config=config)
    x, mask, y = batch(PRESENCE)
    for _ in range(2):
        model(x, mask, passion_target=y)[1].backward()
    assert model.unwrap() is net
    net.zero_grad()
    assert list(net.state_dict()) == keys
    assert _without_statistics(traces(net)) == _without_statistics(before)


def test_unwrap_puts_encoder_hooks_away_even_between_forward_and_backward() -> None:
    net = MeanNet(M)
    model = wrap(net, config=PassionConfig(modulation="encoder"))
    x, mask, _ = batch(PRESENCE)
    model(x, mask)
    assert any(p._backward_hooks for p in net.parameters())
    model.unwrap()
    assert not any(p._backward_hooks for p in net.parameters())


def test_the_unwrapped_wrapper_only_passes_calls_through() -> None:
    net = MeanNet(M)
    model = wrap(net)
    with model.passion.disabled():
        model.unwrap()
    calls = counting(net)
    x, mask, _ = batch(PRESENCE)
    model.train()(x, mask)
    assert set(calls.values()) == {1}


class Broken(nn.Identity):
    """Fails from the second call on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise ArithmeticError("broken on purpose")
        return x


def test_an_exception_inside_a_student_pass_leaves_the_backbone_as_it_was() -> None:
    net = DeepNet(M, norm="batch")
    net.decoder[3] = Broken()
    before = _without_statistics(traces(net))
    model = wrap(net)
    x, mask, y = batch(PRESENCE)
    with pytest.raises(BackboneError, match=r"only flair of 2 sample.*on purpose"):
        model(x, mask)
    net.decoder[3].calls = 0
    assert _without_statistics(traces(net)) == before
    assert net.is_training is True
    assert all(buffer is not None for buffer in net.decoder[1]._buffers.values())
    with pytest.raises(RuntimeError, match="nothing to compute a loss from"):
        model.passion_loss(y)
    net.decoder[3] = nn.Identity()
    assert model(x, mask, passion_target=y)[1] > 0


class Keeping(MeanNet):
    """Keeps on itself what its user reads after the call."""

    def __init__(self, modalities: Any) -> None:
        super().__init__(modalities)
        self.steps = 0
        self.terms: dict[str, list[Tensor]] = {"norm": []}
        self.bank: deque[Tensor] = deque(maxlen=2)
        self.decoder.rows = set()

    def fuse(self, encoded: Any, mask: Tensor) -> Tensor:
        """The mean, remembered."""
        self.steps += 1
        self.decoder.rows.add(len(mask))
        fused = super().fuse(encoded, mask)
        self.kl = fused.square().mean()
        self.terms["norm"].append(self.kl)
        self.terms["last"] = [fused]
        self.bank.append(fused.detach().mean())
        return fused


@pytest.mark.parametrize("students", ["replay", "mixed", "rerun"])
@pytest.mark.parametrize("memory", ["default", "low"])
def test_what_a_backbone_keeps_on_itself_is_that_of_the_fused_pass(students: Any, memory: Any) -> None:
    net = Keeping(M)
    bare = copy.deepcopy(net)
    model = wrap(net, students=students, config=PassionConfig(memory=memory))
    for seed in range(2):
        x, mask, y = batch(PRESENCE, seed=seed)
        bare(x, mask)
        model(x, mask)
        bare.kl.backward()
        net.kl.backward(retain_graph=True)
        wanted, found = copies_gradients(bare), copies_gradients(net)
        assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
        model.passion_loss(y).backward()
        net.zero_grad()
        assert net.steps == bare.steps == seed + 1
        assert same(dict(net.terms), dict(bare.terms))
        assert list(net.bank) == list(bare.bank)
        assert net.decoder.rows == {3}
    assert net.bank.maxlen == 2


def test_what_only_a_student_put_there_is_gone() -> None:
    class Few(MeanNet):
        def forward(self, x: Tensor, mask: Tensor) -> Any:
            if len(x) < 3:
                self.few = x
            return super().forward(x, mask)

    net = Few(M)
    x, mask, _ = batch(PRESENCE)
    wrap(net)(x, mask)
    assert not hasattr(net, "few")


def test_whether_passes_are_collective_is_asked_at_the_first_step_only_and_again_of_a_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[nn.Module] = []
    monkeypatch.setattr("passion_plugin.training._engine.has_collective_forward", lambda net: bool(asked.append(net)))
    model = wrap(MeanNet(M))
    x, mask, y = batch(PRESENCE)
    for _ in range(3):
        model(x, mask, passion_target=y)
    other = copy.deepcopy(model)
    other(x, mask, passion_target=y)
    assert [id(net) for net in asked] == [id(model.backbone), id(other.backbone)]


@pytest.mark.parametrize("how", ["wrapper", "inside", "attached", "single call"])
def test_the_warning_of_a_dropped_step_is_about_the_line_that_called(how: str) -> None:
    x, mask, y = batch(PRESENCE)
    calls: list[nn.Module] = []
    for _ in range(2):
        net = MeanNet(M)
        if how == "attached":
            attach(net, modalities=M, missing_rates=[0.5] * 3, spec=spec_of(net))
        calls.append(net if how == "attached" else nn.ModuleList([wrap(net)])[0])
    extra = {"passion_target": y} if how == "single call" else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for model in calls * 2:
            outer: Any = First(model) if how == "inside" else model
            model(x, mask)
            outer(x, mask, **extra)
    ours = [warning for warning in caught if issubclass(warning.category, PassionWarning)]
    lines = linecache.getlines(__file__)
    assert [warning.filename for warning in ours] == [__file__] * 2, "one of each engine"
    expected = "self.inner(*args)" if how == "inside" else "outer(x, mask, **extra)"
    assert all(expected in lines[warning.lineno - 1] for warning in ours)


def test_a_dropped_step_is_freed_before_the_next_passes() -> None:
    old: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    class Watching(MeanNet):
        def forward(self, x: Tensor, mask: Tensor) -> Any:
            alive.extend(step() is not None for step in old)
            return super().forward(x, mask)

    model = wrap(Watching(M))
    x, mask, _ = batch(PRESENCE)
    model(x, mask)
    old.append(weakref.ref(model.passion._step))
    assert old[0]() is not None
    with pytest.warns(PassionWarning, match="passion_loss"):
        model(x, mask)
    assert len(alive) > 1
    assert not any(alive)


class First(nn.Module):
    """A module of the user around a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


def test_attributes_of_the_backbone_are_read_and_set_through_the_wrapper() -> None:
    net = DeepNet(M)
    model = wrap(net)
    model.is_training = False
    assert net.is_training is False
    assert "is_training" not in vars(model)
    assert model.names == M
    model.note = "ours"
    assert not hasattr(net, "note")
    assert model.note == "ours"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_light_mode_is_on_in_student_passes_only() -> None:
    net = DeepNet(M)
    seen: list[bool] = []
    net.classifier.register_forward_hook(lambda *_: seen.append(net.is_training))
    x, mask, _ = batch(PRESENCE)
    raw = wrap(net)(x, mask)
    assert seen == [True, False, False, False]
    assert len(raw) == 3
    assert net.is_training is True


def test_light_may_replace_a_submodule_and_gives_it_back() -> None:
    net = DeepNet(M)
    aux = net.separate
    model = wrap(net, student_mode={"separate": nn.Identity()})
    x, mask, _ = batch(PRESENCE)
    model(x, mask)
    assert net.separate is aux
    assert "separate.weight" in net.state_dict()


def test_light_may_be_a_context_manager_and_may_add_arguments() -> None:
    from contextlib import contextmanager

    entered: list[nn.Module] = []

    @contextmanager
    def light(backbone: nn.Module) -> Any:
        entered.append(backbone)
        yield

    seen: list[bool] = []

    class Quick(MeanNet):
        def forward(self, x: Tensor, mask: Tensor, quick: bool = False) -> Any:
            seen.append(quick)
            return super().forward(x, mask)

    net = Quick(M)
    x, mask, _ = batch([[1, 1, 0]])
    wrap(net, student_mode=light, student_kwargs={"quick": True})(x, mask)
    assert entered == [net, net]
    assert seen == [False, True, True]


def test_batch_norm_keeps_the_running_statistics_of_the_bare_training() -> None:
    net = MeanNet(M, norm="batch")
    bare = copy.deepcopy(net)
    model = wrap(net)
    for seed in range(3):
        x, mask, y = batch(PRESENCE, seed=seed)
        model(x, mask, passion_target=y)
        bare(x, mask)
    for name, buffer in bare.named_buffers():
        assert torch.equal(net.get_buffer(name), buffer), name
    assert int(net.get_buffer("decoder.1.num_batches_tracked")) == 3


def test_a_backbone_without_mask_is_told_by_passion_presence() -> None:
    net = NoMaskNet(M)
    model = wrap(net, mask_argument=None, students="mixed")
    x, mask, y = batch(PRESENCE)
    found = model(x, passion_presence=mask)
    assert torch.equal(found, net(x))
    model.passion_loss(y)
    assert torch.equal(model.passion.loss_terms().active, mask & (mask.sum(1, keepdim=True) > 1))
    assert (model.passion.loss_terms().pixel[model.passion.loss_terms().active] > 1e-9).all()
    with pytest.raises(ValueError, match="pass passion_presence="):
        model(x)


def test_passion_presence_lets_students_see_what_a_random_subset_hides_from_the_teacher() -> None:
    net = MeanNet(M)
    model = wrap(net)
    x, everything, y = batch([[1, 1, 1], [1, 1, 1]])
    subset = torch.tensor([[True, False, True], [False, True, False]])
    prediction = model(x, subset, passion_presence=everything)
    assert torch.equal(prediction, net(x, subset))
    model.passion_loss(y)
    terms = model.passion.loss_terms()
    assert terms.active.all()
    # The teacher of the second sample is its own student for the only modality that it sees.
    assert terms.pixel[1, 1].abs() < 1e-6
    assert (terms.pixel[1, [0, 2]] > 1e-7).all()
    with pytest.raises(ValueError, match="passion_presence says are missing"):
        model(x, everything, passion_presence=subset)


def test_a_second_forward_without_loss_warns_once() -> None:
    model = wrap(MeanNet(M))
    x, mask, y = batch(PRESENCE)
    model(x, mask)
    with pytest.warns(PassionWarning, match="forward ran again before passion_loss"):
        model(x, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, mask)
    assert model.passion_loss(y) > 0


def test_a_refused_target_in_the_single_call_style_does_not_blame_the_next_forward() -> None:
    model = wrap(MeanNet(M))
    x, mask, y = batch(PRESENCE)
    with pytest.raises(ValueError, match=r"3 classes are 0\.\.2"):
        model(x, mask, passion_target=y + 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, mask, passion_target=y)


@pytest.mark.parametrize("when", ["before", "after", "used before"])
def test_a_compiled_model_gives_the_losses_and_gradients_of_the_plain_one(when: str) -> None:
    net = MeanNet(M[:2])
    x, mask, y = batch([[1, 1], [1, 0]])
    plain = wrap(copy.deepcopy(net))
    model: Any
    if when == "after":
        model = torch.compile(wrap(net), backend="eager")
    else:
        compiled: Any = torch.compile(net, backend="eager")
        if when == "used before":
            compiled(x, mask)
        # Names are suffixes of those inside the compiled module.
        model = PassionWrapper(compiled, M[:2], missing_rates={"flair": 0.1, "t1ce": 0.2}, spec=spec_of(net))
    wanted = plain(x, mask, passion_target=y)
    found = model(x, mask, passion_target=y)
    torch.testing.assert_close(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1])
    (found[0].mean() + found[1]).backward()
    (wanted[0].mean() + wanted[1]).backward()
    for name, gradient in copies_gradients(plain.backbone).items():
        torch.testing.assert_close(net.get_parameter(name).grad, gradient)
    found = model.eval()(x, mask)
    assert torch.equal(found, net(x, mask))


def _without_statistics(found: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, {key: value for key, value in values.items() if key != "calls"}) for name, values in found]

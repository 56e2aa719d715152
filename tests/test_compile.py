"""Every row of docs/compile.md: what may be compiled, and that hooks and beta still act afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import NAMES, MeanNet, batch, copies_gradients
from passion_plugin import Passion, PassionConfig, PassionWrapper, Preference

THREE = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
PAGE = Path(__file__).parent.parent / "docs" / "compile.md"


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module: nn.Module) -> Any:
    """Traced and guarded as always, but run by the interpreter: no C++ compiler is needed."""
    return torch.compile(module, backend="eager")


def wrap(net: Any, **config: Any) -> PassionWrapper:
    # A large step, so that beta is far from one in the second epoch.
    return PassionWrapper(net, THREE, missing_rates=(0.2, 0.4, 0.6), config=PassionConfig(eta=5.0, **config))


class Attached:
    """A backbone with an engine attached, to be used like a wrapper."""

    def __init__(self, net: Any, run: Any, passion: Passion) -> None:
        self.net, self.run, self.passion = net, run, passion

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def end_epoch(self) -> Preference:
        """As the wrapper has it."""
        return self.passion.end_epoch()

    def zero_grad(self) -> None:
        """As the wrapper has it."""
        self.net.zero_grad()

    def eval(self) -> Attached:
        """As the wrapper has it."""
        self.net.eval()
        return self


def attach(net: Any, **config: Any) -> Passion:
    return Passion.attach(net, modalities=THREE, missing_rates=(0.2, 0.4, 0.6), config=PassionConfig(eta=5.0, **config))


def attach_and_compile(net: Any, **config: Any) -> Any:
    passion = attach(net, **config)
    return Attached(net, compiled(net), passion)


def compile_and_attach(net: Any, **config: Any) -> Any:
    net.compile(backend="eager")
    return Attached(net, net, attach(net, **config))


def compile_encoders(net: Any, **config: Any) -> Any:
    for encoder in net.encoders.values():
        encoder.compile(backend="eager")
    return wrap(net, **config)


def compile_classifier(net: Any, **config: Any) -> Any:
    net.classifier.compile(backend="eager")
    return wrap(net, **config)


def compile_backbone_in_place(net: Any, **config: Any) -> Any:
    net.compile(backend="eager")
    return wrap(net, **config)


ROWS: dict[str, Callable[..., Any]] = {
    "`torch.compile(PassionWrapper(net, ...))`": lambda net, **config: compiled(wrap(net, **config)),
    "`PassionWrapper(torch.compile(net), ...)`": lambda net, **config: wrap(compiled(net), **config),
    "`net.compile()`, then wrap": compile_backbone_in_place,
    "`Passion.attach(net, ...)`, then `torch.compile(net)`": attach_and_compile,
    "`net.compile()`, then `Passion.attach(net, ...)`": compile_and_attach,
    "`encoder.compile()` for every encoder, then wrap": compile_encoders,
    "`decoder.compile()`, or another part, then wrap": compile_classifier,
}


def two_epochs(model: Any, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """Loss of a step in the second epoch, after its backward, and the beta that acted in it."""
    x, mask, y = batch(MIXED, side=8)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            prediction, passion_loss = model(x, mask, passion_target=y)
        total: Tensor = F.cross_entropy(prediction.float(), y) + passion_loss
        return total

    loss().backward()
    beta = model.end_epoch().beta
    model.zero_grad()
    total = loss()
    total.backward()
    return total.detach(), beta


@pytest.mark.parametrize("modulation", ["distillation", "encoder"])
@pytest.mark.parametrize("row", ROWS)
def test_compiled_gives_the_loss_and_gradients_of_eager_with_beta_acting(row: str, modulation: Any) -> None:
    net = MeanNet(THREE)
    plain = copy.deepcopy(net)
    wanted, beta = two_epochs(wrap(plain, modulation=modulation))
    assert not torch.allclose(beta, torch.ones_like(beta), atol=0.1)
    found, same = two_epochs(ROWS[row](net, modulation=modulation))
    assert torch.equal(same, beta)
    torch.testing.assert_close(found, wanted)
    gradients = copies_gradients(plain)
    for name, gradient in copies_gradients(net).items():
        torch.testing.assert_close(gradient, gradients[name])
    without = copy.deepcopy(plain)
    two_epochs(wrap(without, modulation="none"))
    # The comparison can fail: without hooks the gradients are others.
    assert not all(torch.allclose(gradient, gradients[name]) for name, gradient in copies_gradients(without).items())


@pytest.mark.parametrize("row", ROWS)
def test_compiled_works_under_autocast(row: str) -> None:
    net = MeanNet(THREE)
    wanted, _ = two_epochs(wrap(copy.deepcopy(net)), autocast=True)
    found, _ = two_epochs(ROWS[row](net), autocast=True)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("row", ROWS)
def test_gradients_of_two_compiled_steps_add_up(row: str) -> None:
    net = MeanNet(THREE)
    plain = copy.deepcopy(net)
    for model in (wrap(plain), ROWS[row](net)):
        for shown in (MIXED, MIXED[::-1]):
            x, mask, y = batch(shown, side=8)
            prediction, passion_loss = model(x, mask, passion_target=y)
            (F.cross_entropy(prediction, y) + passion_loss).backward()
    gradients = copies_gradients(plain)
    for name, gradient in copies_gradients(net).items():
        torch.testing.assert_close(gradient, gradients[name])


@pytest.mark.parametrize("row", ROWS)
def test_compiled_evaluates_like_the_bare_network(row: str) -> None:
    net = MeanNet(THREE)
    x, mask, _ = batch(MIXED, side=8)
    bare = copy.deepcopy(net).eval()
    model = ROWS[row](net)
    two_epochs(model)
    assert torch.equal(model.eval()(x, mask), bare(x, mask))


@pytest.mark.parametrize("rule", ["passion-official", "ogm-ge", "agm", "pmr", "redcore"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_every_rule_gives_the_loss_and_gradients_of_eager(rule: str, when: str) -> None:
    net = MeanNet(THREE)
    plain = copy.deepcopy(net)
    x, mask, y = batch(MIXED, side=8)
    found = []
    for module, compiling in ((plain, None), (net, when)):
        inner = compiled(module) if compiling == "before" else module
        wrapper = PassionWrapper(inner, THREE, missing_rates=(0.2, 0.4, 0.6), strategy=rule)
        model = compiled(wrapper) if compiling == "after" else wrapper
        prediction, loss = model(x, mask, passion_target=y)
        torch.manual_seed(0)  # of the noise of OGM-GE
        (F.cross_entropy(prediction, y) + loss).backward()
        found.append((loss.detach(), copies_gradients(module)))
    torch.testing.assert_close(found[1][0], found[0][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient)


def test_the_page_lists_what_is_tested() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert [line.split("|")[1].strip() for line in lines] == list(ROWS)

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

from models import NAMES, MeanNet, batch, copies_gradients, options_of
from passion_plugin import attach
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError
from passion_plugin.training import EpochReport, PassionEngine
from passion_plugin.wrapper import PassionWrapper

THREE = NAMES[:3]
MIXED = [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
PAGE = Path(__file__).parents[2] / "docs" / "compile.md"


class Part(nn.Module):
    """With a forward of its own: PyTorch skips that of ``nn.Sequential`` where it is compiled in place."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        """As the module inside."""
        result: Tensor = self.inside(x)
        return result


class Net(MeanNet):
    """Its encoders and its decoder can be compiled in place."""

    def __init__(self, modalities: Any) -> None:
        super().__init__(modalities)
        self.encoders = nn.ModuleDict({name: Part(encoder) for name, encoder in self.encoders.items()})
        self.decoder = Part(self.decoder)


# Of the encoders, the decoder and the classifier.
CONVOLUTIONS = 5
# Convolutions of each run of a graph.
IN_GRAPHS: list[int] = []


def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
    """The backend: traced and guarded as always, but run by the interpreter, so that no C++ compiler is needed."""
    convolutions = sum("conv2d" in str(node.target) for node in graph.graph.nodes)

    def run(*args: Any) -> Any:
        IN_GRAPHS.append(convolutions)
        return graph.forward(*args)

    return run


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    IN_GRAPHS.clear()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend=counting)


def wrap(net: Any, **config: Any) -> PassionWrapper:
    # A large step, so that beta is far from one in the second epoch.
    return PassionWrapper(net, THREE, missing_rates=(0.2, 0.4, 0.6), config=PassionConfig(eta=5.0, **config))


class Attached:
    """A backbone with an engine attached, to be used like a wrapper."""

    def __init__(self, net: Any, run: Any, passion: PassionEngine) -> None:
        self.net, self.run, self.passion = net, run, passion

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def end_epoch(self) -> EpochReport:
        """As the wrapper has it."""
        return self.passion.end_epoch()

    def zero_grad(self) -> None:
        """As the wrapper has it."""
        self.net.zero_grad()

    def eval(self) -> Attached:
        """As the wrapper has it."""
        self.net.eval()
        return self


class TwoCalls:
    """A wrapper, or one that was compiled, used with the second call for the loss."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, passion_target: Tensor | None = None) -> Any:
        prediction = self.model(*args)
        return prediction if passion_target is None else (prediction, self.model.passion_loss(passion_target))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def attached(net: Any, **config: Any) -> PassionEngine:
    return attach(net, modalities=THREE, missing_rates=(0.2, 0.4, 0.6), config=PassionConfig(eta=5.0, **config))


def attach_and_compile(net: Any, **config: Any) -> Any:
    passion = attached(net, **config)
    return Attached(net, compiled(net), passion)


def compile_and_attach(net: Any, **config: Any) -> Any:
    net.compile(backend=counting)
    return Attached(net, net, attached(net, **config))


def compile_encoders(net: Any, **config: Any) -> Any:
    for encoder in net.encoders.values():
        encoder.compile(backend=counting)
    return wrap(net, **config)


def compile_decoder(net: Any, **config: Any) -> Any:
    net.decoder.compile(backend=counting)
    return wrap(net, **config)


def compile_backbone_in_place(net: Any, **config: Any) -> Any:
    net.compile(backend=counting)
    return wrap(net, **config)


ROWS: dict[str, Callable[..., Any]] = {
    "`torch.compile(PassionWrapper(net, ...))`": lambda net, **config: compiled(wrap(net, **config)),
    "the same, then `model(x, mask)` and `model.passion_loss(target)`": lambda net, **config: TwoCalls(
        compiled(wrap(net, **config))
    ),
    "`PassionWrapper(torch.compile(net), ...)`": lambda net, **config: wrap(compiled(net), **config),
    "`net.compile()`, then wrap": compile_backbone_in_place,
    "`attach(net, ...)`, then `torch.compile(net)`": attach_and_compile,
    "`net.compile()`, then `attach(net, ...)`": compile_and_attach,
    "`encoder.compile()` for every encoder, then wrap": compile_encoders,
    "`decoder.compile()`, or another part, then wrap": compile_decoder,
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
    net = Net(THREE)
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
    net = Net(THREE)
    wanted, _ = two_epochs(wrap(copy.deepcopy(net)), autocast=True)
    found, _ = two_epochs(ROWS[row](net), autocast=True)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("row", ROWS)
def test_gradients_of_two_compiled_steps_add_up(row: str) -> None:
    net = Net(THREE)
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
    net = Net(THREE)
    x, mask, _ = batch(MIXED, side=8)
    bare = copy.deepcopy(net).eval()
    model = ROWS[row](net)
    two_epochs(model)
    assert torch.equal(model.eval()(x, mask), bare(x, mask))


@pytest.mark.parametrize("rule", ["passion-official", "ogm-ge", "agm", "pmr", "redcore"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_every_rule_gives_the_loss_and_gradients_of_eager(rule: str, when: str) -> None:
    net = Net(THREE)
    plain = copy.deepcopy(net)
    x, mask, y = batch(MIXED, side=8)
    found = []
    for module, compiling in ((plain, None), (net, when)):
        inner = compiled(module) if compiling == "before" else module
        wrapper = PassionWrapper(inner, THREE, missing_rates=(0.2, 0.4, 0.6), **options_of(rule))
        model = compiled(wrapper) if compiling == "after" else wrapper
        prediction, loss = model(x, mask, passion_target=y)
        torch.manual_seed(0)  # of the noise of OGM-GE
        (F.cross_entropy(prediction, y) + loss).backward()
        found.append((loss.detach(), copies_gradients(module)))
    torch.testing.assert_close(found[1][0], found[0][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient)


def inductor_network(net: Any) -> PassionWrapper:
    return wrap(torch.compile(net))


def inductor_parts(net: Any) -> PassionWrapper:
    for part in (*net.encoders.values(), net.decoder):
        part.compile()
    return wrap(net)


@pytest.mark.gpu
@pytest.mark.parametrize("compiling", [inductor_network, inductor_parts])
def test_generated_code_gives_the_loss_and_gradients_of_eager_on_a_gpu(compiling: Callable[[Any], Any]) -> None:
    pytest.importorskip("triton")
    net = Net(THREE).cuda()
    plain = copy.deepcopy(net)
    x, mask, y = (part.cuda() for part in batch(MIXED, side=8))
    found = []
    # TensorFloat32 keeps three digits.
    with torch.backends.cudnn.flags(allow_tf32=False):
        for module, model in ((plain, wrap(plain)), (net, compiling(net))):
            for _ in range(2):
                prediction, loss = model(x, mask, passion_target=y)
                (F.cross_entropy(prediction, y) + loss).backward()
                beta = model.end_epoch().beta
            found.append((loss.detach(), beta, copies_gradients(module)))
    assert bool((found[0][1] != 1).any())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def table() -> list[list[str]]:
    lines = [line.strip("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")] for line in lines[1:]]


def test_the_page_lists_what_is_tested() -> None:
    assert [cells[0] for cells in table()] == list(ROWS)


def in_graphs(model: Any, target: Tensor | None = None) -> int:
    """How many convolutions of a call run in graphs."""
    x, mask, _ = batch(MIXED, side=8)
    IN_GRAPHS.clear()
    model(x, mask) if target is None else model(x, mask, passion_target=target)
    return sum(IN_GRAPHS)


# PyTorch 2.5 gives the same results, but compiles again more often.
counted = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="the page is about newer versions of PyTorch"
)


@counted
@pytest.mark.parametrize("row", ROWS)
def test_the_page_says_what_runs_compiled(row: str) -> None:
    _, training, evaluation = next(cells for cells in table() if cells[0] == row)
    _, _, y = batch(MIXED, side=8)
    bare = in_graphs(ROWS[row](Net(THREE)).eval())
    # More steps, and a second model, than the compiler compiles a function anew.
    steps = {in_graphs(model, y) for model in (ROWS[row](Net(THREE)), ROWS[row](Net(THREE))) for _ in range(10)}
    everything = CONVOLUTIONS
    if training == "correct, runs eagerly":
        assert steps == {0}
        assert (evaluation, bare) == ("compiled", everything)
    elif training == "correct, compiled in pieces":
        # All but the classifier, which is listened to and a module of torch.nn; the decoder once more for each student.
        assert steps == {everything - 1 + len(THREE)}
        assert (evaluation, bare) == ("compiled", everything)
    elif training == "correct, compiled":
        assert steps == {len(THREE)}
        assert (evaluation, bare) == ("compiled in parts", len(THREE))
    else:
        assert training == "correct, compiled in the fused pass and in students"
        assert steps == {1 + len(THREE)}
        assert (evaluation, bare) == ("compiled in parts", 1)


@pytest.mark.parametrize("row", ["`PassionWrapper(torch.compile(net), ...)`", "`net.compile()`, then wrap"])
def test_evaluation_is_still_compiled_after_a_long_training(row: str) -> None:
    _, _, y = batch(MIXED, side=8)
    model = ROWS[row](Net(THREE))
    for _ in range(10):
        in_graphs(model, y)
    assert in_graphs(model.eval()) == CONVOLUTIONS


@counted
@pytest.mark.parametrize("part", ["network", "encoder", "decoder"])
def test_what_is_listened_to_cannot_be_asked_for_in_one_graph(part: str) -> None:
    x, mask, y = batch(MIXED, side=8)
    net = Net(THREE)
    {"network": net, "encoder": net.encoders["t1"], "decoder": net.decoder}[part].compile(
        backend=counting, fullgraph=True
    )
    model = wrap(net)
    if part == "decoder":
        assert in_graphs(model, y) == 1 + len(THREE)
    else:
        # The second one where an encoder is asked whose answer is known.
        with pytest.raises((torch._dynamo.exc.Unsupported, BackboneError), match=r"graph|no compiled frames|trac"):
            model(x, mask, passion_target=y)


@pytest.mark.parametrize("whole", [True, False], ids=["network", "encoders"])
def test_compiled_encoders_may_end_in_an_operation_in_place(whole: bool) -> None:
    # What the tracer thinks of the version of such an output is not what functionalised code gives it.
    net = Net(THREE)
    plain = copy.deepcopy(net)
    assert net.encoders["t1"].inside[-1].inplace
    for module in [net] if whole else net.encoders.values():
        module.compile(backend="aot_eager")
    wanted, beta = two_epochs(wrap(plain))
    found, same = two_epochs(wrap(net))
    assert torch.equal(same, beta)
    torch.testing.assert_close(found, wanted)
    gradients = copies_gradients(plain)
    for name, gradient in copies_gradients(net).items():
        torch.testing.assert_close(gradient, gradients[name])


def test_a_module_of_torch_itself_is_not_compiled_in_place() -> None:
    # What the page warns of. Should it fail, PyTorch has learnt it.
    inside = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh())
    inside.compile(backend=counting)
    inside(torch.rand(1, 3, 4, 4))
    assert IN_GRAPHS == []
    part = Part(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh()))
    part.compile(backend=counting)
    part(torch.rand(1, 3, 4, 4))
    assert IN_GRAPHS == [1]

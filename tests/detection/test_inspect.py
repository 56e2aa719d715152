"""The report reads well, never raises for a bad backbone, and leaves the backbone exactly as it was."""

from __future__ import annotations

import copy
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from passion_plugin.backbone import BackboneCall, BackboneSpec
from passion_plugin.config import PassionConfig
from passion_plugin.detection import BackboneReport, inspect_backbone, prepare_backbone
from passion_plugin.detection._sandbox import sandbox
from passion_plugin.errors import BackboneError, ConfigError

NAMES = ("pd", "t2")


class Net(nn.Module):
    """Two encoders, one frozen; shared and in-place layers, batch normalisation, dropout, and state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pd_encoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.t2_encoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Dropout(0.2))
        self.fusion = nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 3, 1)
        self.tied = self.head
        self.fusion.weight.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.history: list[Any] = ["kept"]
        self.settings = {"depth": [1, 2]}
        self.plain = torch.zeros(2)
        self.fail_at = 0

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        self.calls += 1
        self.plain.add_(1)
        self.history.append(x)
        self.settings["depth"].pop()
        self.settings["depth"] += [3, 4]
        self.last_mask = mask
        self.fusion.weight.mul_(1.001) if torch.is_grad_enabled() is False else None
        torch.rand(1), np.random.rand(), random.random()
        if 0 < self.fail_at <= len(self.history):
            raise ValueError("as told")
        parts = [self.pd_encoder(x[:, :1]), self.t2_encoder(x[:, 1:])]
        shown = [torch.where(mask[:, m, None, None, None], part, 0.0) for m, part in enumerate(parts)]
        return self.head(self.fusion(torch.cat(shown, dim=1))).softmax(1)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 2, 8, 8)


def full(batch: int = 2) -> Tensor:
    return torch.ones(batch, 2, dtype=torch.bool)


def attributes(backbone: nn.Module) -> dict[str, dict[str, Any]]:
    """Plain attributes of every module, by identity where they are objects."""
    return {
        name: {key: value for key, value in vars(module).items() if not key.startswith("_")}
        for name, module in backbone.named_modules()
    }


def random_numbers() -> tuple[float, float, float]:
    """Return the next number of each generator without moving it."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    drawn = float(torch.rand(1)), float(np.random.rand()), random.random()
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])
    return drawn


@pytest.mark.parametrize("fail_at", [0, 2, 9, 20], ids=lambda count: f"failure {count}" if count else "no failure")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_backbone_and_generators_are_left_as_they_were(training: bool, fail_at: int) -> None:
    backbone = Net().train(training)
    backbone.t2_encoder.eval()
    backbone.fail_at = fail_at
    weights, plain = copy.deepcopy(backbone.state_dict()), backbone.plain.clone()
    before, modes = attributes(backbone), {name: m.training for name, m in backbone.named_modules()}
    history, settings, x = list(backbone.history), copy.deepcopy(backbone.settings), images()
    drawn = random_numbers()

    report = inspect_backbone(backbone, x, full(), modalities=NAMES)

    assert any("as told" in problem for problem in report.problems) == (fail_at > 0)

    assert {name: m.training for name, m in backbone.named_modules()} == modes
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())
    assert torch.equal(backbone.plain, plain)
    after = attributes(backbone)
    assert {name: list(values) for name, values in after.items()} == {n: list(v) for n, v in before.items()}
    assert all(after[name][key] is value for name, values in before.items() for key, value in values.items())
    assert backbone.history == history
    assert backbone.settings == settings
    assert random_numbers() == drawn
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert not any("forward" in vars(module) for module in backbone.modules())


def test_user_hooks_and_replaced_forwards_survive() -> None:
    backbone = Net()
    handle = backbone.head.register_forward_hook(lambda module, args, output: 2 * output)
    own = backbone.fusion.forward
    backbone.fusion.forward = own  # type: ignore[method-assign]
    inspect_backbone(backbone, images(), full(), modalities=NAMES)
    assert list(backbone.head._forward_hooks) == [handle.id]
    assert vars(backbone.fusion)["forward"] is own


def test_sandbox_writes_only_where_something_changed() -> None:
    layer = nn.BatchNorm2d(3)
    versions = [tensor._version for tensor in (*layer.parameters(), *layer.buffers())]
    with sandbox(layer):
        layer(torch.randn(2, 3, 4, 4))
        assert not layer.training
        assert not torch.is_grad_enabled()
    assert layer.training
    assert [tensor._version for tensor in (*layer.parameters(), *layer.buffers())] == versions
    with sandbox(layer), torch.enable_grad():
        layer.train()
        layer(torch.randn(2, 3, 4, 4))
    assert float(layer.running_mean.abs().max()) == 0  # type: ignore[union-attr]


def test_sandbox_empties_what_a_network_collects() -> None:
    backbone = nn.Identity()
    backbone.bank, backbone.terms = deque([1.0, 2.0], maxlen=2), {"kl": [1.0]}
    with sandbox(backbone):
        backbone.bank.append(3.0)
        backbone.terms["kl"].append(2.0)
        backbone.terms["dice"] = []
    assert list(backbone.bank) == [1.0, 2.0]
    assert backbone.terms == {"kl": [1.0]}


def test_sandbox_switches_autocast_off() -> None:
    layer = nn.Linear(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(1, 2)).dtype == torch.bfloat16
        with sandbox(layer):
            assert layer(torch.randn(1, 2)).dtype == torch.float32


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pd_encoder, self.t2_encoder = nn.LazyConv2d(4, 3, padding=1), nn.LazyConv2d(4, 3, padding=1)
        self.head = nn.LazyConv2d(3, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        parts = [self.pd_encoder(x[:, :1]), self.t2_encoder(x[:, 1:])]
        shown = [torch.where(mask[:, m, None, None, None], part, 0.0) for m, part in enumerate(parts)]
        return self.head(torch.cat(shown, dim=1)).softmax(1)


def test_lazy_parameters_get_the_weights_that_the_users_seed_would_give() -> None:
    expected, backbone, x = Lazy(), Lazy(), images()
    torch.manual_seed(5)
    expected(x, full())
    torch.manual_seed(5)
    report = inspect_backbone(backbone, x, full(), modalities=NAMES)
    assert report.problems == []
    assert "parameters that had no shape before: 6" in str(report)
    for name, weight in expected.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], weight)


def test_lazy_modules_born_in_a_sandbox_stay_usable() -> None:
    backbone = Lazy().train()
    backbone.head.eval()
    with sandbox(backbone):
        expected = backbone(images(), full()).shape
    assert backbone.pd_encoder.training
    assert not backbone.head.training
    assert backbone(images(), full()).shape == expected
    assert inspect_backbone(backbone, images(), full(), modalities=NAMES).problems == []


def test_report_reads_from_verdict_to_layers(capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_backbone(Lazy(), images(), full(), modalities=NAMES)
    text = capsys.readouterr().out
    assert text == f"{report}\n"
    labels = " ".join(line.split("  ")[0] for line in text.splitlines()[2:] if not line.startswith(" "))
    assert labels == ("verdict encoders classifier call mask columns one alone students batch layers")
    for sentence in (
        "Lazy with 2 modalities: pd, t2",
        "can be wrapped: encoder outputs of the fused pass are replayed",
        "pd: pd_encoder",
        "t2: t2_encoder",
        "head, 3 classes; its output is the prediction after softmax; outputs='softmax'",
        "images: argument 0; mask: argument 1, bool, 1 = present",
        "column 1 switches t2 (effect of own content",
        "of hidden content 0)",
        "finite for every modality",
        "replay: exact, relative difference from a true run",
        "masks may differ within a batch; encoders of missing modalities can be skipped",
    ):
        assert sentence in " ".join(text.split())
    assert max(len(line) for line in text.splitlines()) <= 110


def test_report_lists_layers_and_parameters_that_students_meet() -> None:
    report = inspect_backbone(Net(), images(), full(), modalities=NAMES)
    text = " ".join(str(report).split())
    assert "normalisation: 1 BatchNorm2d, 1 InstanceNorm2d; dropout layers: 1" in text
    assert "frozen parameters: 1 (fusion.weight)" in text
    assert "shared parameters: 2 (head.weight = tied.weight, head.bias = tied.bias)" in text
    assert "in-place modules: 1 (pd_encoder.2)" in text
    assert any("running statistics" in warning for warning in report.warnings)


def test_values_of_the_example_do_not_matter() -> None:
    empty = torch.zeros(2, 2, 8, 8)
    holes = torch.full((2, 2, 8, 8), float("nan"))
    rows = torch.tensor([[True, False], [False, True]])
    for x in (images(), 1000 * images() - 500, empty, holes):
        report = inspect_backbone(Lazy(), x, rows, modalities=NAMES)
        assert report.problems == []
        assert report.spec is not None
        assert report.spec.students == "replay"


def test_modalities_are_numbered_or_named_by_the_keys_of_a_mapping() -> None:
    report = inspect_backbone(Lazy(), images(), full())
    assert report.modalities == ("0", "1")

    class Named(Lazy):
        def forward(self, x: dict[str, Tensor], mask: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(torch.cat([x["pd"], x["t2"]], dim=1), mask)

    example = {"pd": images()[:, :1], "t2": images()[:, 1:]}
    report = inspect_backbone(Named(), example, full())
    assert report.spec is not None
    assert report.spec.encoders == {"pd": ("pd_encoder",), "t2": ("t2_encoder",)}


def test_several_arguments_and_keywords_are_put_where_they_belong() -> None:
    class Two(Lazy):
        def forward(self, mask: Tensor, pd: Tensor, t2: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(torch.cat([pd, t2], dim=1), mask)

    example = (images()[:, :1], images()[:, 1:])
    by_position = inspect_backbone(Two(), example, full(), modalities=NAMES, input_argument=(1, 2), mask_argument=0)
    assert by_position.problems == []
    by_name = inspect_backbone(
        Two(), example, full(), modalities=NAMES, input_argument=("pd", "t2"), mask_argument="mask"
    )
    assert by_name.problems == []


class Unusable(nn.Module):
    def forward(self, *args: Any) -> Any:
        raise RuntimeError("nothing works")


class NotSegmenting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x.mean((1, 2)))


@pytest.mark.parametrize(
    ("backbone", "arguments", "reason"),
    [
        (Unusable(), (images(), full()), "nothing works"),
        (NotSegmenting(), (images(), full()), "segmentation network"),
        (Lazy(), (torch.randn(2, 3, 8, 8), full()), "channels"),
        (Lazy(), (images(),), "could not be run"),
        (Lazy(), ("images", full()), "got str"),
        (nn.DataParallel(Net()), (images(), full()), "DistributedDataParallel"),
    ],
    ids=["raises", "no segmentation", "wrong channels", "mask forgotten", "no tensor", "data parallel"],
)
def test_backbone_that_cannot_be_wrapped_is_reported_and_does_not_raise(
    backbone: nn.Module, arguments: tuple[Any, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = inspect_backbone(backbone, *arguments, modalities=NAMES)
    assert report.spec is None
    assert any(reason in problem for problem in report.problems)
    assert "cannot be wrapped as it is" in capsys.readouterr().out
    with pytest.raises(BackboneError, match=type(backbone).__name__):
        report.raise_problems()


def test_error_numbers_all_problems() -> None:
    report = BackboneReport("Net", problems=["first thing", "second thing"])
    with pytest.raises(BackboneError, match=r"(?s)2 problems.*1\. first thing.*2\. second thing"):
        report.raise_problems()
    assert "1. first thing" in str(report)


def test_report_without_problems_raises_nothing() -> None:
    BackboneReport("Net", warnings=["careful"]).raise_problems()


def test_unknown_field_is_an_error_of_the_caller_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"no field 'mask_arg'.*mask_argument"):
        inspect_backbone(Lazy(), images(), full(), modalities=NAMES, mask_arg=1)


def test_single_modality_is_a_problem() -> None:
    assert "two modalities" in inspect_backbone(Lazy(), images()[:, :1], full()[:, :1]).problems[0]


# What counts as an answer of the backbone


@pytest.mark.parametrize(
    ("module", "helper"),
    [
        ("_inspect", "skipping_difference"),
        ("_inspect", "check_training"),
        ("_checks", "different_masks"),
        ("_student_modes", "_largest_difference"),
        ("_student_modes", "student_pass"),
        ("_student_modes", "gradient_difference"),
        ("_student_modes", "true_student"),
        ("_probe", "fused_pass"),
        ("_gradients", "_trained"),
        ("_probe", "CallFormat.with_mask"),
    ],
)
def test_a_bug_of_ours_is_no_answer_of_the_backbone(module: str, helper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("bug")

    monkeypatch.setattr(f"passion_plugin.detection.{module}.{helper}", broken)
    with pytest.raises(RuntimeError, match=r"^bug$"):
        inspect_backbone(Lazy(), images(), full(), modalities=NAMES)


@pytest.mark.parametrize("helper", ["uneven_channels", "sandbox", "Probe"])
def test_nor_where_a_spec_is_taken_at_its_word(helper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("bug")

    monkeypatch.setattr(f"passion_plugin.detection._prepare.{helper}", broken)
    spec = BackboneSpec(classifier="head", students="rerun")
    with pytest.raises(RuntimeError, match=r"^bug$"):
        prepare_backbone(Net(), BackboneCall((torch.randn(2, 4, 8, 8), full()), {}), NAMES, spec, PassionConfig())


def test_a_bug_in_what_captures_outputs_surfaces_from_within_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passion_plugin.detection._encoders._SAMPLES", "many")
    with pytest.raises(TypeError, match="'str'"):
        inspect_backbone(Lazy(), images(), full(), modalities=NAMES)


def test_whatever_a_run_raises_is_an_answer() -> None:
    class Picky(Lazy):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            if len(x) == 1:
                raise KeyError("no single samples")
            if not mask.all():
                raise AttributeError("nothing may be missing")
            return super().forward(x, mask)

    problems = " ".join(inspect_backbone(Picky(), images(), full(), modalities=NAMES).problems)
    assert "a batch of one raises KeyError: 'no single samples'" in problems

"""Encoders, classifier, mask and student mode are found by experiment, on networks that are each awkward in one way."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from passion_plugin.backbone import BackboneSpec, MaskCodec
from passion_plugin.backbone._calls import BackboneCall
from passion_plugin.detection import BackboneReport, detect_spec, inspect_backbone, inspect_call
from passion_plugin.detection._classifier import follows
from passion_plugin.errors import BackboneError, PassionWarning
from passion_plugin.wrapper import PassionWrapper

NAMES = ("flair", "t1", "t1ce")


def conv(inputs: int, outputs: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


class Net(nn.Module):
    """One encoder per modality, features masked and concatenated, a 1x1 classifier."""

    names: tuple[str, ...] = NAMES
    classes = 3

    def __init__(self) -> None:
        super().__init__()
        for name in self.names:
            self.add_module(f"{name}_encoder", self.make_encoder())
        self.fusion = conv(4 * len(self.names), 4)
        self.head = conv(4, self.classes, 1)

    def make_encoder(self) -> nn.Module:
        return nn.Sequential(conv(1, 4), nn.GELU())

    def encode(self, x: Tensor) -> list[Tensor]:
        return [
            self.get_submodule(f"{name}_encoder")(part)
            for name, part in zip(self.names, x.chunk(len(self.names), 1), strict=True)
        ]

    def hide(self, features: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        return [
            torch.where(mask[:, m, None, None, None].bool(), feature, torch.zeros(()))
            for m, feature in enumerate(features)
        ]

    def fused(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.gelu(self.fusion(torch.cat(self.hide(self.encode(x), mask), dim=1)))

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.head(self.fused(x, mask))


def images(count: int = 3, batch: int = 2, side: int = 8) -> Tensor:
    return torch.randn(batch, count, side, side)


def full(count: int = 3, batch: int = 2) -> Tensor:
    return torch.ones(batch, count, dtype=torch.bool)


def found(backbone: nn.Module, **known: Any) -> BackboneReport:
    return inspect_backbone(backbone, images(), full(), modalities=NAMES, **known)


def spec_of(report: BackboneReport) -> BackboneSpec:
    assert report.problems == []
    assert report.spec is not None
    return report.spec


def only_problem(report: BackboneReport) -> str:
    assert len(report.problems) == 1, report.problems
    assert report.spec is None
    return report.problems[0]


# Encoders


def test_every_modality_gets_its_own_encoder_although_one_name_starts_with_another() -> None:
    spec = spec_of(found(Net()))
    assert spec.encoders == {name: (f"{name}_encoder",) for name in NAMES}
    assert spec.students == "replay"


class LongPath(Net):
    def __init__(self) -> None:
        super().__init__()
        for name in self.names:
            self.add_module(f"{name}_more", conv(4, 4, 1))

    def encode(self, x: Tensor) -> list[Tensor]:
        features = zip(self.names, super().encode(x), strict=True)
        return [self.get_submodule(f"{name}_more")(feature) for name, feature in features]


def test_private_path_of_several_modules_is_found_in_call_order() -> None:
    spec = spec_of(found(LongPath()))
    assert spec.encoders["t1"] == ("t1_encoder", "t1_more")


class SharedStage(Net):
    def __init__(self) -> None:
        super().__init__()
        self.shared = conv(4, 4)

    def encode(self, x: Tensor) -> list[Tensor]:
        return [self.shared(feature) for feature in super().encode(x)]


def test_module_called_once_per_modality_is_reported_as_shared_and_not_replayed() -> None:
    report = found(SharedStage())
    assert report.shared == ("shared",)
    assert "shared" not in str(spec_of(report).encoders)


class OneEncoder(Net):
    def __init__(self) -> None:
        super().__init__()
        self.single = conv(1, 4)

    def encode(self, x: Tensor) -> list[Tensor]:
        return [self.single(part) for part in x.chunk(3, 1)]


def test_network_without_private_modules_is_run_again() -> None:
    spec = spec_of(found(OneEncoder()))
    assert spec.encoders == {}
    assert spec.students == "rerun"


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(1, 4), conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.skip = self.first(x)
        return self.second(self.skip)


class SideChannel(Net):
    def make_encoder(self) -> nn.Module:
        return Remembers()

    def encode(self, x: Tensor) -> list[Tensor]:
        outputs = super().encode(x)
        skips = [self.get_submodule(f"{name}_encoder").skip for name in self.names]
        return [output + skip for output, skip in zip(outputs, skips, strict=True)]


def test_encoder_that_leaves_its_skips_on_itself_is_replayed_by_its_parts() -> None:
    spec = spec_of(found(SideChannel()))
    assert spec.students == "replay"
    assert spec.encoders["t1"] == ("t1_encoder.first", "t1_encoder.second")


class PrivateAfterMask(Net):
    """The second private module sees masked features, and its bias does not vanish."""

    def __init__(self) -> None:
        super().__init__()
        for name in self.names:
            self.add_module(f"{name}_late", conv(4, 4))

    def hide(self, features: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        hidden = zip(self.names, super().hide(features, mask), strict=True)
        return [self.get_submodule(f"{name}_late")(feature) for name, feature in hidden]


def test_module_behind_the_mask_is_left_out_of_the_replay() -> None:
    report = found(PrivateAfterMask())
    assert report.replay_errors["replay"] > 1e-3
    spec = spec_of(report)
    assert spec.students == "replay"
    assert spec.encoders == {name: (f"{name}_encoder",) for name in NAMES}


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.t1ce_encoder = self.flair_encoder


def test_modality_without_a_module_of_its_own_has_an_empty_entry() -> None:
    spec = spec_of(found(Tied()))
    assert spec.encoders == {"flair": (), "t1": ("t1_encoder",), "t1ce": ()}


# Classifier


class Channels(nn.Module):
    """Encoders for modalities of so many channels each, in one tensor or in a mapping."""

    def __init__(self, **channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.encoders = nn.ModuleDict({name: conv(count, 4) for name, count in channels.items()})
        self.head = conv(4, 3, 1)

    def forward(self, x: Any, mask: Tensor) -> Tensor:
        parts = x.split(list(self.channels.values()), 1) if isinstance(x, Tensor) else [x[n] for n in self.channels]
        encoded = [encoder(part) for encoder, part in zip(self.encoders.values(), parts, strict=True)]
        weight = mask[:, :, None, None, None].float()
        return self.head((torch.stack(encoded, 1) * weight).sum(1) / weight.sum(1))

    def absent(self, x: Tensor, mask: Tensor) -> Tensor:
        kept = mask.repeat_interleave(torch.tensor(list(self.channels.values())), dim=1)
        return torch.where(kept[:, :, None, None], x, 0)


UNEVEN = [{"rgb": 3, "depth": 1}, {"depth": 1, "rgb": 3}, {"optical": 4, "sar": 1, "dem": 1}, {"a": 1, "b": 4, "c": 1}]


def wrapped(net: Channels, students: Any = None, **fields: Any) -> PassionWrapper:
    spec = None
    if students is not None:
        encoders = {name: f"encoders.{name}" for name in net.channels}
        spec = BackboneSpec(encoders=encoders, classifier="head", students=students, **fields)
    return PassionWrapper(net, tuple(net.channels), missing_rates=dict.fromkeys(net.channels, 0.3), spec=spec)


def one_absent(net: Channels) -> tuple[Tensor, Tensor]:
    mask = full(len(net.channels), 4)
    mask[-1, -1] = False
    return net.absent(images(sum(net.channels.values()), 4), mask), mask


@pytest.mark.parametrize("channels", UNEVEN, ids=str)
@pytest.mark.parametrize("students", [None, "auto", "replay"])
def test_modalities_with_different_numbers_of_channels_in_one_tensor_are_refused(
    channels: dict[str, int], students: Any
) -> None:
    net = Channels(**channels)
    with pytest.raises(
        BackboneError, match=r"no module depends on .* different numbers of channels.*fill_missing=.*mapping"
    ):
        wrapped(net, students)(*one_absent(net))


@pytest.mark.parametrize("students", ["auto", "replay"])
@pytest.mark.parametrize("channels", UNEVEN, ids=str)
def test_different_numbers_of_channels_are_fine_in_a_mapping_or_with_absent(
    channels: dict[str, int], students: Any
) -> None:
    net = Channels(**channels)
    x, mask = one_absent(net)
    parts = dict(zip(channels, x.split(list(channels.values()), 1), strict=True))
    wanted = net(x, mask)
    assert torch.equal(wrapped(net, students)(parts, mask), wanted)
    model = wrapped(Channels(**channels), students, fill_missing=net.absent)
    model.backbone.load_state_dict(net.state_dict())
    assert torch.equal(model(x, mask), wanted)


@pytest.mark.parametrize("students", [None, "auto", "replay"])
def test_modalities_of_as_many_channels_each_may_lie_in_one_tensor(students: Any) -> None:
    net = Channels(a=2, b=2, c=2)
    x, mask = one_absent(net)
    assert torch.equal(wrapped(net, students)(x, mask), net(x, mask))


def test_a_number_of_channels_that_cannot_be_dealt_out_is_refused_with_a_cure() -> None:
    net = Channels(rgb=3, a=1, b=1)
    with pytest.raises(BackboneError, match=r"got \(4, 5, 8, 8\)\. Modalities with different numbers of channels need"):
        wrapped(net)(*one_absent(net))


class Head(Net):
    def __init__(self, finish: Callable[[Tensor], Any], classes: int = 3) -> None:
        self.classes = classes
        super().__init__()
        self.finish = finish

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return self.finish(super().forward(x, mask))


@pytest.mark.parametrize(
    ("finish", "relation", "outputs"),
    [
        (lambda z: z, "", "softmax"),
        (lambda z: z.softmax(1), "softmax", "softmax"),
        (lambda z: z.log_softmax(1), "log-softmax", "softmax"),
        (lambda z: z.sigmoid(), "sigmoid", "sigmoid"),
        (lambda z: {"aux": z.flatten(2).mean(2), "out": z.softmax(1), "n": 3}, "softmax", "softmax"),
        (lambda z: ((z.sigmoid(), [z]), None), "sigmoid", "sigmoid"),
        (
            lambda z: F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=True),
            "bilinear interpolation with aligned corners",
            "softmax",
        ),
        (
            lambda z: F.interpolate(z, scale_factor=2, mode="bilinear").softmax(1),
            "bilinear interpolation, softmax",
            "softmax",
        ),
        (
            lambda z: F.interpolate(z.sigmoid(), scale_factor=2, mode="bilinear"),
            "sigmoid, bilinear interpolation",
            "sigmoid",
        ),
        (lambda z: F.interpolate(z, scale_factor=2), "nearest interpolation", "softmax"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_classifier_is_found_by_value_and_tells_the_kind_of_output(
    finish: Callable[[Tensor], Any], relation: str, outputs: str
) -> None:
    report = found(Head(finish))
    spec = spec_of(report)
    assert spec.classifier == "head"
    assert spec.outputs == outputs
    assert report.match is not None
    assert report.match.relation == relation
    assert report.match.classes == 3


def test_single_region_is_sigmoid_even_when_logits_come_out() -> None:
    assert spec_of(found(Head(lambda z: z, classes=1))).outputs == "sigmoid"


def test_three_dimensional_logits_are_followed_through_trilinear_interpolation() -> None:
    logits = torch.randn(2, 3, 4, 4, 4)
    up = F.interpolate(logits, scale_factor=2, mode="trilinear").softmax(1)
    assert follows(logits, up) == "trilinear interpolation, softmax"


@pytest.mark.parametrize(
    "change",
    [lambda z: z + 1e-3, lambda z: 2 * z, lambda z: (2 * z).softmax(1), lambda z: z[:, :2], lambda z: z.argmax(1)],
    ids=["shifted", "scaled", "tempered", "cut", "labels"],
)
def test_prediction_that_is_something_else_is_not_matched(change: Callable[[Tensor], Tensor]) -> None:
    logits = torch.randn(2, 3, 4, 4)
    assert follows(logits, change(logits)) is None


class Decoys(Net):
    """Layers with as many outputs run before and after the classifier, and one is registered last."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.unused = (conv(4, 3, 1) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        fused = self.fused(x, mask)
        self.before(fused)
        logits = self.head(fused)
        self.after(fused)
        return logits.softmax(1)


def test_decoys_with_as_many_outputs_are_not_chosen() -> None:
    assert spec_of(found(Decoys())).classifier == "head"


class SumOfTwo(Decoys):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        fused = self.fused(x, mask)
        return self.before(fused) + self.head(fused)


def test_prediction_of_no_single_layer_is_a_problem_that_lists_candidates() -> None:
    problem = only_problem(found(SumOfTwo()))
    assert "classifier=" in problem
    assert "before, head" in problem


def test_classifier_given_by_hand_is_taken_and_checked() -> None:
    report = found(SumOfTwo(), classifier="head")
    assert spec_of(report).classifier == "head"
    assert report.match is None


def test_prediction_in_a_nameless_dictionary_is_not_guessed() -> None:
    class Nameless(Net):
        def forward(self, x: Tensor, mask: Tensor) -> Any:
            logits = super().forward(x, mask)
            return {"first": logits.square(), "second": logits}

    assert "'first', 'second' may each be the prediction" in only_problem(found(Nameless()))
    report = found(Nameless(), classifier="head")
    assert spec_of(report).classifier == "head"
    assert any("outputs='softmax' is assumed" in text for text in report.warnings)


class Disentangled(Net):
    """Styles and reconstructions in front of the segmentation in one dictionary; dropout in encoders is always on."""

    def __init__(self) -> None:
        super().__init__()
        for name in self.names:
            self.add_module(f"{name}_style", conv(1, 2))

    def encode(self, x: Tensor) -> list[Tensor]:
        return [F.dropout(feature, 0.5, training=True) for feature in super().encode(x)]

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        parts = zip(self.names, x.chunk(len(self.names), 1), strict=True)
        styles = {name: self.get_submodule(f"{name}_style")(part).mean((2, 3), keepdim=True) for name, part in parts}
        fused = self.fused(x, mask)
        logits = self.head(fused)
        return {
            **styles,
            "features": [fused],
            "image": fused.mean(1, keepdim=True),
            "seg_logit": logits,
            "seg_pred": logits.softmax(1),
        }


def test_a_dictionary_is_refused_before_anything_is_said_about_one_of_its_entries() -> None:
    report = found(Disentangled())
    assert "dictionary in which 'image', 'seg_logit', 'seg_pred' may each be the prediction" in only_problem(report)
    assert report.mask is None
    assert report.warnings == []


def test_with_a_classifier_by_hand_all_answers_are_about_its_output() -> None:
    report = found(Disentangled(), classifier="head")
    spec = spec_of(report)
    assert report.match is not None
    assert report.match.relation == "softmax"
    assert report.mask is not None
    # The first map of the dictionary is the style of flair, which no mask hides and no dropout touches.
    assert min(report.mask.own) > 1e-3
    assert max(report.mask.leak) == 0
    assert report.batch is not None
    assert report.batch.noise > 1e-2
    assert [text for text in report.warnings if "two runs in evaluation mode differ" in text]
    assert {f"{name}_encoder" for name in NAMES} <= {one for names in spec.encoders.values() for one in names}
    again = inspect_call(
        Disentangled(), BackboneCall((images(), full()), {}), NAMES, spec=spec.replaced(students="auto")
    )
    assert again.mask is not None
    assert min(again.mask.own) > 1e-3, "nor is a whole spec checked on another entry"


def test_wrong_classifier_given_by_hand_is_a_problem_with_close_matches() -> None:
    assert "Did you mean 'head'" in only_problem(found(Net(), classifier="haed"))


class HeadTwice(Net):
    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        fused = self.fused(x, mask)
        return self.head(fused), self.head(fused.tanh())


def test_classifier_that_runs_twice_is_a_problem_with_the_count() -> None:
    problem = only_problem(found(HeadTwice()))
    assert "'head'" in problem
    assert "2 times" in problem


class LinearHead(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.fused(x, mask).movedim(1, -1)).movedim(-1, 1)


def test_classifier_with_classes_last_is_a_problem() -> None:
    assert "last dimension" in only_problem(found(LinearHead()))


def test_network_that_returns_labels_is_refused() -> None:
    assert "labels" in only_problem(found(Head(lambda z: z.argmax(1))))


class SwitchedHeads(Net):
    def __init__(self, harmless: bool) -> None:
        super().__init__()
        self.is_training, self.harmless = True, harmless
        self.aux = conv(4, 3, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        fused = self.fused(x, mask)
        if self.is_training:
            return self.head(fused), self.aux(fused)
        return self.head(fused if self.harmless else 2 * fused)


@pytest.mark.parametrize("harmless", [True, False])
def test_training_switch_becomes_the_light_mode_only_where_it_changes_no_prediction(harmless: bool) -> None:
    assert spec_of(found(SwitchedHeads(harmless))).student_mode == ({"is_training": False} if harmless else {})


class SwitchInsideCheckpoint(SwitchedHeads):
    """What is checkpointed runs again in backward, when the switch is back."""

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        def decoded(*features: Tensor) -> tuple[Tensor, ...]:
            aux = (self.aux(features[0]),) if self.is_training else ()
            return self.fusion(torch.cat(features, dim=1)), *aux

        features = self.hide(self.encode(x), mask)
        fused, *aux = checkpoint(decoded, *features, use_reentrant=False) if self.training else decoded(*features)
        return self.head(fused), *aux


def test_training_switch_that_a_checkpoint_reads_again_is_left_alone() -> None:
    spec = spec_of(found(SwitchInsideCheckpoint(harmless=True)))
    assert spec.student_mode == {}
    assert spec.students == "replay"


# Mask


class Masked(Net):
    def __init__(self, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.read = read

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        return super().forward(x, self.read(mask, x))


def test_mask_in_which_one_says_missing_is_recognised() -> None:
    report = inspect_backbone(Masked(lambda drop, x: ~drop), images(), ~full(), modalities=NAMES)
    assert spec_of(report).mask_meaning == "missing"


class TwoMasked(Masked):
    names = ("pd", "t2")


def test_missing_convention_is_not_mistaken_for_a_permutation_with_two_modalities() -> None:
    report = inspect_backbone(TwoMasked(lambda drop, x: ~drop), images(2), ~full(2), modalities=("pd", "t2"))
    assert spec_of(report).mask_meaning == "missing"


def test_wrongly_given_meaning_is_a_problem_that_says_so() -> None:
    report = found(Masked(lambda drop, x: ~drop), mask_meaning="present")
    assert "mask_meaning" in only_problem(report)


def test_permuted_columns_are_refused_with_the_map_and_accepted_once_declared() -> None:
    backbone = Masked(lambda mask, x: mask[:, [2, 0, 1]])
    problem = only_problem(found(backbone))
    assert "mask column 0 switches 't1'" in problem
    assert "mask column 2 switches 'flair'" in problem
    columns = ("t1", "t1ce", "flair")
    assert f"mask_columns={columns!r}" in problem
    assert spec_of(found(backbone, mask_columns=columns)).mask_columns == columns


def test_second_argument_that_is_no_mask_is_refused_with_what_to_pass() -> None:
    class TwoTensors(Net):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(torch.cat([first, second], dim=1), full())

    first, second = images()[:, :1], images()[:, 1:]
    problem = only_problem(inspect_backbone(TwoTensors(), first, second, modalities=("flair", "others")))
    assert "mask_argument= (None when there is none)" in problem
    assert "input_argument=(0, 1)" in problem
    problem = only_problem(inspect_backbone(Net(), images(), 7, modalities=NAMES))
    assert "mask_format=MaskCodec" in problem
    assert "input_argument" not in problem


def test_float_mask_and_list_of_indices_are_recognised_from_the_example() -> None:
    report = inspect_backbone(Net(), images(), full().float(), modalities=NAMES)
    assert spec_of(report).mask_format == "float"

    def rows(indices: list[int], x: Tensor) -> Tensor:
        return torch.tensor([m in indices for m in range(3)]).expand(len(x), -1)

    report = inspect_backbone(Masked(rows), images(), [0, 1, 2], modalities=NAMES)
    spec = spec_of(report)
    assert spec.mask_format == "indices"
    assert not spec.per_sample_masks


def test_integer_mask_that_indexes_is_a_problem_that_asks_for_bool() -> None:
    class Indexing(Net):
        def hide(self, features: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
            x = torch.stack(list(features), dim=1)
            y = torch.zeros_like(x)
            y[mask] = x[mask]
            if mask.dtype != torch.bool:
                y = x
            return list(y.unbind(1))

    report = inspect_backbone(Indexing(), images(), full().long(), modalities=NAMES)
    assert any("mask.bool()" in problem for problem in report.problems)
    assert spec_of(inspect_backbone(Indexing(), images(), full(), modalities=NAMES)).mask_format == "bool"


def test_integer_mask_that_is_a_factor_is_fine() -> None:
    report = inspect_backbone(Net(), images(), full().long(), modalities=NAMES)
    assert spec_of(report).mask_format == "int"


@pytest.mark.parametrize("mask", [[True, True, False], "0,1", torch.ones(2, 5, dtype=torch.bool), 7])
def test_mask_of_another_kind_is_a_problem_that_names_the_codec(mask: Any) -> None:
    assert "MaskCodec" in only_problem(inspect_backbone(Net(), images(), mask, modalities=NAMES))


def test_given_codec_is_used() -> None:
    codec = MaskCodec(lambda mask: mask.double(), lambda raw: raw.bool())
    assert spec_of(inspect_backbone(Net(), images(), full().double(), modalities=NAMES, mask_format=codec))


def test_call_given_by_hand_runs_the_backbone() -> None:
    class Extra(Net):
        def forward(self, x: Tensor, scale: float, *, available: Tensor) -> Tensor:  # type: ignore[override]
            return scale * super().forward(x, available)

    report = found(Extra(), forward_fn=lambda model, x, mask: model(x, 1.0, available=mask))
    assert spec_of(report).students == "replay"
    assert "given call" in str(report)


def test_mask_of_a_real_call_is_found_by_its_shape_and_type() -> None:
    class Keyword(Net):
        def forward(self, x: Tensor, factor: Tensor, *, available: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, available)

    call = BackboneCall((images(), torch.ones(3)), {"available": full()})
    assert spec_of(inspect_call(Keyword(), call, NAMES)).mask_argument == "available"


# Student modes


class Leaky(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        features = self.encode(x)
        fused = self.fusion(torch.cat(self.hide(features, mask), dim=1))
        return self.head(fused + torch.stack(features).mean(0))


def test_leak_of_hidden_content_is_measured_and_leads_to_mixed_replay() -> None:
    report = found(Leaky())
    assert report.mask is not None
    assert min(report.mask.leak) > 1e-3
    assert spec_of(report).students == "mixed"
    assert report.replay_errors["replay"] > 1e-3
    assert report.replay_errors["mixed replay"] < 1e-5
    assert any("leaks" in warning for warning in report.warnings)


def test_no_leak_is_reported_as_zero() -> None:
    report = found(Net())
    assert report.mask is not None
    assert report.mask.leak == [0, 0, 0]
    assert min(report.mask.own) > 1e-3


class Unmasked(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.head(self.fusion(torch.cat(self.encode(x), dim=1)))


@pytest.mark.parametrize("mask", [full(), None], ids=["ignored mask", "no mask"])
def test_network_that_only_knows_blank_inputs_gets_mixed_replay(mask: Tensor | None) -> None:
    report = inspect_backbone(Unmasked(), images(), mask, modalities=NAMES)
    assert spec_of(report).students == "mixed"
    assert any("no effect" in warning for warning in report.warnings) == (mask is not None)


class InPlace(Net):
    def encode(self, x: Tensor) -> list[Tensor]:
        return [feature.mul_(0.5) for feature in super().encode(x)]


def test_features_changed_in_place_are_copied() -> None:
    report = found(InPlace())
    assert spec_of(report).copy_features
    assert "in place" in report.replay_failures["replay"]


class VarianceOfOne(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        rows = [row[here] for row, here in zip(torch.stack(self.encode(x), 1), mask, strict=True)]
        spread = torch.stack([row.var(0) if len(row) > 1 else row[0] * float("nan") for row in rows])
        return self.head(spread)


def test_single_modality_that_is_not_finite_leads_to_heads() -> None:
    report = found(VarianceOfOne())
    assert report.alone == dict.fromkeys(NAMES, False)
    assert spec_of(report).students == "heads"
    assert any("not finite" in warning for warning in report.warnings)


def test_single_modality_that_is_not_finite_without_encoders_is_refused() -> None:
    assert "not finite" in only_problem(found(VarianceOfOne(), encoders={}))


class WritesInput(OneEncoder):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5), mask)


def test_network_that_writes_into_its_input_is_examined_on_fresh_images() -> None:
    x = images()
    before = x.clone()
    report = inspect_backbone(WritesInput(), x, full(), modalities=NAMES)
    assert spec_of(report).students == "rerun"
    assert torch.equal(x, before)


class Checkpointed(Net):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def encode(self, x: Tensor) -> list[Tensor]:
        parts = [part.detach().requires_grad_(self.reentrant) for part in x.chunk(3, 1)]
        encoders = [self.get_submodule(f"{name}_encoder") for name in self.names]
        return [
            checkpoint(encoder, part, use_reentrant=self.reentrant)
            for encoder, part in zip(encoders, parts, strict=True)
        ]


def test_reentrant_checkpointing_is_refused_and_the_other_kind_is_not() -> None:
    assert "use_reentrant=False" in only_problem(found(Checkpointed(reentrant=True)))
    assert spec_of(found(Checkpointed(reentrant=False)))


class CheckpointedNorm(Net):
    """A layer with running statistics, under activation checkpointing or not."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.norm = nn.BatchNorm2d(4)
        if where == "encoder":
            for name in self.names:
                self.get_submodule(f"{name}_encoder").append(nn.BatchNorm2d(4))

    def encode(self, x: Tensor) -> list[Tensor]:
        if self.where != "encoder":
            return super().encode(x)
        parts = zip(self.names, x.chunk(3, 1), strict=True)
        return [checkpoint(self.get_submodule(f"{name}_encoder"), part, use_reentrant=False) for name, part in parts]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        fused = self.fused(x, mask)
        if self.where == "decoder" and self.training:
            return self.head(checkpoint(self.norm, fused, use_reentrant=False))
        return self.head(self.norm(fused))


@pytest.mark.parametrize("where", ["nowhere", "encoder", "decoder"])
def test_statistics_under_checkpointing_are_warned_about_where_students_move_them(where: str) -> None:
    x, network = images(), CheckpointedNorm(where)
    bare = copy.deepcopy(network)
    model = PassionWrapper(network, NAMES, missing_rates=(0.2, 0.4, 0.6))
    moving = where == "decoder"
    with pytest.warns(PassionWarning, match=r"'norm' .*checkpointing") if moving else contextlib.nullcontext():
        prediction = model(x, full())
    (prediction.sum() + model.passion_loss(torch.arange(128).view(2, 8, 8) % 3)).backward()
    bare(x, full()).sum().backward()
    same = [torch.equal(own, other) for own, other in zip(network.buffers(), bare.buffers(), strict=True)]
    assert all(same) != moving
    assert any("'norm'" in text for text in found(CheckpointedNorm(where)).warnings) == moving


class HalfCheckpointed(LongPath):
    """One checkpoint spans two private modules: in backward both run again, replayed or not."""

    def encode(self, x: Tensor) -> list[Tensor]:
        def stage(name: str, part: Tensor) -> Tensor:
            feature = self.get_submodule(f"{name}_encoder")(part)
            return self.get_submodule(f"{name}_more")(F.gelu(feature))

        parts = zip(self.names, x.chunk(3, 1), strict=True)
        return [checkpoint(stage, name, part, use_reentrant=False) for name, part in parts]


def test_student_mode_with_wrong_gradients_is_passed_over() -> None:
    report = found(HalfCheckpointed(), encoders={name: f"{name}_encoder" for name in NAMES})
    assert report.replay_errors["replay"] < 1e-5
    assert "replay" in report.replay_failures
    assert spec_of(report).students == "rerun"


def test_encoder_that_runs_without_gradient_is_left_out_of_the_replay() -> None:
    class NoGrad(Net):
        def encode(self, x: Tensor) -> list[Tensor]:
            with torch.no_grad():
                first = self.flair_encoder(x[:, :1])
            return [first, self.t1_encoder(x[:, 1:2]), self.t1ce_encoder(x[:, 2:])]

    report = found(NoGrad())
    assert spec_of(report).encoders["flair"] == ()
    assert spec_of(report).encoders["t1"] == ("t1_encoder",)
    assert any("'flair_encoder' can learn but runs without gradient" in warning for warning in report.warnings)


def test_last_layer_that_refines_logits_is_remarked_on() -> None:
    class LearnedUpsampling(Net):
        def __init__(self) -> None:
            super().__init__()
            self.refine = nn.Conv2d(3, 3, 3, padding=1, groups=3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.refine(super().forward(x, mask))

    report = found(LearnedUpsampling())
    assert spec_of(report).classifier == "refine"
    assert any("'refine', the last layer, has one channel for each class" in warning for warning in report.warnings)
    named = found(LearnedUpsampling(), classifier="head")
    assert spec_of(named).classifier == "head"
    assert not any("one channel for each class" in warning for warning in (*named.warnings, *found(Net()).warnings))


# Batch


class MixesBatch(Net):
    def fused(self, x: Tensor, mask: Tensor) -> Tensor:
        fused = super().fused(x, mask)
        return fused - fused.mean(0, keepdim=True)


class UsesTheFirstSample(Net):
    """Weights of the fusion come from the first sample and hold for all, as in a public network."""

    def fused(self, x: Tensor, mask: Tensor) -> Tensor:
        fused = super().fused(x, mask)
        return fused * fused[:1].mean(dim=(2, 3), keepdim=True)


@pytest.mark.parametrize("network", [MixesBatch, UsesTheFirstSample])
def test_network_whose_samples_depend_on_each_other_is_refused(network: type[nn.Module]) -> None:
    problem = only_problem(found(network()))
    assert "not independent" in problem
    assert "per_sample_masks=False" in problem


@pytest.mark.parametrize("network", [MixesBatch, UsesTheFirstSample])
def test_samples_may_depend_on_each_other_where_a_batch_has_one_mask(network: type[nn.Module]) -> None:
    report = found(network(), per_sample_masks=False)
    assert not spec_of(report).per_sample_masks
    assert any("not independent" in warning for warning in report.warnings)


def test_network_that_reads_the_first_row_of_the_mask_cannot_mix_masks() -> None:
    report = found(Masked(lambda mask, x: mask[:1].expand(len(x), -1)))
    spec = spec_of(report)
    assert not spec.per_sample_masks
    assert any("first row" in warning for warning in report.warnings)


def test_encoders_can_be_skipped_where_that_is_exact_and_not_with_batch_normalisation() -> None:
    assert spec_of(found(Net())).can_skip_encoders

    class Normalised(Net):
        def make_encoder(self) -> nn.Module:
            return nn.Sequential(conv(1, 4), nn.BatchNorm2d(4))

    assert not spec_of(found(Normalised())).can_skip_encoders


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_example_of_any_batch_size_will_do(batch: int) -> None:
    spec = spec_of(inspect_backbone(Net(), images(batch=batch), full(batch=batch), modalities=NAMES))
    assert spec.per_sample_masks


def test_network_that_takes_single_samples_only_is_examined_with_those() -> None:
    class Single(Net):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            if len(x) > 1:
                raise ValueError("one at a time")
            return super().forward(x, mask)

    report = inspect_backbone(Single(), images(batch=1), full(batch=1), modalities=NAMES)
    spec = spec_of(report)
    assert spec.students == "replay"
    assert not spec.per_sample_masks
    assert "one at a time" in str(report)


def test_network_that_fails_on_single_samples_is_refused() -> None:
    class Pairs(Net):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            if len(x) == 1:
                raise ValueError("two at least")
            return super().forward(x, mask)

    assert "two at least" in only_problem(found(Pairs()))


def test_noise_in_evaluation_mode_is_reported_and_replay_still_compared() -> None:
    class Noisy(Net):
        def fused(self, x: Tensor, mask: Tensor) -> Tensor:
            return F.dropout(super().fused(x, mask), 0.5, training=True)

    report = found(Noisy())
    assert report.batch is not None
    assert report.batch.noise > 1e-2
    assert spec_of(report).students == "replay"
    assert report.replay_errors["replay"] < 1e-5


# A spec that is there already


def given(**changes: Any) -> BackboneSpec:
    encoders = {name: f"{name}_encoder" for name in NAMES}
    return BackboneSpec(**{"classifier": "head", "encoders": encoders, **changes})


def real_call() -> BackboneCall:
    return BackboneCall((images(), torch.tensor([[True, True, False], [False, False, True]])), {})


def test_given_spec_is_checked_and_its_student_mode_decided_without_searching() -> None:
    report = inspect_call(Net(), real_call(), NAMES, spec=given())
    assert spec_of(report) == given(students="replay", can_skip_encoders=True)
    assert not report.searched


def test_given_student_mode_that_is_not_exact_is_a_problem() -> None:
    report = inspect_call(Leaky(), real_call(), NAMES, spec=given(students="replay"))
    assert "replay" in only_problem(report)
    assert spec_of(inspect_call(Leaky(), real_call(), NAMES, spec=given(students="rerun")))


def test_absent_that_hides_nothing_is_warned_about() -> None:
    report = inspect_call(Leaky(), real_call(), NAMES, spec=given(fill_missing=lambda x, mask: x + 1e-3))
    assert any("fill_missing= does not hide" in warning for warning in report.warnings)


def test_own_idea_of_absent_is_used_and_rules_mixed_replay_out() -> None:
    def marked(x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask[:, :, None, None], x, torch.tensor(-1.0))

    assert spec_of(inspect_call(Leaky(), real_call(), NAMES, spec=given(fill_missing=marked))).students == "rerun"
    assert spec_of(inspect_call(Net(), real_call(), NAMES, spec=given(fill_missing=marked))).students == "replay"


def test_detect_returns_the_spec_or_raises_with_every_problem() -> None:
    spec = detect_spec(Net(), images(), full(), modalities=NAMES)
    assert spec.students == "replay"
    backbone = SumOfTwo()
    backbone.hide = lambda features, mask: Net.hide(backbone, features, mask[:, [1, 0, 2]])  # type: ignore[method-assign]
    with pytest.raises(BackboneError, match=r"(?s)2 problems.*mask_columns.*classifier="):
        detect_spec(backbone, images(), full(), modalities=NAMES)

"""What the losses refuse, with all problems in one message, and the odd inputs that they take."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import CustomOpDef

from passion_plugin.errors import ConfigError, InputError
from passion_plugin.losses import (
    _pixel,
    _prototype,
    _segmentation,
    dice_loss,
    pixel_distillation,
    prototype_distillation,
    weighted_cross_entropy,
)

Z = torch.zeros(2, 3, 4, 4)
Y = torch.zeros(2, 4, 4, dtype=torch.long)
LABELLED = (
    weighted_cross_entropy,
    dice_loss,
    lambda z, y, **rest: prototype_distillation(z, z, y, 3, **rest),
)
each_labelled = pytest.mark.parametrize("loss", LABELLED, ids=["ce", "dice", "prototype"])
each_segmentation = pytest.mark.parametrize("loss", LABELLED[:2], ids=["ce", "dice"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Z.long(), r"torch\.int64 tensor.*pass floating values"),
        (Z[0], r"shape \(3, 4, 4\); its shape must be \(B, K, H, W\) or \(B, K, D, H, W\)"),
        (Z[:, :1], r"at least 2 channel"),
        (Z[..., :0], r"no empty spatial axis"),
        (np.zeros((2, 3, 4, 4)), r"a ndarray; pass a floating tensor"),
        (Z[:, :, :2], r"student has shape \(2, 3, 4, 4\) and teacher \(2, 3, 2, 4\); they must agree"),
        (torch.zeros(2, 4, 4, 4), r"teacher \(2, 4, 4, 4\)"),
    ],
    ids=["integer", "no batch", "one class", "empty", "numpy", "other space", "other classes"],
)
def test_pixel_distillation_refuses_a_bad_teacher(bad: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pixel_distillation(Z, bad)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), "4", True, None])
def test_temperature_must_be_a_positive_number(temperature: object) -> None:
    with pytest.raises(ConfigError, match=r"temperature=.* finite number above 0"):
        pixel_distillation(Z, Z, temperature)


@pytest.mark.parametrize("scale_factor", [0, -2, 2.0, True, "2"])
def test_scale_factor_must_be_a_positive_integer(scale_factor: object) -> None:
    with pytest.raises(ConfigError, match=r"scale_factor=.* integer of at least 1"):
        pixel_distillation(Z, Z, scale_factor=scale_factor)


@each_labelled
def test_unknown_mode_gets_a_suggestion(loss: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match=r"mode='oficial' is unknown\. Did you mean 'official'"):
        loss(Z, Y, mode="oficial")


@each_segmentation
def test_official_mode_has_no_regions(loss: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match="published code defines softmax only"):
        loss(Z, Z, mode="official", outputs="sigmoid")
    with pytest.raises(ConfigError, match="published code defines softmax only"):
        pixel_distillation(Z, Z, mode="official", outputs="sigmoid")


def test_unknown_outputs_get_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"outputs='sigmiod' is unknown\. Did you mean 'sigmoid'"):
        pixel_distillation(Z, Z, outputs="sigmiod")


@each_labelled
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Y.float(), r"torch\.float32 tensor .* class numbers must be .* labels\.long\(\)"),
        (Y + 3, r"values from 3 to 3, but 3 classes are 0\.\.2"),
        (Y - 1, r"values from -1 to -1"),
        (torch.full_like(Y, 255).to(torch.uint8), r"values from 255 to 255.*pass ignore_index for voxels"),
        (Y.bool(), r"labels are bool, which names 2 classes, but there are 3"),
        (Y[:1], r"pass integers \(2, 4, 4\)"),
        (Y[:, None], r"Drop the channel axis with labels\[:, 0\]"),
        (Y.tolist(), r"labels are a list; pass integers"),
    ],
    ids=["float", "too large", "negative", "ignore value", "bool", "other batch", "channel axis", "list"],
)
def test_bad_labels_are_named(loss: Callable[..., object], bad: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        loss(Z, bad)


@each_segmentation
def test_one_hot_labels_get_the_way_out(loss: Callable[..., object]) -> None:
    with pytest.raises(InputError, match=r"labels\.argmax\(1\)"):
        loss(Z, torch.zeros(2, 3, 4, 4, dtype=torch.long))


@each_segmentation
def test_class_numbers_are_no_regions(loss: Callable[..., object]) -> None:
    with pytest.raises(InputError, match=r"pass 0/1 masks \(2, 3, 4, 4\)\. .*one mask per region"):
        loss(Z, Y, outputs="sigmoid")


@pytest.mark.parametrize("fill", [0.5, 2, -1])
def test_soft_masks_are_refused(fill: float) -> None:
    masks = torch.zeros(2, 3, 4, 4)
    masks[0, 0, 0, 0] = fill
    for loss in (weighted_cross_entropy, dice_loss):
        with pytest.raises(InputError, match="threshold soft masks first"):
            loss(Z, masks, outputs="sigmoid")
    with pytest.raises(InputError, match="threshold soft masks first"):
        prototype_distillation(Z, Z, masks, 3)


def test_prototype_distillation_refuses_features_of_other_resolution_but_takes_other_channels() -> None:
    with pytest.raises(InputError, match=r"agree apart from the channels\. Bring both to one resolution"):
        prototype_distillation(Z, Z[..., :2], Y, 3)
    prototype_distillation(Z, torch.zeros(2, 7, 4, 4), Y, 3)


@pytest.mark.parametrize("num_classes", [0, 2.0, True])
def test_num_classes_must_be_a_positive_integer(num_classes: object) -> None:
    with pytest.raises(ConfigError, match="num_classes="):
        prototype_distillation(Z, Z, Y, num_classes)


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(InputError, match="6 problems") as caught:
        pixel_distillation(Z.long(), Z[0], -1, scale_factor=0, mode="x", outputs="y")
    for word in ("mode='x'", "outputs='y'", "temperature=-1", "scale_factor=0", "student is", "teacher is"):
        assert word in str(caught.value)


def test_labels_and_setting_are_reported_together() -> None:
    with pytest.raises(InputError) as caught:
        weighted_cross_entropy(Z.long(), Y + 9, mode="x")
    for word in ("mode='x'", "logits is", "from 9 to 9"):
        assert word in str(caught.value)


@each_labelled
def test_checks_of_values_can_be_left_out(loss: Callable[..., object]) -> None:
    loss(Z, Y, check_values=False)
    with pytest.raises(InputError, match=r"labels\.long"):
        loss(Z, Y.float(), check_values=False)


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(InputError, match="student is on cpu and teacher on meta"):
        pixel_distillation(Z, Z.to("meta"))
    with pytest.raises(InputError, match="labels are on meta and the maps on cpu"):
        dice_loss(Z, Y.to("meta"))


def test_an_empty_batch_gives_an_empty_result() -> None:
    assert pixel_distillation(Z[:0], Z[:0]).shape == (0,)
    for loss in (weighted_cross_entropy, dice_loss):
        assert loss(Z[:0], Y[:0]).shape == (0,)
    for mode in ("default", "official"):
        assert prototype_distillation(Z[:0], Z[:0], Y[:0], 3, mode=mode)[0].shape == (0,)


def test_inputs_are_left_as_they_were() -> None:
    z, other, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    before = [tensor.clone() for tensor in (z, other, y)]
    for mode in ("default", "official"):
        leaf = z.requires_grad_()
        total: Tensor = pixel_distillation(leaf, other, scale_factor=2, mode=mode).sum()
        total = total + prototype_distillation(leaf, other, y, 3, mode=mode)[0].sum()
        total = total + (weighted_cross_entropy(leaf, y, mode=mode) + dice_loss(leaf, y, mode=mode)).sum()
        total.backward()
    for tensor, was in zip((z, other, y), before, strict=True):
        assert torch.equal(tensor.detach(), was)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
    reason="torch 2.5 cannot trace torch.amp.is_autocast_available; the losses are right, but break the graph",
)
def test_losses_trace_without_a_graph_break() -> None:
    z, other, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))

    def total(student: Tensor) -> Tensor:
        loss = pixel_distillation(student, other) + prototype_distillation(student, other, y, 3)[0]
        return loss + weighted_cross_entropy(student, y) + dice_loss(student, y)

    compiled = torch.compile(total, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z), total(z))


def test_operators_are_annotated_with_types_which_is_all_that_torch_2_5_reads() -> None:
    for module in (_pixel, _prototype, _segmentation):
        operators = [value for value in vars(module).values() if isinstance(value, CustomOpDef)]
        assert len(operators) == 2
        for operator in operators:
            assert not any(isinstance(kind, str) for kind in operator._init_fn.__annotations__.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.int16])
def test_masks_of_any_dtype_are_read(dtype: torch.dtype) -> None:
    masks = torch.zeros(2, 3, 4, 4, dtype=dtype)
    dice_loss(Z, masks, outputs="sigmoid")
    masks[0, 0, 0, 0] = 2
    with pytest.raises(InputError, match=r"values such as 2.*threshold soft masks first"):
        dice_loss(Z, masks, outputs="sigmoid")

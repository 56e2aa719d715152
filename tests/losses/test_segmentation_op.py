"""Weighted cross-entropy and Dice as one operation: its eager body against the definition, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from passion_plugin.errors import ConfigError, InputError
from passion_plugin.losses import _common, dice_loss, segmentation_loss, weighted_cross_entropy
from passion_plugin.losses._segmentation import _segmentation_gradient_op, _segmentation_op, plain_segmentation

# regions, lowest, ignore_index
KINDS = {
    "classes": (False, 0.0, None),
    "official": (False, 0.005, None),
    "classes, ignoring": (False, 0.0, 255),
    "classes, ignoring background": (False, 0.005, 0),
    "regions": (True, 0.0, None),
    "regions, ignoring": (True, 0.0, 255),
}
Kind = tuple[bool, float, int | None]
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def make(kind: Kind, shape: tuple[int, ...] = (2, 3, 5, 7), scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits in float64 and labels, some of them ignored if the kind ignores any."""
    regions, _, ignore_index = kind
    batch, classes, *spatial = shape
    labels = torch.rand(shape) < 0.4 if regions else torch.randint(classes, (batch, *spatial))
    labels = labels.to(torch.uint8) if regions else labels
    if ignore_index is not None:
        labels[torch.rand(labels.shape) < 0.3] = ignore_index
    return scale * torch.randn(shape, dtype=torch.float64), labels


def run(
    z: Tensor, y: Tensor, kind: Kind, upstream: Tensor | None = None, backend: str | None = "eager"
) -> tuple[Tensor, Tensor, Tensor]:
    """Both losses and the gradient of the logits; ``backend=None``: by the definition."""
    leaf = z.detach().requires_grad_()
    settings = kind[1:]
    losses = _segmentation_op(leaf, y, *settings, backend) if backend else plain_segmentation(leaf, y, *settings)
    ce, dice = losses[:2]
    if upstream is None:
        upstream = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, -0.25]])[:, : len(z)]
    return ce.detach(), dice.detach(), torch.autograd.grad((ce, dice), leaf, tuple(upstream.to(ce.dtype)))[0]


@each_kind
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 2, 1, 1), (1, 5, 3, 2, 3)])
def test_equals_its_definition(kind: Kind, shape: tuple[int, ...]) -> None:
    z, y = make(kind, shape)
    torch.testing.assert_close(run(z, y, kind), run(z, y, kind, backend=None))


@each_kind
def test_cutting_the_volume_into_chunks_changes_nothing(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    z, y = make(kind, (2, 2, 40, 60))
    whole = run(z, y, kind)
    monkeypatch.setattr(_common, "_CHUNK_ELEMENTS", 1)  # the smallest chunk is 1024 voxels
    torch.testing.assert_close(run(z, y, kind), whole)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(kind: Kind, dtype: torch.dtype) -> None:
    z, y = make(kind)
    z = z.to(dtype)
    sums = _segmentation_op(z, y, *kind[1:], "eager")[2]
    torch.library.opcheck(_segmentation_op, (z.requires_grad_(), y, *kind[1:], "eager"))
    upstream = sums.new_tensor([[1.0, -2.0], [0.5, 3.0]])
    torch.library.opcheck(_segmentation_gradient_op, (*upstream, z.detach(), y, sums, *kind[1:], "eager"))


@each_kind
def test_first_and_second_derivatives(kind: Kind) -> None:
    z, y = make(kind, (2, 3, 2, 2), scale=1.0)

    def losses(logits: Tensor) -> tuple[Tensor, ...]:
        return _segmentation_op(logits, y, *kind[1:], "eager")[:2]

    assert torch.autograd.gradcheck(losses, z.requires_grad_())
    assert torch.autograd.gradgradcheck(losses, z)


@pytest.mark.parametrize("mode", ["default", "official"])
def test_the_sum_is_the_sum_of_both(mode: str) -> None:
    z, y = make(KINDS["classes"])
    both = weighted_cross_entropy(z, y, mode=mode) + dice_loss(z, y, mode=mode)
    assert torch.equal(segmentation_loss(z, y, mode=mode), both)


@pytest.mark.parametrize("ignore_index", [-1, 1, 255])
def test_ignored_voxels_do_not_exist(ignore_index: int) -> None:
    z, y = torch.randn(1, 3, 4, 6, dtype=torch.float64), torch.tensor([0, 2]).repeat(12).view(1, 4, 6)
    y[:, :, 4:] = ignore_index
    z.requires_grad_()
    cropped = segmentation_loss(z[..., :4], y[..., :4])
    loss = segmentation_loss(z, y, ignore_index=ignore_index)
    torch.testing.assert_close(loss, cropped)
    (slope,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(slope, torch.autograd.grad(cropped, z)[0])
    assert not slope[..., 4:].any()


def test_ignored_entries_of_a_mask_leave_the_other_regions_alone() -> None:
    z, y = make(KINDS["regions"], (1, 2, 4, 6))
    y[:, 1, :, 4:] = 255
    parts = segmentation_loss(z[:, :1], y[:, :1], outputs="sigmoid") + segmentation_loss(
        z[:, 1:, :, :4], y[:, 1:, :, :4], outputs="sigmoid"
    )
    torch.testing.assert_close(segmentation_loss(z, y, outputs="sigmoid", ignore_index=255), parts / 2)


def test_uint8_labels_have_no_minus_one() -> None:
    y = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    with pytest.raises(InputError, match="from 0 to 255"):
        segmentation_loss(torch.zeros(1, 2, 1, 3), y, ignore_index=-1)


@pytest.mark.parametrize("outputs", ["softmax", "sigmoid"])
def test_a_sample_of_ignored_voxels_only_is_finite_and_without_gradient(outputs: str) -> None:
    z = torch.randn(1, 2, 3, 3, requires_grad=True)
    y = torch.full((1, 3, 3) if outputs == "softmax" else (1, 2, 3, 3), 255, dtype=torch.uint8)
    loss = segmentation_loss(z, y, outputs=outputs, ignore_index=255)
    assert loss.item() == 1  # Dice as if no class was there
    loss.backward()
    assert not z.grad.any()


@each_kind
def test_saturated_logits(kind: Kind) -> None:
    z, y = make(kind)
    z = 30 * z.sign()
    torch.testing.assert_close(run(z, y, kind), run(z, y, kind, backend=None))
    for value in run(z.float(), y, kind):
        assert value.isfinite().all()


@each_kind
def test_zero_upstream_gradient_and_a_second_backward(kind: Kind) -> None:
    z, y = make(kind)
    assert not run(z, y, kind, torch.zeros(2, 2))[2].any()
    leaf = z.requires_grad_()
    ce, dice, _ = _segmentation_op(leaf, y, *kind[1:], "eager")
    first, second = (torch.autograd.grad((ce + dice).sum(), leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@each_kind
def test_memory_is_written_before_it_is_read(kind: Kind, poisoned: None) -> None:
    z, y = make(kind)
    for value in run(z, y, kind):
        assert value.isfinite().all()


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_not_rounded_again(kind: Kind, dtype: torch.dtype) -> None:
    z, y = make(kind)
    low = z.to(dtype)
    ce, dice, slope = run(low, y, kind)
    wanted = run(low.double(), y, kind, backend=None)
    assert (ce.dtype, dice.dtype, slope.dtype) == (torch.float32, torch.float32, dtype)
    torch.testing.assert_close((ce.double(), dice.double()), wanted[:2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, wanted[2].to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


def test_backward_inside_autocast_stays_in_float32() -> None:
    z, y = make(KINDS["classes"])
    leaf = z.float().requires_grad_()
    (wanted,) = torch.autograd.grad(segmentation_loss(leaf, y).sum(), leaf)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(segmentation_loss(leaf, y).sum(), leaf)
        (differentiable,) = torch.autograd.grad(segmentation_loss(leaf, y).sum(), leaf, create_graph=True)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(differentiable, wanted)


def test_nothing_of_the_size_of_the_logits_is_kept_but_the_logits() -> None:
    z, y = make(KINDS["classes"], (1, 3, 16, 16))
    leaf = z.bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        _segmentation_op(leaf, y, *KINDS["classes"][1:], "eager")
    inputs = {leaf.data_ptr(), y.data_ptr()}
    assert all(tensor.data_ptr() in inputs or tensor.numel() == 6 * 3 for tensor in kept)


def test_the_gradient_lies_in_memory_as_the_logits_do() -> None:
    z, y = make(KINDS["classes"], (2, 3, 4, 5, 6))
    last = z.contiguous(memory_format=torch.channels_last_3d)
    found = run(last, y, KINDS["classes"])
    assert found[2].stride() == last.stride()
    torch.testing.assert_close(found, run(z, y, KINDS["classes"]))


def test_wrong_settings_are_named() -> None:
    z, y = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"backend='tritn' is unknown\. Did you mean 'triton'"):
        segmentation_loss(z, y, backend="tritn")
    with pytest.raises(ConfigError, match=r"ignore_index='255', but it must be an integer or None"):
        segmentation_loss(z, y, ignore_index="255")


def test_triton_cannot_be_forced_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="backend='triton', but"):
        segmentation_loss(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long), backend="triton")

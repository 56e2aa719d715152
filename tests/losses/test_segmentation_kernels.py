"""The Triton kernels of the segmentation losses, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from test_segmentation_op import KINDS, Kind, each_kind, make, run

from passion_plugin.losses import segmentation_loss
from passion_plugin.losses._segmentation import _segmentation_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 3, 5, 7), (1, 2, 1, 1), (1, 4, 3, 5, 11), (2, 32, 3, 3)]


def place(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return z.to(DEVICE), y.to(DEVICE)


def assert_exact(z: Tensor, y: Tensor, kind: Kind, upstream: Tensor | None = None) -> None:
    """The kernels on z agree with the definition in float64 on the same numbers."""
    upstream = upstream if upstream is None else upstream.to(DEVICE)
    found = run(z, y, kind, upstream, backend="triton")
    wanted = run(z.double(), y, kind, upstream, backend=None)
    tolerance = max(1e-5, 2 * torch.finfo(z.dtype).eps)
    torch.testing.assert_close(found[:2], tuple(value.float() for value in wanted[:2]), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(found[2], wanted[2].to(z.dtype), rtol=tolerance, atol=1e-6)


@each_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(kind: Kind, shape: tuple[int, ...], launches: Counter[str]) -> None:
    z, y = place(*make(kind, shape))
    assert_exact(z.float(), y, kind)
    assert launches == {f"_segmentation.{name}": 1 for name in ("_partial_sums", "_finish", "_gradient")}


def test_one_region() -> None:
    z, y = place(*make(KINDS["regions"], (3, 1, 4, 9)))
    assert_exact(z.float(), y, KINDS["regions"])


@each_kind
def test_several_tiles_and_programs(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    from passion_plugin.losses.kernels import _segmentation as kernels

    monkeypatch.setattr(kernels, "_TILE", 64)
    monkeypatch.setattr(kernels, "_PARTIALS", 16)
    z, y = place(*make(kind, (2, 3, 15, 21)))
    assert_exact(z.float(), y, kind)


@each_kind
@pytest.mark.parametrize("fill", ["background", "absent", "saturated"])
def test_extreme_inputs(kind: Kind, fill: str) -> None:
    z, y = place(*make(kind, (2, 4, 5, 7)))
    if fill == "background":
        y = torch.zeros_like(y)
    elif fill == "absent":
        y[y == 1] = 0
    else:
        z = 30 * z.sign()
    assert_exact(z.float(), y, kind)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_eager(kind: Kind, dtype: torch.dtype) -> None:
    z, y = place(*make(kind, (2, 3, 9, 13)))
    low = z.to(dtype)
    exact = run(low.double(), y, kind, backend=None)
    for found, other, wanted in zip(run(low, y, kind, backend="triton"), run(low, y, kind), exact, strict=True):
        assert found.dtype == other.dtype
        error, allowed = ((value.double() - wanted).abs().max() for value in (found, other))
        # Triton's interpreter cuts the digits that bfloat16 has no room for, where a GPU rounds.
        cut = DEVICE == "cpu" and found.dtype == torch.bfloat16
        assert error <= (2.2 if cut else 1.1) * allowed + 1e-6


@each_kind
def test_upstream_gradients_and_a_second_backward(kind: Kind) -> None:
    z, y = place(*make(kind))
    z = z.float()
    assert not run(z, y, kind, torch.zeros(2, 2, device=DEVICE), backend="triton")[2].any()
    assert_exact(z, y, kind, torch.tensor([[1.0], [-3.0]]).expand(2, 2))
    leaf = z.requires_grad_()
    ce, dice, _ = _segmentation_op(leaf, y, *kind[1:], "triton")
    first, second = (torch.autograd.grad((ce - dice).sum(), leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@each_kind
def test_memory_is_written_before_it_is_read(kind: Kind, poisoned: None) -> None:
    z, y = place(*make(kind))
    for value in run(z.float(), y, kind, backend="triton"):
        assert value.isfinite().all()


@each_kind
@pytest.mark.parametrize("layout", ["channels last", "transposed", "sliced", "expanded"])
def test_any_layout(kind: Kind, layout: str) -> None:
    z, y = place(*make(kind, (2, 3, 2, 3, 4)))
    z = z.float()
    if layout == "channels last":
        z = z.contiguous(memory_format=torch.channels_last_3d)
    elif layout == "transposed":
        z, y = z.transpose(-1, -2), y.transpose(-1, -2)
    elif layout == "sliced":
        z, y = torch.cat((z, z), -1)[..., ::2], torch.cat((y, y), -1)[..., ::2]
    else:
        z, y = z[:1].expand_as(z), y[:1].expand_as(y)
    assert_exact(z, y, kind)
    if layout == "channels last":
        assert run(z, y, kind, backend="triton")[2].stride() == z.stride()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool])
def test_every_dtype_of_labels(dtype: torch.dtype) -> None:
    z, y = torch.randn(1, 2, 4, 5, device=DEVICE), torch.randint(2, (1, 4, 5), device=DEVICE)
    wanted = segmentation_loss(z, y, backend="triton")
    assert torch.equal(segmentation_loss(z, y.to(dtype), backend="triton"), wanted)
    masks = torch.stack((y, 1 - y), 1)
    wanted = segmentation_loss(z, masks, outputs="sigmoid", backend="triton")
    for other in (dtype, torch.float32, torch.float16):
        assert torch.equal(segmentation_loss(z, masks.to(other), outputs="sigmoid", backend="triton"), wanted)


def test_nan_is_not_hidden() -> None:
    z = torch.zeros(1, 2, 2, 2, device=DEVICE)
    z[0, 0, 0, 0] = torch.nan
    y = torch.zeros(1, 2, 2, dtype=torch.long, device=DEVICE)
    ce, dice, _ = _segmentation_op(z, y, *KINDS["official"][1:], "triton")
    assert ce.isnan().all()
    assert dice.isnan().all()


def test_an_empty_batch() -> None:
    z, y = torch.zeros(0, 2, 2, 2, device=DEVICE), torch.zeros(0, 2, 2, dtype=torch.long, device=DEVICE)
    assert segmentation_loss(z, y, backend="triton").shape == (0,)


@pytest.mark.gpu
@each_kind
def test_the_kernels_run_on_a_gpu_unasked_and_repeat_their_bits(kind: Kind, launches: Counter[str]) -> None:
    z, y = place(*make(kind, (2, 4, 33, 34, 35)))
    z = z.float()
    first, second = (run(z, y, kind, backend="auto") for _ in range(2))
    assert launches["_segmentation._partial_sums"] == 2
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert_exact(z, y, kind)

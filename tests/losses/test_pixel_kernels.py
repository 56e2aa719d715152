"""The Triton kernels of pixel distillation, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from test_pixel_op import KINDS, Kind, T, each_kind, make, run

from passion_plugin.losses._pixel import _pixel_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(2, 3, 3, 5), (1, 2, 1, 1), (1, 3, 1, 2, 3)]
# The interpreter takes seconds for up-sampling by 3.
not_thrice = pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind[1] < 3], ids=str)


def place(*pair: Tensor) -> tuple[Tensor, Tensor]:
    student, teacher = (z.to(DEVICE, torch.float32) for z in pair)
    return student, teacher


def assert_exact(student: Tensor, teacher: Tensor, kind: Kind, upstream: Tensor | None = None) -> None:
    """The kernels agree with the definition in float64 on the same numbers."""
    upstream = torch.tensor([1.0, -2.5, 0.0])[: len(student)] if upstream is None else upstream
    value, slope = run(student, teacher, kind, upstream.to(DEVICE), backend="triton")
    wanted = run(student.double(), teacher.double(), kind, upstream.to(DEVICE), backend=None)
    assert (value.dtype, slope.dtype) == (torch.float32, student.dtype)
    torch.testing.assert_close(value, wanted[0].float(), rtol=2e-5, atol=2e-6)
    largest = max(1.0, wanted[1].abs().max().item())
    rounding = 2 * torch.finfo(slope.dtype).eps
    torch.testing.assert_close(slope, wanted[1].to(slope.dtype), rtol=max(2e-5, rounding), atol=1e-6 * largest)


@each_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(kind: Kind, shape: tuple[int, ...], launches: Counter[str]) -> None:
    assert_exact(*place(*make(shape)), kind)
    module = "_pixel_upsampled" if kind[1] > 1 else "_pixel"
    assert launches == {f"{module}._divergence": 1, f"{module}._gradient": 1}


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "clamped"])
@pytest.mark.parametrize("shape", [(2, 3, 27, 41), (1, 17, 11, 13), (1, 32, 3, 3, 3)], ids=str)
def test_several_blocks_and_many_classes(name: str, shape: tuple[int, ...]) -> None:
    assert_exact(*place(*make(shape)), KINDS[name])


@pytest.mark.parametrize("shape", [(1, 2, 13, 21), (1, 2, 2, 3, 2)], ids=str)
def test_several_blocks_and_cells_of_up_sampled_logits(shape: tuple[int, ...]) -> None:
    assert_exact(*place(*make(shape)), KINDS["up-sampled by 2"])


def test_one_region() -> None:
    assert_exact(*place(*make((3, 1, 4, 9))), KINDS["sigmoid"])


@not_thrice
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_less_exact_than_the_eager_body_in_low_precision(kind: Kind, dtype: torch.dtype) -> None:
    student, teacher = (z.to(dtype) for z in place(*make((1, 3, 4, 5), scale=8.0)))
    upstream = torch.ones(1, device=DEVICE)
    assert_exact(student, teacher, kind, upstream)
    exact = run(student.double(), teacher.double(), kind, upstream, backend=None)
    for found, eager, wanted in zip(
        run(student, teacher, kind, upstream, "triton"), run(student, teacher, kind, upstream), exact, strict=True
    ):
        error, allowed = ((value.double() - wanted).abs().max() for value in (found, eager))
        # Triton's interpreter cuts the digits that bfloat16 has no room for, where a GPU rounds.
        cut = DEVICE == "cpu" and found.dtype == torch.bfloat16
        assert error <= (2.5 if cut else 1.1) * allowed + 1e-6 * wanted.abs().max()


@not_thrice
def test_two_number_formats(kind: Kind) -> None:
    student, teacher = place(*make((1, 3, 2, 3)))
    assert_exact(student, teacher.bfloat16(), kind)
    assert_exact(student.bfloat16(), teacher, kind)


@each_kind
def test_saturated_logits(kind: Kind) -> None:
    student, teacher = (30 * z.sign() for z in make((1, 3, 2, 4)))
    assert_exact(*place(student, teacher), kind)


@not_thrice
def test_any_layout(kind: Kind) -> None:
    # 3-D cells take the interpreter long.
    shape = (2, 3, 2, 3) if kind[1] > 1 else (2, 3, 2, 2, 3)
    student, teacher = place(*make(shape))
    upstream = torch.ones(2, device=DEVICE)
    expected = run(student, teacher, kind, upstream, "triton")
    last_s, last_t = (z.movedim(1, -1).contiguous().movedim(-1, 1) for z in (student, teacher))
    strided = torch.stack((teacher, teacher), -1)[..., 0]
    transposed = student.transpose(0, -1).contiguous().transpose(0, -1)
    for s, t in ((last_s, strided), (transposed, last_t)):
        found = run(s, t, kind, upstream, "triton")
        torch.testing.assert_close(found, expected)
        assert s is transposed or found[1].stride() == s.stride()


@not_thrice
def test_zero_and_expanded_upstream_gradients_and_a_second_backward(kind: Kind) -> None:
    student, teacher = place(*make((2, 2, 2, 3)))
    assert not run(student, teacher, kind, torch.zeros(2, device=DEVICE), "triton")[1].any()
    value = _pixel_op(student.requires_grad_(), teacher, T, *kind, "triton").sum()
    first, second = (torch.autograd.grad(value, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.any()


@each_kind
def test_every_value_of_new_memory_is_written(kind: Kind, poisoned: None) -> None:
    for value in run(*place(*make((1, 3, 2, 3))), kind, backend="triton"):
        assert value.isfinite().all()


@each_kind
def test_an_empty_batch(kind: Kind) -> None:
    student, teacher = place(*make((0, 3, 2, 3)))
    value, slope = run(student, teacher, kind, backend="triton")
    assert (value.shape, slope.shape) == ((0,), student.shape)


@pytest.mark.parametrize("name", ["softmax", "up-sampled by 2"])
def test_opcheck(name: str) -> None:
    student, teacher = place(*make((2, 3, 2, 2)))
    torch.library.opcheck(
        _pixel_op,
        (student.requires_grad_(), teacher, T, *KINDS[name], "triton"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )

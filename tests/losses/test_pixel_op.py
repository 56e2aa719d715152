"""Pixel distillation as one operation: its eager body against the definition, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from passion_plugin.errors import ConfigError
from passion_plugin.losses import _common, _pixel
from passion_plugin.losses import pixel_distillation as loss_function
from passion_plugin.losses._pixel import _pixel_gradient_op, _pixel_op, plain_pixel_distillation

# kind, scale_factor
KINDS = {
    "softmax": ("softmax", 1),
    "sigmoid": ("sigmoid", 1),
    "clamped": ("clamped", 1),
    "up-sampled by 2": ("clamped", 2),
    "up-sampled by 3": ("clamped", 3),
}
Kind = tuple[str, int]
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
SHAPES = [(2, 3, 5, 7), (1, 2, 1, 1), (1, 5, 3, 2, 4), (2, 2, 1, 3, 1)]
T = 1.5


def make(shape: tuple[int, ...] = (2, 3, 4, 5), scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher in float64."""
    student, teacher = scale * torch.randn(2, *shape, dtype=torch.float64)
    return student, teacher


def run(
    student: Tensor, teacher: Tensor, kind: Kind, upstream: Tensor | None = None, backend: str | None = "eager"
) -> tuple[Tensor, Tensor]:
    """The divergence and its gradient; ``backend=None``: by the definition."""
    leaf = student.detach().requires_grad_()
    value = (
        _pixel_op(leaf, teacher, T, *kind, backend) if backend else plain_pixel_distillation(leaf, teacher, T, *kind)
    )
    if upstream is None:
        upstream = torch.tensor([1.0, -2.5, 0.0])[: len(student)]
    return value.detach(), torch.autograd.grad(value, leaf, upstream.to(value))[0]


@each_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_its_definition(kind: Kind, shape: tuple[int, ...]) -> None:
    pair = make(shape)
    torch.testing.assert_close(run(*pair, kind), run(*pair, kind, backend=None))


@each_kind
@pytest.mark.parametrize("shape", [(2, 2, 40, 60), (1, 3, 9, 8, 10)], ids=str)
def test_cutting_the_volume_into_pieces_changes_nothing(
    kind: Kind, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make(shape)
    whole = run(*pair, kind)
    monkeypatch.setattr(_common, "_CHUNK_ELEMENTS", 1)  # the smallest chunk is 1024 voxels
    for elements in (1, 5000):
        monkeypatch.setattr(_pixel, "_SLAB_ELEMENTS", elements)
        torch.testing.assert_close(run(*pair, kind), whole)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(kind: Kind, dtype: torch.dtype) -> None:
    student, teacher = (z.to(dtype) for z in make())
    upstream = torch.ones(2, dtype=torch.promote_types(dtype, torch.float32))
    torch.library.opcheck(_pixel_op, (student.requires_grad_(), teacher, T, *kind, "eager"))
    torch.library.opcheck(_pixel_gradient_op, (upstream, student.detach(), teacher, T, *kind, "eager"))


@each_kind
def test_opcheck_of_other_layouts(kind: Kind) -> None:
    student, teacher = make((2, 3, 2, 4, 3))
    student = student.to(memory_format=torch.channels_last_3d)
    for z in (student, student.transpose(0, -1).contiguous().transpose(0, -1), student[..., ::2]):
        arguments = (z.detach().requires_grad_(), teacher[..., : z.shape[-1]], T, *kind, "eager")
        torch.library.opcheck(_pixel_op, arguments)


@each_kind
def test_first_and_second_derivatives(kind: Kind) -> None:
    student, teacher = make((2, 3, 2, 3), scale=1.0)

    def loss(z: Tensor) -> Tensor:
        return _pixel_op(z, teacher, T, *kind, "eager")

    assert torch.autograd.gradcheck(loss, student.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, student)


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_less_exact_than_the_definition(kind: Kind, dtype: torch.dtype) -> None:
    student, teacher = (z.to(dtype) for z in make((2, 4, 12, 13), scale=8.0))
    exact = run(student.double(), teacher.double(), kind, backend=None)
    for found, plain, wanted in zip(
        run(student, teacher, kind), run(student, teacher, kind, backend=None), exact, strict=True
    ):
        error, allowed = ((value.double() - wanted).abs().max() for value in (found, plain))
        assert error <= 2 * allowed + 1e-6 * wanted.abs().max()


@each_kind
def test_two_number_formats(kind: Kind) -> None:
    student, teacher = make()
    for s, t in ((student.float(), teacher), (student, teacher.bfloat16()), (student.bfloat16(), teacher.float())):
        found, wanted = run(s, t, kind), run(s, t, kind, backend=None)
        assert [value.dtype for value in found] == [value.dtype for value in wanted]
        torch.testing.assert_close(found, wanted)


@each_kind
def test_saturated_logits(kind: Kind) -> None:
    student, teacher = (30 * z.sign() for z in make())
    torch.testing.assert_close(run(student, teacher, kind), run(student, teacher, kind, backend=None))
    for value in run(student.float(), teacher.float(), kind):
        assert value.isfinite().all()


@each_kind
def test_zero_upstream_gradient_and_a_second_backward(kind: Kind) -> None:
    student, teacher = make()
    assert not run(student, teacher, kind, torch.zeros(2))[1].any()
    value = _pixel_op(student.requires_grad_(), teacher, T, *kind, "eager").sum()
    first, second = (torch.autograd.grad(value, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@each_kind
def test_only_what_needs_a_gradient_gets_one(kind: Kind) -> None:
    student, teacher = make()
    value = _pixel_op(student, teacher.requires_grad_(), T, *kind, "eager")
    assert torch.autograd.grad(value.sum(), teacher, allow_unused=True) == (None,)


@each_kind
def test_memory_format_of_the_gradient_is_that_of_the_student(kind: Kind) -> None:
    student, teacher = make((2, 3, 4, 5, 6))
    expected = run(student, teacher, kind)
    found = run(student.to(memory_format=torch.channels_last_3d), teacher, kind)
    torch.testing.assert_close(found, expected)
    assert found[1].is_contiguous(memory_format=torch.channels_last_3d)


@each_kind
@pytest.mark.usefixtures("poisoned")
def test_every_value_of_new_memory_is_written(kind: Kind) -> None:
    for value in run(*make(), kind):
        assert value.isfinite().all()


@each_kind
def test_under_autocast_and_under_compile(kind: Kind) -> None:
    student, teacher = (z.float() for z in make())
    expected = run(student, teacher, kind)
    with torch.autocast("cpu", torch.bfloat16):
        for found, wanted in zip(run(student, teacher, kind), expected, strict=True):
            assert torch.equal(found, wanted)
    leaf = student.requires_grad_()
    compiled = torch.compile(loss_function, backend="aot_eager", fullgraph=True)
    mode = {"mode": "official", "scale_factor": kind[1]} if kind[0] == "clamped" else {"outputs": kind[0]}
    value = compiled(leaf, teacher, T, **mode)
    found = torch.autograd.grad(value, leaf, torch.tensor([1.0, -2.5]))[0]
    torch.testing.assert_close((value.detach(), found), expected)


def test_no_full_resolution_tensor_and_nothing_of_the_logits_size_is_kept() -> None:
    student, teacher = (z.float() for z in make((1, 4, 16, 16, 16)))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaf = student.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = _pixel_op(leaf, teacher, T, "clamped", 4, "eager")
    assert set(kept) == {z.untyped_storage().data_ptr() for z in (leaf, teacher)}
    with Watch():
        # The bodies themselves: what runs inside of an operator is hidden from the mode.
        _pixel_op._init_fn(leaf.detach(), teacher, T, "clamped", 4, "eager")
        _pixel_gradient_op._init_fn(torch.ones(1), leaf.detach(), teacher, T, "clamped", 4, "eager")
    assert value.isfinite().all()
    assert student.nbytes <= largest <= student.nbytes * 4**3 / 4


def test_triton_that_cannot_be_had_is_an_error() -> None:
    student, teacher = make()
    with pytest.raises(ConfigError, match="backend='triton', but"):
        loss_function(student, teacher, backend="triton")
    with pytest.raises(ConfigError, match=r"backend='trition' is unknown\. Did you mean 'triton'"):
        loss_function(student, teacher, backend="trition")

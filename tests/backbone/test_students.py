"""Students of any subset of modalities: what they predict, and where their gradient goes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from models import NAMES, MeanNet, NoMaskNet, batch, copies_gradients, spec_of
from passion_plugin.backbone._adapter import BackboneAdapter
from passion_plugin.backbone._calls import BackboneCall
from passion_plugin.backbone._passes import FusedPass, Student, fused_pass, run_students, student_pass
from passion_plugin.backbone._prediction import Prediction
from passion_plugin.backbone._student_inputs import StudentInput
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError
from passion_plugin.wrapper import PassionWrapper

M = NAMES[:4]
EVERYTHING = [[1, 1, 1, 1]] * 3
SUBSETS = [("t1ce",), ("flair", "t1"), ("t1ce", "t1", "t2"), M]


def prepared(students: Any) -> tuple[MeanNet | NoMaskNet, BackboneAdapter, FusedPass, Tensor]:
    net: MeanNet | NoMaskNet = NoMaskNet(M) if students == "mixed" else MeanNet(M)
    net = net.double()
    mask_argument: dict[str, Any] = {"mask_argument": None} if students == "mixed" else {}
    adapter = BackboneAdapter(net, spec_of(net, students=students, **mask_argument), M)
    x, mask, _ = batch(EVERYTHING, dtype=torch.float64)
    arguments = (x,) if students == "mixed" else (x, mask)
    return net, adapter, fused_pass(adapter, BackboneCall(arguments, {}), mask), x


def by_hand(net: MeanNet | NoMaskNet, x: Tensor, subset: tuple[str, ...]) -> Tensor:
    """What the backbone makes of an input that really lacks the other modalities."""
    keep = torch.tensor([name in subset for name in M]).expand(len(x), -1)
    blank = torch.where(keep[:, :, None, None], x, 0)
    return net(blank) if isinstance(net, NoMaskNet) else net(blank, keep)


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
@pytest.mark.parametrize("students", ["replay", "mixed", "rerun"])
def test_a_student_equals_the_backbone_with_that_subset_in_value_and_gradient(
    students: Any, subset: tuple[str, ...]
) -> None:
    net, adapter, fused, x = prepared(students)
    rows = torch.tensor([0, 2])
    prediction = student_pass(adapter, fused, StudentInput(subset, rows))
    prediction.logits.square().sum().backward()
    found = copies_gradients(net)
    bare = copy.deepcopy(net)
    wanted = by_hand(bare, x[rows], subset)
    wanted.square().sum().backward()
    torch.testing.assert_close(prediction.logits, wanted, rtol=0, atol=1e-12)
    for name, gradient in copies_gradients(bare).items():
        owner = name.split(".")[1] if name.startswith("encoders") else None
        if owner is None or owner in subset:
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)
            assert gradient.any()
        else:
            assert not found[name].any(), f"the student of {subset} moved {name}"


@pytest.mark.parametrize("options", [{}, {"memory": "low"}], ids=str)
def test_students_carry_the_names_and_rows_of_their_segments(options: dict[str, Any]) -> None:
    _, adapter, fused, _ = prepared("replay")
    student_inputs = [StudentInput(("flair", "t2"), torch.tensor([1])), StudentInput(("t1",), torch.tensor([0, 2]))]
    students = run_students(adapter, fused, student_inputs, PassionConfig(**options), torch.nn.ModuleList())
    assert [student.modalities for student in students] == [("flair", "t2"), ("t1",)]
    assert [student.rows.tolist() for student in students] == [[1], [0, 2]]
    for student, student_input in zip(students, student_inputs, strict=True):
        wanted = student_pass(adapter, fused, student_input)
        torch.testing.assert_close(student.prediction.logits, wanted.logits, rtol=0, atol=1e-12)


def test_only_a_student_of_one_modality_has_a_single_name() -> None:
    nothing = Prediction(torch.empty(0), torch.empty(0))
    assert Student(("t1",), torch.tensor([0]), nothing).modality == "t1"
    with pytest.raises(ValueError, match="unpack"):
        Student(("t1", "t2"), torch.tensor([0]), nothing).modality  # noqa: B018


def test_heads_refuse_several_modalities_at_once() -> None:
    net = MeanNet(M)
    x, mask, _ = batch(EVERYTHING)
    model = PassionWrapper(
        net, M, missing_rates=[0.5] * 4, spec=spec_of(net, students="heads"), example_input=x, example_mask=mask
    )
    adapter = model.passion.adapter
    assert adapter is not None
    fused = fused_pass(adapter, BackboneCall((x, mask), {}), mask)
    with pytest.raises(BackboneError, match=r"cannot predict from flair, t1 together: use single modalities only"):
        run_students(
            adapter, fused, [StudentInput(("flair", "t1"), torch.tensor([0]))], PassionConfig(), model.passion.heads
        )


def test_singles_leave_out_modalities_without_rows() -> None:
    where = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.bool)
    student_inputs = StudentInput.singles(("a", "b", "c"), where)
    assert [(student_input.modalities, student_input.rows.tolist()) for student_input in student_inputs] == [
        (("a",), [0]),
        (("c",), [0, 1]),
    ]


def test_a_student_pass_does_not_walk_through_the_modules_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing 1,600 modules takes ten times longer than keeping what they hold: once in a step is enough."""
    _, adapter, fused, _ = prepared("replay")
    walks: list[torch.nn.Module] = []
    named_modules = torch.nn.Module.named_modules

    def counted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module is adapter.backbone:
            walks.append(module)
        return named_modules(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    student_pass(adapter, fused, StudentInput(("flair",), torch.tensor([0])))
    assert walks == []

"""Semantic self-distillation: how every voxel relates to the class prototypes (arXiv:2407.14796)."""

from __future__ import annotations

from torch import Tensor

from passion_plugin._types import Backend, Mode
from passion_plugin._validate import Problems, check_choice, check_labels, check_map, check_pair, check_positive_int
from passion_plugin.losses._prototype_op import prototype_distillation as _operation

__all__ = ["prototype_distillation"]


def prototype_distillation(
    student_features: Tensor,
    teacher_features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    mode: Mode = "default",
    ignore_index: int | None = None,
    check_values: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Gap between the student's and the teacher's maps of similarity to class prototypes, per sample.

    .. math::
        c_{bk} = \frac{\sum_v f_{bv} Y_{bkv}}{n_{bk} + \epsilon}, \quad
        S_{bkv} = \cos(f_{bv}, c_{bk}), \quad
        P_b = \operatorname{mean}_{k, v} (S^s - S^t)^2, \quad D_b = \operatorname{mean}_{k, v} |S^s - S^t|

    with :math:`\epsilon = 10^{-5}`, which also bounds each norm in the cosine from below. Student and teacher
    have prototypes of their own, so their features need not share a space nor even a number of channels. The
    gradient of P flows through the student's features and through its prototypes.

    The means run over all voxels and over the classes that count: those present in the sample
    (``mode="default"``), or those present in EVERY sample of the batch (``mode="official"``, as the published
    code; the same at B = 1). A sample in which no class counts has P = D = 0.

    Args:
        student_features: (B, Cs, *spatial) with 2 or 3 spatial axes: what enters the last classifier.
        teacher_features: (B, Ct, *spatial). Detached: no gradient reaches them.
        labels: class numbers (B, *spatial), integers (bool for K = 2), or region masks (B, K, *spatial) of 0
            and 1.
        num_classes: K, the number of classes or regions.
        mode: ``"default"`` or ``"official"``.
        ignore_index: class number of voxels that belong to no class and count in no mean; None for none. Class
            numbers only.
        check_values: whether to check that labels are in range. The check waits for the device: switch it off
            where the same labels have been checked before.
        backend: ``"auto"``: Triton kernels on CUDA where they can be had, else PyTorch. ``"eager"``, ``"triton"``:
            this one. All give the same numbers, and none keeps maps in memory.

    Returns:
        P (B,) and D (B,), in float32, or in float64 if features are; D carries no gradient.

    Raises:
        ConfigError: a setting is unknown or out of range.
        InputError: a tensor has the wrong shape, dtype or content.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[[0, 0, 1, 1]]])
        >>> teacher = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]).view(1, 2, 1, 4)
        >>> student = torch.ones(1, 3, 1, 4)  # tells nothing apart
        >>> prototype_distillation(student, teacher, labels, num_classes=2)
        (tensor([0.5000]), tensor([0.5000]))
    """
    problems = Problems("prototype_distillation")
    check_choice(problems, "mode", mode, ("default", "official"))
    countable = check_positive_int(problems, "num_classes", num_classes)
    usable = [
        check_map(problems, name, features, channels="C")
        for name, features in (("student_features", student_features), ("teacher_features", teacher_features))
    ]
    if all(usable):
        check_pair(problems, student_features, teacher_features, channels=False)
    check_choice(problems, "backend", backend, ("auto", "eager", "triton"))
    if ignore_index is not None and (isinstance(ignore_index, bool) or not isinstance(ignore_index, int)):
        problems.settings.append(f"ignore_index={ignore_index!r}, but it must be an integer or None.")
        ignore_index = None
    if usable[0] and countable:
        known = labels
        if ignore_index is not None and isinstance(labels, Tensor):
            if labels.ndim == student_features.ndim:
                problems.settings.append("ignore_index needs class numbers; a voxel of region masks is left out by 0.")
            elif check_values:
                known = labels.masked_fill(labels.long() == ignore_index, 0)
        check_labels(problems, known, student_features, num_classes, kind="either", values=check_values)
    problems.raise_all()

    loss, distance, *_ = _operation(
        student_features, teacher_features.detach(), labels, num_classes, mode == "official", ignore_index, backend
    )
    return loss, distance

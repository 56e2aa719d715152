"""Which students a batch needs: the modalities that each of them sees, and the rows in which it does."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from passion_plugin.data import drop_modalities
from passion_plugin.errors import UsageError


@dataclass(frozen=True)
class StudentInput:
    """Rows of the batch in which only some modalities are kept.

    Attributes:
        modalities: their names, at least one.
        rows: int64 (n,) on the CPU, sample numbers in the batch of the fused pass.
    """

    modalities: tuple[str, ...]
    rows: Tensor

    @classmethod
    def singles(cls, modalities: Sequence[str], where: Tensor) -> list[StudentInput]:
        """Show every modality alone.

        Args:
            modalities: M names.
            where: bool (B, M) on the CPU, which rows of the batch show which modality alone.

        Returns:
            Inputs in the order of the modalities; none for a modality without rows.
        """
        rows = [where[:, column].nonzero().flatten() for column in range(len(modalities))]
        return [cls((name,), index) for name, index in zip(modalities, rows, strict=True) if len(index)]

    @classmethod
    def subsets(cls, modalities: Sequence[str], where: Tensor) -> list[StudentInput]:
        """Show the modalities of each row together.

        Args:
            modalities: M names.
            where: bool (B, M) on the CPU, what each row of the batch shows; nothing for a row that is left out.

        Returns:
            An input for each subset that some row shows.

        Example:
            >>> import torch
            >>> where = torch.tensor([[True, True, False], [False, False, False], [True, True, False]])
            >>> StudentInput.subsets(("flair", "t1", "t2"), where)
            [StudentInput(modalities=('flair', 't1'), rows=tensor([0, 2]))]
        """
        found = where[where.any(1)].unique(dim=0)
        names = [tuple(itertools.compress(modalities, subset.tolist())) for subset in found]
        rows = [(where == subset).all(1).nonzero().flatten() for subset in found]
        return [cls(*each) for each in zip(names, rows, strict=True)]


def active_students(presence: Tensor) -> Tensor:
    """Return bool (B, M): the sample has the modality and at least one other.

    A sample with a single modality is its own teacher; there is nothing to distil.

    Example:
        >>> import torch
        >>> active_students(torch.tensor([[True, True, False], [False, True, False]])).tolist()
        [[True, True, False], [False, False, False]]
    """
    return presence & (presence.sum(1, keepdim=True) > 1)


def random_subsets(presence: Tensor) -> Tensor:
    """Draw bool (B, M): a subset of what each sample has, of two modalities at least and not all; none of two or fewer.

    Each such subset is as likely as any other. The random numbers are those of PyTorch's default generator.

    Example:
        >>> import torch
        >>> drawn = random_subsets(torch.tensor([[True, True, True, False], [True, True, False, False]]))
        >>> drawn.sum(1).tolist()
        [2, 0]
    """
    subsets = torch.zeros_like(presence)
    size = presence.sum(1)
    pending = size > 2
    while pending.any():
        subsets[pending] = drop_modalities(presence[pending])
        drawn = subsets.sum(1)
        pending = (size > 2) & ((drawn < 2) | (drawn == size))
    return subsets


def with_dummy_students(
    student_inputs: Sequence[StudentInput], complete: Sequence[StudentInput]
) -> tuple[list[StudentInput], list[bool]]:
    """Fill up the students of a batch, so that every process runs the same passes in the same order.

    A forward of a sharded backbone is a collective call: processes whose batches need different students would wait
    for each other for ever.

    Returns:
        A student for each that a ``complete`` sample needs, of the first row where the batch does not need it; and
        whether it is such a dummy.

    Example:
        >>> import torch
        >>> complete = StudentInput.singles(("t1", "t2"), torch.tensor([[True, True]]))
        >>> filled, is_dummy = with_dummy_students([StudentInput(("t2",), torch.tensor([1, 3]))], complete)
        >>> [(student_input.modalities, student_input.rows.tolist()) for student_input in filled], is_dummy
        ([(('t1',), [0]), (('t2',), [1, 3])], [True, False])
    """
    wanted = {student_input.modalities: student_input for student_input in student_inputs}
    known = [student_input.modalities for student_input in complete]
    unknown = wanted.keys() - known
    if unknown:
        raise UsageError(
            f"the strategy asks for students of {sorted(unknown)}, which no complete sample needs: the processes that "
            f"share a sharded backbone cannot know of them. Use DistributedDataParallel"
        )
    filled = [wanted.get(names, StudentInput(names, torch.tensor([0]))) for names in known]
    return filled, [names not in wanted for names in known]

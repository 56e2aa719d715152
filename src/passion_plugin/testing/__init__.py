"""Tools to unit-test the meaning of distillation losses, ours or your own.

* :mod:`~passion_plugin.testing.references`: every term as plain loops over NumPy float64.
* :mod:`~passion_plugin.testing.strategies`: hypothesis strategies for logits, labels, features and presence
  tables (needs ``pip install "passion-plugin[testing]"``; imported only when you ask for it).
* the ``assert_*`` functions here, for pytest or anything else. They take a ``loss``, any callable that returns one
  value per sample (B,) or a tuple whose first entry is that; or a ``rule`` over tables (B, M), column = modality. Fix
  further arguments with a lambda or ``functools.partial``. They raise AssertionError where the property does not hold
  to the tolerances ``rtol`` and ``atol``, which are meant for float64 inputs.

Example:
    >>> import torch
    >>> from passion_plugin.losses import pixel_distillation
    >>> from passion_plugin.testing import assert_matches_reference, references
    >>> student, teacher = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    >>> assert_matches_reference(pixel_distillation, references.pixel_distillation, student, teacher)
"""

from __future__ import annotations

from passion_plugin.testing import references
from passion_plugin.testing._assertions import (
    assert_batch_independent,
    assert_class_permutation_invariant,
    assert_computed_in_float32,
    assert_independent_of_layout,
    assert_invariant_to_absent_content,
    assert_matches_reference,
    assert_modality_permutation_equivariant,
    assert_modality_permutation_invariant,
    assert_no_gradient_to_teacher,
    assert_nonnegative,
    assert_voxel_permutation_invariant,
    assert_zero_at_teacher,
)

__all__ = [
    "assert_batch_independent",
    "assert_class_permutation_invariant",
    "assert_computed_in_float32",
    "assert_independent_of_layout",
    "assert_invariant_to_absent_content",
    "assert_matches_reference",
    "assert_modality_permutation_equivariant",
    "assert_modality_permutation_invariant",
    "assert_no_gradient_to_teacher",
    "assert_nonnegative",
    "assert_voxel_permutation_invariant",
    "assert_zero_at_teacher",
    "references",
]

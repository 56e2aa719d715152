"""Every term of PASSION (arXiv:2407.14796) as plain loops over NumPy float64: slow, obvious, and independent.

Read these functions beside the equations of the method, or use them as the truth in tests of your own loss.
They share no code with :mod:`passion_plugin.losses` and :class:`~passion_plugin.PreferenceEstimator`, take arrays
(or CPU tensors) and return float64 arrays. Keep inputs to a few hundred voxels.

Example:
    >>> import numpy as np
    >>> from passion_plugin.testing import references
    >>> teacher = np.array([2.0, 0.0]).reshape(1, 2, 1, 1)
    >>> references.pixel_distillation(-teacher, teacher, temperature=1.0).round(4)
    array([0.7616])
"""

from __future__ import annotations

from passion_plugin.testing.references._distillation import pixel_distillation, prototype_distillation, upsample
from passion_plugin.testing.references._preference import epoch_beta, epoch_eta, gate, relative_preference, total_loss
from passion_plugin.testing.references._segmentation import dice_loss, weighted_cross_entropy

__all__ = [
    "dice_loss",
    "epoch_beta",
    "epoch_eta",
    "gate",
    "pixel_distillation",
    "prototype_distillation",
    "relative_preference",
    "total_loss",
    "upsample",
    "weighted_cross_entropy",
]

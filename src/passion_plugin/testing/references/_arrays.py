"""How the references read their inputs: float64, one axis of voxels, 0/1 masks."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

__all__ = ["Array", "Input", "one_hot", "sigmoid", "softmax", "to_array"]

Array: TypeAlias = npt.NDArray[np.float64]
Input: TypeAlias = Tensor | npt.ArrayLike


def to_array(values: Input) -> Array:
    """Float64 copy of an array or tensor."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.array(values, dtype=np.float64)


def softmax(z: Array) -> Array:
    """Probabilities of one voxel from its logits (K,)."""
    e: Array = np.exp(z - z.max())
    p: Array = e / e.sum()
    return p


def sigmoid(z: float) -> float:
    """Probability of one region from its logit, without overflow on either side."""
    if z >= 0:
        return float(1 / (1 + np.exp(-z)))
    return float(np.exp(z) / (1 + np.exp(z)))


def one_hot(labels: Input, num_classes: int, ndim: int) -> Array:
    """``Y[b, k, v]`` (B, K, V) from class numbers (B, *spatial), or from masks if they have ``ndim`` axes."""
    y = to_array(labels)
    if y.ndim == ndim:
        return y.reshape(y.shape[0], y.shape[1], -1)
    y = y.reshape(y.shape[0], -1)
    Y = np.zeros((y.shape[0], num_classes, y.shape[1]))
    for b in range(y.shape[0]):
        for v in range(y.shape[1]):
            Y[b, int(y[b, v]), v] = 1
    return Y

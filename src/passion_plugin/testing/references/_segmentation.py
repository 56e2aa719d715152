"""Weighted cross-entropy and Dice as loops."""

from __future__ import annotations

import math

import numpy as np

from passion_plugin._types import Mode, Outputs
from passion_plugin.testing.references._arrays import Array, Input, one_hot, sigmoid, softmax, to_array

__all__ = ["dice_loss", "weighted_cross_entropy"]


def weighted_cross_entropy(
    logits: Input, labels: Input, *, mode: Mode = "default", outputs: Outputs = "softmax"
) -> Array:
    """``-(1 / V) sum_v (1 - n_y / V) log p_y`` with y the label of voxel v and n_y the voxels that share it.

    * official: p is clamped to [0.005, 1] before the logarithm
    * sigmoid: the mean over regions of ``-(1 / V) sum_v [(1 - n / V) Y log p + (n / V) (1 - Y) log(1 - p)]``

    Args:
        logits: (B, K, *spatial).
        labels: class numbers (B, *spatial), or masks (B, K, *spatial) for sigmoid.
        mode: ``"default"`` or ``"official"``.
        outputs: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        (B,).
    """
    z = to_array(logits)
    B, K, V = z.shape[0], z.shape[1], math.prod(z.shape[2:])
    Y, z = one_hot(labels, K, z.ndim), z.reshape(B, K, V)
    result = np.zeros(B)
    for b in range(B):
        for v in range(V):
            for k in range(K):
                share = Y[b, k].sum() / V
                if outputs == "sigmoid":
                    log_p, log_not_p = -np.logaddexp(0, -z[b, k, v]), -np.logaddexp(0, z[b, k, v])
                    inside, outside = (1 - share) * Y[b, k, v] * log_p, share * (1 - Y[b, k, v]) * log_not_p
                    result[b] -= (inside + outside) / (K * V)
                elif Y[b, k, v] == 1:
                    log_p = z[b, k, v] - np.logaddexp.reduce(z[b, :, v])
                    if mode == "official":
                        log_p = math.log(min(max(math.exp(log_p), 0.005), 1))
                    result[b] -= (1 - share) * log_p / V
    return result


def dice_loss(logits: Input, labels: Input, *, mode: Mode = "default", outputs: Outputs = "softmax") -> Array:
    """``1 - (1 / K) sum_k 2 sum_v p Y / (sum_v p + sum_v Y + 1e-7)``, the background included, in both modes.

    Args:
        logits: (B, K, *spatial).
        labels: class numbers (B, *spatial), or masks (B, K, *spatial) for sigmoid.
        mode: without effect.
        outputs: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        (B,).
    """
    z = to_array(logits)
    B, K, V = z.shape[0], z.shape[1], math.prod(z.shape[2:])
    Y, z = one_hot(labels, K, z.ndim), z.reshape(B, K, V)
    result = np.ones(B)
    for b in range(B):
        overlap, predicted, true = np.zeros(K), np.zeros(K), np.zeros(K)
        for v in range(V):
            for k in range(K):
                p = sigmoid(z[b, k, v]) if outputs == "sigmoid" else softmax(z[b, :, v])[k]
                overlap[k] += p * Y[b, k, v]
                predicted[k] += p
                true[k] += Y[b, k, v]
        for k in range(K):
            result[b] -= 2 * overlap[k] / (predicted[k] + true[k] + 1e-7) / K
    return result

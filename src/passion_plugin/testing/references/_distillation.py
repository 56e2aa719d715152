"""Pixel and prototype distillation as loops."""

from __future__ import annotations

import itertools
import math

import numpy as np

from passion_plugin._types import Mode, Outputs
from passion_plugin.testing.references._arrays import Array, Input, one_hot, to_array

__all__ = ["pixel_distillation", "prototype_distillation", "upsample"]

EPS = 1e-5


def pixel_distillation(
    student: Input,
    teacher: Input,
    temperature: float = 4.0,
    *,
    scale_factor: int = 1,
    mode: Mode = "default",
    outputs: Outputs = "softmax",
) -> Array:
    """``kappa[b] = T^2 / (K V) sum_v sum_k qt (log qt - log qs)``, the mean over classes and voxels.

    * default: ``q = softmax(z / T)``
    * official: ``q = clamp(Up(softmax(z / T)), 0.005, 1)``, not normalised again
    * sigmoid: ``p log(p / p') + (1 - p) log((1 - p) / (1 - p'))`` with ``p = sigmoid(z / T)`` per region

    Args:
        student: logits (B, K, *spatial).
        teacher: logits of the same shape.
        temperature: T.
        scale_factor: up-sampling in official mode; without effect in default mode.
        mode: ``"default"`` or ``"official"``.
        outputs: ``"softmax"`` or ``"sigmoid"``.

    Returns:
        (B,).
    """
    zs, zt = to_array(student) / temperature, to_array(teacher) / temperature
    result = []
    for b in range(len(zs)):
        log_qs, log_qt = _log_probabilities(zs[b], outputs), _log_probabilities(zt[b], outputs)
        if mode == "official":
            qs = upsample(np.exp(log_qs), scale_factor).clip(0.005, 1)
            qt = upsample(np.exp(log_qt), scale_factor).clip(0.005, 1)
            log_qs, log_qt = np.log(qs), np.log(qt)
        terms = []
        for place in np.ndindex(log_qt.shape):
            terms.append(math.exp(log_qt[place]) * (log_qt[place] - log_qs[place]))
        mean_over = len(terms) / 2 if outputs == "sigmoid" else len(terms)  # p and 1 - p belong to one region
        result.append(temperature**2 * math.fsum(terms) / mean_over)
    return np.array(result)


def _log_probabilities(z: Array, outputs: Outputs) -> Array:
    """Log-probabilities of one sample (K, *spatial); sigmoid: log p of all regions, then all log(1 - p)."""
    log_q = np.zeros((2 * len(z) if outputs == "sigmoid" else len(z), *z.shape[1:]))
    for v in np.ndindex(z.shape[1:]):
        for k in range(len(z)):
            if outputs == "sigmoid":
                log_q[(k, *v)] = -np.logaddexp(0, -z[(k, *v)])
                log_q[(len(z) + k, *v)] = -np.logaddexp(0, z[(k, *v)])
            else:
                log_q[(k, *v)] = z[(k, *v)] - np.logaddexp.reduce(z[(slice(None), *v)])
    return log_q


def upsample(values: Input, scale_factor: int) -> Array:
    """Bi- or trilinear up-sampling of (K, *spatial) in which the corner voxels keep their values.

    Along an axis of n voxels that become N = n * scale_factor, target i lies at i (n - 1) / (N - 1) in the
    source. With w its fraction, the value is (1 - w) times the voxel below plus w times the voxel above; on
    several axes the weights multiply.

    Args:
        values: (K, *spatial).
        scale_factor: a positive integer.

    Returns:
        (K, *spatial), each axis ``scale_factor`` times as long.

    Example:
        >>> upsample(np.array([[[0.0, 3.0]]]), 2).round(6)
        array([[[0., 1., 2., 3.],
                [0., 1., 2., 3.]]])
    """
    source = to_array(values)
    sizes = source.shape[1:]
    result = np.zeros((len(source), *(n * scale_factor for n in sizes)))
    for target in np.ndindex(result.shape[1:]):
        below, above, fraction = [], [], []
        for i, n in zip(target, sizes, strict=True):
            position = i * (n - 1) / (n * scale_factor - 1) if n * scale_factor > 1 else 0.0
            below.append(min(int(position), n - 1))
            above.append(min(int(position) + 1, n - 1))
            fraction.append(position - int(position))
        for corner in itertools.product((False, True), repeat=len(sizes)):
            weight, place = 1.0, []
            for axis, upper in enumerate(corner):
                weight *= fraction[axis] if upper else 1 - fraction[axis]
                place.append(above[axis] if upper else below[axis])
            for k in range(len(source)):
                result[(k, *target)] += weight * source[(k, *place)]
    return result


def prototype_distillation(
    student_features: Input,
    teacher_features: Input,
    labels: Input,
    num_classes: int,
    *,
    mode: Mode = "default",
) -> tuple[Array, Array]:
    """``P[b] = mean (Ss - St)^2`` and ``D[b] = mean |Ss - St|`` over the classes that count and all voxels.

    ``c[k] = sum_v f[v] Y[k, v] / (n[k] + eps)`` and ``S[k, v] = cos(f[v], c[k])``, each norm at least eps.
    A class counts in default mode if the sample has it, in official mode if every sample of the batch has it.

    Args:
        student_features: (B, Cs, *spatial).
        teacher_features: (B, Ct, *spatial).
        labels: class numbers (B, *spatial), or masks (B, K, *spatial).
        num_classes: K.
        mode: ``"default"`` or ``"official"``.

    Returns:
        P (B,) and D (B,); 0 where no class counts.
    """
    fs, ft = to_array(student_features), to_array(teacher_features)
    Y = one_hot(labels, num_classes, fs.ndim)
    loss, distance = np.zeros(len(fs)), np.zeros(len(fs))
    for b in range(len(fs)):
        squares, gaps = [], []
        for k in range(num_classes):
            samples = range(len(fs)) if mode == "official" else (b,)
            if not all(Y[other, k].sum() > 0 for other in samples):
                continue
            similarity_s, similarity_t = _similarity(fs[b], Y[b, k]), _similarity(ft[b], Y[b, k])
            for v in range(Y.shape[2]):
                squares.append((similarity_s[v] - similarity_t[v]) ** 2)
                gaps.append(abs(similarity_s[v] - similarity_t[v]))
        if squares:
            loss[b], distance[b] = math.fsum(squares) / len(squares), math.fsum(gaps) / len(gaps)
    return loss, distance


def _similarity(f: Array, mask: Array) -> list[float]:
    """Cosine of every voxel's feature (C, *spatial) with the prototype of one class (V,)."""
    f = f.reshape(len(f), -1)
    prototype = np.zeros(len(f))
    for v in range(f.shape[1]):
        prototype += f[:, v] * mask[v]
    prototype /= mask.sum() + EPS
    length = max(math.sqrt((prototype**2).sum()), EPS)
    return [
        float((f[:, v] * prototype).sum() / (max(math.sqrt((f[:, v] ** 2).sum()), EPS) * length))
        for v in range(f.shape[1])
    ]

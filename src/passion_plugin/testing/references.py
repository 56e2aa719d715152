"""Every term of PASSION (arXiv:2407.14796) as plain loops over NumPy float64: slow, obvious, and independent.

Read these functions along with the equations of the method, or use them as the truth in tests of your own loss.
They share no code with :mod:`passion_plugin.losses` and :class:`~passion_plugin.PreferenceEstimator`; those of the same
name take the same arguments. Inputs are arrays or CPU tensors of a few hundred voxels, results float64 arrays.

Example:
    >>> import numpy as np
    >>> from passion_plugin.testing import references
    >>> teacher = np.array([2.0, 0.0]).reshape(1, 2, 1, 1)
    >>> references.pixel_distillation(-teacher, teacher, temperature=1.0).round(4)
    array([0.7616])
"""

from __future__ import annotations

import itertools
import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from passion_plugin._types import Mode, Outputs

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

Array: TypeAlias = npt.NDArray[np.float64]
Input: TypeAlias = Tensor | npt.ArrayLike

_EPS = 1e-5


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

    Arguments and result (B,) are those of :func:`passion_plugin.losses.pixel_distillation`.
    """
    zs, zt = _to_array(student) / temperature, _to_array(teacher) / temperature
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

    From (K, *spatial) to the same with each axis ``scale_factor`` times as long.

    Example:
        >>> upsample(np.array([[[0.0, 3.0]]]), 2).round(6)
        array([[[0., 1., 2., 3.],
                [0., 1., 2., 3.]]])
    """
    source = _to_array(values)
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

    Arguments and results are those of :func:`passion_plugin.losses.prototype_distillation`.
    """
    fs, ft = _to_array(student_features), _to_array(teacher_features)
    Y = _one_hot(labels, num_classes, fs.ndim)
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
    prototype /= mask.sum() + _EPS
    length = max(math.sqrt((prototype**2).sum()), _EPS)
    return [
        float((f[:, v] * prototype).sum() / (max(math.sqrt((f[:, v] ** 2).sum()), _EPS) * length))
        for v in range(f.shape[1])
    ]


def weighted_cross_entropy(
    logits: Input, labels: Input, *, mode: Mode = "default", outputs: Outputs = "softmax"
) -> Array:
    """``-(1 / V) sum_v (1 - n_y / V) log p_y`` with y the label of voxel v and n_y the voxels that share it.

    * official: p is clamped to [0.005, 1] before the logarithm
    * sigmoid: the mean over regions of ``-(1 / V) sum_v [(1 - n / V) Y log p + (n / V) (1 - Y) log(1 - p)]``

    Arguments and result (B,) are those of :func:`passion_plugin.losses.weighted_cross_entropy`.
    """
    z = _to_array(logits)
    B, K, V = z.shape[0], z.shape[1], math.prod(z.shape[2:])
    Y, z = _one_hot(labels, K, z.ndim), z.reshape(B, K, V)
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

    Arguments and result (B,) are those of :func:`passion_plugin.losses.dice_loss`.
    """
    z = _to_array(logits)
    B, K, V = z.shape[0], z.shape[1], math.prod(z.shape[2:])
    Y, z = _one_hot(labels, K, z.ndim), z.reshape(B, K, V)
    result = np.ones(B)
    for b in range(B):
        overlap, predicted, true = np.zeros(K), np.zeros(K), np.zeros(K)
        for v in range(V):
            for k in range(K):
                p = _sigmoid(z[b, k, v]) if outputs == "sigmoid" else _softmax(z[b, :, v])[k]
                overlap[k] += p * Y[b, k, v]
                predicted[k] += p
                true[k] += Y[b, k, v]
        for k in range(K):
            result[b] -= 2 * overlap[k] / (predicted[k] + true[k] + 1e-7) / K
    return result


def relative_preference(distance: Input, presence: Input) -> Array:
    """``RP[b, m] = 1 - D[b, m] / Dbar[b]`` with Dbar the mean over the available modalities of the sample.

    Distances D and presence a (1 = present) are (B, M), and so is the result: 0 where a modality is absent, alone in
    its sample, or every distance of the sample is 0.
    """
    D, a = _to_array(distance), _to_array(presence)
    RP = np.zeros(D.shape)
    for b in range(len(D)):
        available = [m for m in range(D.shape[1]) if a[b, m] == 1]
        mean = math.fsum(D[b, m] for m in available) / len(available)
        for m in available:
            if len(available) > 1 and mean > 0:
                RP[b, m] = 1 - D[b, m] / mean
    return RP


def gate(distance: Input, presence: Input, *, mode: Mode = "default") -> npt.NDArray[np.bool_]:
    """``omega[b, m] = 1[RP[b, m] < 0]``: modality m lags behind the others of its sample.

    Official mode has one gate per modality and batch, by the sign of the sum of RP over the batch.

    From distances D and presence a (1 = present), (B, M) both, to bool (B, M), False where the modality is absent.
    """
    RP, a = relative_preference(distance, presence), _to_array(presence)
    omega = np.zeros(RP.shape, dtype=bool)
    for b in range(len(RP)):
        for m in range(RP.shape[1]):
            preference = math.fsum(RP[:, m]) if mode == "official" else RP[b, m]
            omega[b, m] = a[b, m] == 1 and preference < 0
    return omega


def epoch_eta(epoch: int, *, eta: float = 0.01, growth: float = 1.5, every: int = 100) -> float:
    """Step size at the end of ``epoch``: eta, times ``growth`` at epochs 0, ``every``, 2 ``every``, ...

    Example:
        >>> [round(epoch_eta(epoch), 5) for epoch in (0, 99, 100, 200)]
        [0.015, 0.015, 0.0225, 0.03375]
    """
    for growing in range(epoch + 1):
        if growing % every == 0:
            eta *= growth
    return eta


def epoch_beta(
    beta: Input,
    distance: Input,
    presence: Input,
    *,
    eta: float,
    mode: Mode = "default",
    presence_counts: Input | None = None,
    beta_min: float = 0.1,
    beta_max: float = 4.0,
) -> tuple[Array, Array]:
    """Weights after an epoch: ``beta <- clip(beta - eta RPhat, beta_min, beta_max)``, then rescaled.

    ``Dhat[m]`` is the mean distance of modality m over the epoch and ``RPhat[m] = 1 - Dhat[m] / mean(Dhat)``.

    * default: the mean is over the distances counted; the only modality of a sample is its own teacher, and
      its distance of 0 is not counted. Modalities without any keep their beta. The others become
      ``max(s beta, beta_min)`` with the one s that makes the norm of all weights sqrt(M).
    * official: the sum is divided by ``presence_counts`` and the weights are multiplied by 2 / norm.

    ``beta`` is (M,); distances D and presence a (1 = present) are those of every sample of the epoch, (N, M).
    ``presence_counts`` (M,), the number of training samples that have each modality, is for official mode only.

    Returns:
        beta (M,) and RPhat (M,), which is 0 for a modality without distances.
    """
    b, D, a = _to_array(beta), _to_array(distance), _to_array(presence)
    N, M = D.shape
    means: dict[int, float] = {}
    for m in range(M):
        values = []
        for n in range(N):
            own_teacher = a[n].sum() == 1 and D[n, m] == 0
            if a[n, m] == 1 and not (mode == "default" and own_teacher):
                values.append(D[n, m])
        if values:
            divisor = len(values)
            if mode == "official" and presence_counts is not None:
                divisor = _to_array(presence_counts)[m]
            means[m] = math.fsum(values) / divisor
    RP = np.zeros(M)
    if sum(means.values()) == 0:
        return b, RP
    for m, mean in means.items():
        RP[m] = 1 - mean / (sum(means.values()) / len(means))
    stepped = (b - eta * RP).clip(beta_min, beta_max)
    if mode == "official":
        return 2 * stepped / math.sqrt((stepped**2).sum()), RP
    kept = sum(b[m] ** 2 for m in range(M) if m not in means)
    measured = list(means)
    b[measured] = _project(stepped[measured], math.sqrt(M - kept), beta_min)
    return b, RP


def _project(beta: Array, norm: float, minimum: float) -> Array:
    """``max(s beta, minimum)`` of the given norm; the norm grows with s, so halving an interval finds s."""
    low, high = 0.0, norm / beta.min()
    for _ in range(200):
        s = (low + high) / 2
        if (np.maximum(s * beta, minimum) ** 2).sum() < norm**2:
            low = s
        else:
            high = s
    return np.maximum(high * beta, minimum)


def total_loss(
    pixel: Input,
    prototype: Input,
    unimodal: Input,
    presence: Input,
    *,
    rarity: Input,
    beta: Input,
    gate: Input,
    pixel_weight: float = 0.5,
    prototype_weight: float = 0.1,
    unimodal_weight: float = 1.0,
    mode: Mode = "default",
) -> float:
    """What PASSION adds to the user's loss, from the terms (B, M) of its students.

    ``mean_b sum_m a w (0.5 beta Kpix + 0.1 omega P + u S)``; official mode also puts ``omega beta`` on S.
    A term of an absent modality is never read, whatever it holds.

    Terms Kpix, P and S, presence a (1 = present) and ``gate`` omega are (B, M), ``rarity`` w (by the paper N / N_m) and
    ``beta`` (M,); ``unimodal_weight`` is u.
    """
    K, P, S, a = _to_array(pixel), _to_array(prototype), _to_array(unimodal), _to_array(presence)
    w, weights, omega = _to_array(rarity), _to_array(beta), _to_array(gate)
    total = 0.0
    for b in range(len(a)):
        for m in range(a.shape[1]):
            if a[b, m] == 1:
                on_unimodal = omega[b, m] * weights[m] if mode == "official" else 1.0
                total += w[m] * pixel_weight * weights[m] * K[b, m]
                total += w[m] * prototype_weight * omega[b, m] * P[b, m]
                total += w[m] * unimodal_weight * on_unimodal * S[b, m]
    return float(total / len(a))


def _to_array(values: Input) -> Array:
    """Float64 copy of an array or tensor."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.array(values, dtype=np.float64)


def _softmax(z: Array) -> Array:
    """Probabilities of one voxel from its logits (K,)."""
    e = np.exp(z - z.max())
    return np.asarray(e / e.sum())


def _sigmoid(z: float) -> float:
    """Probability of one region from its logit, without overflow on either side."""
    if z >= 0:
        return float(1 / (1 + np.exp(-z)))
    return float(np.exp(z) / (1 + np.exp(z)))


def _one_hot(labels: Input, num_classes: int, ndim: int) -> Array:
    """``Y[b, k, v]`` (B, K, V) from class numbers (B, *spatial), or from masks if they have ``ndim`` axes."""
    y = _to_array(labels)
    if y.ndim == ndim:
        return y.reshape(y.shape[0], y.shape[1], -1)
    y = y.reshape(y.shape[0], -1)
    Y = np.zeros((y.shape[0], num_classes, y.shape[1]))
    for b in range(y.shape[0]):
        for v in range(y.shape[1]):
            Y[b, int(y[b, v]), v] = 1
    return Y

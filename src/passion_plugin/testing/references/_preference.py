"""Relative preference, gates, weights and the total as loops."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from passion_plugin._types import Mode
from passion_plugin.testing.references._arrays import Array, Input, to_array

__all__ = ["epoch_beta", "epoch_eta", "gate", "relative_preference", "total_loss"]


def relative_preference(distance: Input, presence: Input) -> Array:
    """``RP[b, m] = 1 - D[b, m] / Dbar[b]`` with Dbar the mean over the available modalities of the sample.

    Args:
        distance: D (B, M).
        presence: a (B, M), 1 = present.

    Returns:
        (B, M); 0 where a modality is absent, alone in its sample, or every distance of the sample is 0.
    """
    D, a = to_array(distance), to_array(presence)
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

    Args:
        distance: D (B, M).
        presence: a (B, M), 1 = present.
        mode: ``"default"`` or ``"official"``.

    Returns:
        bool (B, M), False where the modality is absent.
    """
    RP, a = relative_preference(distance, presence), to_array(presence)
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

    Args:
        beta: weights before (M,).
        distance: D (N, M) of every sample of the epoch.
        presence: a (N, M), 1 = present.
        eta: step size of this epoch, see :func:`epoch_eta`.
        mode: ``"default"`` or ``"official"``.
        presence_counts: number of training samples that have each modality (M,); official mode only.
        beta_min: smallest weight.
        beta_max: largest weight before rescaling.

    Returns:
        beta (M,) and RPhat (M,), which is 0 for a modality without distances.
    """
    b, D, a = to_array(beta), to_array(distance), to_array(presence)
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
                divisor = to_array(presence_counts)[m]
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
    projected: Array = np.maximum(high * beta, minimum)
    return projected


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

    Args:
        pixel: Kpix (B, M).
        prototype: P (B, M).
        unimodal: S (B, M).
        presence: a (B, M), 1 = present.
        rarity: w (M,), by the paper N / N_m.
        beta: (M,).
        gate: omega (B, M).
        pixel_weight: weight of Kpix.
        prototype_weight: weight of P.
        unimodal_weight: u.
        mode: ``"default"`` or ``"official"``.

    Returns:
        The loss.
    """
    K, P, S, a = to_array(pixel), to_array(prototype), to_array(unimodal), to_array(presence)
    w, weights, omega = to_array(rarity), to_array(beta), to_array(gate)
    total = 0.0
    for b in range(len(a)):
        for m in range(a.shape[1]):
            if a[b, m] == 1:
                on_unimodal = omega[b, m] * weights[m] if mode == "official" else 1.0
                total += w[m] * pixel_weight * weights[m] * K[b, m]
                total += w[m] * prototype_weight * omega[b, m] * P[b, m]
                total += w[m] * unimodal_weight * on_unimodal * S[b, m]
    return float(total / len(a))

"""What a tissue looks like: signal equations and relaxation times.

Signal equations (Bernstein, King, Zhou, *Handbook of MRI Pulse Sequences*, Elsevier 2004, chapter 14):

- spoiled gradient echo: ``S = PD sin(a) (1 - E1) / (1 - cos(a) E1) exp(-TE / T2s)``, ``E1 = exp(-TR / T1)``
- spin echo: ``S = PD (1 - exp(-TR / T1)) exp(-TE / T2)``
- inversion recovery spin echo: ``S = PD |1 - 2 exp(-TI / T1) + exp(-TR / T1)| exp(-TE / T2)``
- contrast agent: ``1 / T1 = 1 / T1_native + r1 C``

Healthy tissue at 1.5 T: PD, T1, T2 of the BrainWeb simulator (Kwan, Evans, Pike, IEEE TMI 18:1085, 1999,
doi:10.1109/42.816072). Lesion values are plausible choices of ours, not measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tissue:
    """Proton density (relative to water) and relaxation times in milliseconds.

    Attributes:
        pd: proton density, 0..1.
        t1: longitudinal relaxation time without contrast agent, ms.
        t2: transverse relaxation time, ms.
        uptake: concentration of contrast agent when T1ce is acquired, mmol/l.
    """

    pd: float
    t1: float
    t2: float
    uptake: float = 0.0

    def enhanced(self, relaxivity: float = 4.5) -> Tissue:
        """Return the tissue with contrast agent, ``1/T1 = 1/T1_native + r1 C`` (``r1`` in l/mmol/s)."""
        return Tissue(self.pd, 1 / (1 / self.t1 + relaxivity * self.uptake / 1000), self.t2)


TISSUES: dict[str, Tissue] = {
    "csf": Tissue(1.00, 2569, 329),
    "grey": Tissue(0.86, 833, 83),
    "white": Tissue(0.77, 500, 70),
    "necrosis": Tissue(0.95, 1800, 250),
    "oedema": Tissue(0.85, 780, 150),
    "enhancing": Tissue(0.86, 1000, 110, uptake=0.5),
    "vessel": Tissue(0.90, 1400, 160, uptake=0.8),
    "blood": Tissue(0.80, 280, 60),
    "gliosis": Tissue(0.82, 700, 120),
}
"""Tissues by name. Only ``necrosis``, ``oedema`` and ``enhancing`` are labelled."""


def spoiled_gradient_echo(tissue: Tissue, tr: float = 25, te: float = 5, flip: float = 30) -> float:
    """Steady-state signal, ``PD sin(a) (1 - E1) / (1 - cos(a) E1) exp(-TE / T2)``; ms and degrees.

    T2 stands in for T2*, whose difference is negligible at the short echo times of T1 weighting.
    """
    angle = np.deg2rad(flip)
    e1 = np.exp(-tr / tissue.t1)
    recovered = np.sin(angle) * (1 - e1) / (1 - np.cos(angle) * e1)
    return float(tissue.pd * recovered * np.exp(-te / tissue.t2))


def spin_echo(tissue: Tissue, tr: float = 4000, te: float = 100) -> float:
    """Signal ``PD (1 - exp(-TR / T1)) exp(-TE / T2)``; times in ms."""
    return float(tissue.pd * (1 - np.exp(-tr / tissue.t1)) * np.exp(-te / tissue.t2))


def inversion_recovery(tissue: Tissue, tr: float = 9000, te: float = 120, ti: float = 1700) -> float:
    """Magnitude signal ``PD |1 - 2 exp(-TI / T1) + exp(-TR / T1)| exp(-TE / T2)``; times in ms.

    The default inversion time nulls CSF (FLAIR).

    Example:
        >>> inversion_recovery(TISSUES["csf"]) < 0.02 * inversion_recovery(TISSUES["oedema"])
        True
    """
    recovered = abs(1 - 2 * np.exp(-ti / tissue.t1) + np.exp(-tr / tissue.t1))
    return float(tissue.pd * recovered * np.exp(-te / tissue.t2))


PROTOCOL: dict[str, Callable[[Tissue], float]] = {
    "flair": inversion_recovery,
    "t1ce": lambda tissue: spoiled_gradient_echo(tissue.enhanced()),
    "t1": spoiled_gradient_echo,
    "t2": spin_echo,
}
"""Signal of a tissue by modality, in the order of ``MODALITIES``."""

"""A synthetic multi-contrast brain with a lesion, so that everything runs without a download.

Anatomy is a handful of deformed ellipsoids with soft edges (partial volume); contrasts come from the signal
equations of the sequences that a tumour protocol uses, evaluated on relaxation times of each tissue. What a
lesion part looks like in which modality is therefore a consequence of physics and not painted in: oedema is
bright in FLAIR and T2 and near grey matter in T1ce; the enhancing rim is bright in T1ce alone, because
contrast agent shortens its T1; necrosis equals CSF in T2 and nearly white matter in FLAIR. Distractors make
single modalities ambiguous: CSF is as bright as necrosis in T2, gliosis looks like oedema in FLAIR, vessels
enhance in T1ce, and old blood is bright in T1ce and in T1, which only T1 can tell from enhancement.

Signal equations (Bernstein, King, Zhou, *Handbook of MRI Pulse Sequences*, Elsevier 2004, chapter 14):

- spoiled gradient echo: ``S = PD sin(a) (1 - E1) / (1 - cos(a) E1) exp(-TE / T2s)``, ``E1 = exp(-TR / T1)``
- spin echo: ``S = PD (1 - exp(-TR / T1)) exp(-TE / T2)``
- inversion recovery spin echo: ``S = PD |1 - 2 exp(-TI / T1) + exp(-TR / T1)| exp(-TE / T2)``
- contrast agent: ``1 / T1 = 1 / T1_native + r1 C``

Healthy tissue at 1.5 T: PD, T1, T2 of the BrainWeb simulator (Kwan, Evans, Pike, IEEE TMI 18:1085, 1999,
doi:10.1109/42.816072). Lesion values are plausible choices of ours, not measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

__all__ = [
    "CLASSES",
    "MODALITIES",
    "PROTOCOL",
    "TISSUES",
    "PhantomDataset",
    "Tissue",
    "inversion_recovery",
    "make_case",
    "spin_echo",
    "spoiled_gradient_echo",
    "standardise",
]

Array = NDArray[np.float64]

MODALITIES: tuple[str, ...] = ("flair", "t1ce", "t1", "t2")
"""Order of the image channels."""

CLASSES: tuple[str, ...] = ("background", "necrosis", "oedema", "enhancing")
"""Names of labels 0..3."""


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
        """The same tissue with contrast agent, ``1/T1 = 1/T1_native + r1 C`` (``r1`` in l/mmol/s)."""
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


def make_case(
    seed: int, shape: Sequence[int] = (48, 48, 48), *, noise: float = 0.06
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Draw one patient.

    Args:
        seed: the same seed and shape give the same case, bit for bit.
        shape: voxels (z, y, x), each at least 16.
        noise: standard deviation of the Rician noise, relative to the signal of white matter.

    Returns:
        image (4, *shape) float32, channels as in ``MODALITIES``, arbitrary scanner units, 0 outside the
        brain; label (*shape) int64: 0 background, 1 necrotic core, 2 oedema, 3 enhancing rim.

    Raises:
        ValueError: when ``shape`` is not three sizes of at least 16.

    Example:
        >>> image, label = make_case(0, (32, 32, 32))
        >>> image.shape, sorted(set(label.ravel().tolist()))
        ((4, 32, 32, 32), [0, 1, 2, 3])
    """
    if len(shape) != 3 or min(shape) < 16:
        raise ValueError(f"shape is {tuple(shape)}; the phantom needs three sizes of at least 16 voxels.")
    rng = np.random.default_rng(seed)
    brain, fractions = _anatomy(rng, tuple(shape))
    names = list(fractions)
    amounts = np.stack([fractions[name] for name in names])
    tissues = [_jitter(rng, TISSUES[name]) for name in names]
    channels = []
    for signal in PROTOCOL.values():
        values = np.array([signal(tissue) for tissue in tissues])
        clean = np.tensordot(values, amounts, axes=1) * np.exp(0.08 * _smooth_noise(rng, shape, 0.5))
        sigma = noise * signal(TISSUES["white"])
        rician = np.hypot(clean + sigma * rng.standard_normal(shape), sigma * rng.standard_normal(shape))
        channels.append(np.where(brain, rician * 1000 * rng.uniform(0.8, 1.25), 0))
    label = np.zeros(shape, dtype=np.int64)
    winner = amounts.argmax(axis=0)
    for value, name in enumerate(CLASSES[1:], start=1):
        label[brain & (winner == names.index(name))] = value
    return np.stack(channels).astype(np.float32), label


def standardise(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale every modality to mean 0 and sd 1 over its own non-zero voxels; zeros stay 0.

    Only the modality itself is looked at. A brain mask made from all modalities, as is common, would leak
    what is supposed to be missing.

    Args:
        image: (M, *spatial).

    Returns:
        (M, *spatial) float32.
    """
    result = np.zeros_like(image, dtype=np.float32)
    for channel, scaled in zip(image, result, strict=True):
        inside = channel != 0
        if inside.any():
            values = channel[inside].astype(np.float64)
            scaled[inside] = (values - values.mean()) / (values.std() + 1e-6)
    return result


class PhantomDataset(Dataset[dict[str, Tensor | str]]):
    """Phantom patients, drawn when first asked for and then kept.

    Items are ``{"image": (4, *shape) float32, standardised, "label": (*shape) int64, "id": str}``.

    Args:
        n: number of patients.
        shape: voxels (z, y, x).
        seed: patient i is ``make_case(1000 * seed + i, shape)``; other seeds are other patients.
        noise: see :func:`make_case`.

    Raises:
        ValueError: when ``n`` is not in 1..1000 (data sets of neighbouring seeds would share patients).

    Example:
        >>> data = PhantomDataset(2, (32, 32, 32), seed=1)
        >>> data[1]["id"], data[1]["image"].shape
        ('phantom_1001', torch.Size([4, 32, 32, 32]))
    """

    modalities = MODALITIES
    num_classes = len(CLASSES)

    def __init__(
        self, n: int, shape: Sequence[int] = (48, 48, 48), seed: int = 0, *, noise: float = 0.06
    ) -> None:
        if not 1 <= n <= 1000:
            raise ValueError(f"n is {n}; a phantom data set holds 1 to 1000 patients.")
        self.n, self.shape, self.seed, self.noise = n, tuple(shape), seed, noise
        self._cases: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Number of patients."""
        return self.n

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        """Patient ``index``; raises IndexError past the end, so that plain iteration stops."""
        if not -self.n <= index < self.n:
            raise IndexError(f"index {index} is outside 0..{self.n - 1}.")
        index %= self.n
        case = 1000 * self.seed + index
        if index not in self._cases:
            drawn, truth = make_case(case, self.shape, noise=self.noise)
            self._cases[index] = torch.from_numpy(standardise(drawn)), torch.from_numpy(truth)
        image, label = self._cases[index]
        return {"image": image.clone(), "label": label.clone(), "id": f"phantom_{case}"}

    def __iter__(self) -> Iterator[dict[str, Tensor | str]]:
        """Iterate over the patients in order."""
        return (self[index] for index in range(self.n))

    @property
    def ids(self) -> list[str]:
        """Names of the patients, in order."""
        return [f"phantom_{1000 * self.seed + index}" for index in range(self.n)]


def _anatomy(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[NDArray[np.bool_], dict[str, Array]]:
    """Brain mask and volume fraction of every tissue; the fractions sum to 1 inside the brain."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij"))
    edge = 1.5 / min(shape)
    warped = grid + 0.05 * np.stack([_smooth_noise(rng, shape, 0.55) for _ in range(3)])

    def inside(distance: Array) -> Array:
        """Soft step: 1 where ``distance`` is negative, with partial volume over about one voxel."""
        return 1 / (1 + np.exp(np.clip(distance / edge, -30, 30)))

    def ellipsoid(centre: Sequence[float], radii: Sequence[float] | Array) -> Array:
        """Signed distance, approximately: negative inside."""
        scaled = [(p - c) / r for p, c, r in zip(warped, centre, radii, strict=True)]
        return np.asarray((np.linalg.norm(scaled, axis=0) - 1) * min(radii))

    radii = rng.uniform(0.82, 0.92, size=3)
    head = ellipsoid((0, 0, 0), radii)
    folds = 0.05 * _smooth_noise(rng, shape, 0.14)
    nuclei = np.minimum(*[ellipsoid((0.05, -0.05, s * 0.22), (0.16, 0.2, 0.1)) for s in (-1, 1)])
    ventricles = np.minimum(*[ellipsoid((0.12, 0.05, s * 0.13), (0.1, 0.32, 0.07)) for s in (-1, 1)])

    def spot(depth: float, reach: float) -> tuple[float, ...]:
        """A point at a random direction, between ``depth`` and ``reach`` of the way to the surface."""
        direction = rng.standard_normal(3)
        place = direction / np.linalg.norm(direction) * radii * rng.uniform(depth, reach)
        return tuple(float(p) for p in place)

    layers: dict[str, Array] = {
        "csf": inside(head),
        "grey": inside(head + 0.08 + folds),
        "white": inside(head + 0.24 + 1.5 * folds),
    }
    layers["grey+"] = inside(nuclei)
    layers["csf+"] = inside(ventricles)
    caps = [spot(0.35, 0.6) for _ in range(rng.integers(1, 4))]
    layers["gliosis"] = inside(np.min([ellipsoid(c, rng.uniform(0.06, 0.1, 3)) for c in caps], axis=0))
    layers["oedema"], layers["enhancing"], layers["necrosis"] = _lesion(rng, warped, spot(0.3, 0.6), inside)
    layers["blood"] = inside(ellipsoid(spot(0.4, 0.75), rng.uniform(0.07, 0.11, 3)))
    layers["vessel"] = inside(_vessels(rng, warped, [spot(0.6, 0.95) for _ in range(3)]))

    # Painter's algorithm with soft edges: each layer takes its share from what lies below it.
    brain = inside(head) > 0.5
    fractions = {name: np.zeros(shape) for name in TISSUES}
    for name, amount in layers.items():
        if name in ("oedema", "enhancing", "necrosis"):
            # Oedema spreads through tissue and stops at the ventricles and at the surface.
            amount = amount * (1 - fractions["csf"]) if name == "oedema" else amount * inside(head + 0.1)
        for below in fractions.values():
            below *= 1 - amount
        fractions[name.rstrip("+")] += amount
    return brain, fractions


def _lesion(
    rng: np.random.Generator,
    points: Array,
    centre: Sequence[float],
    inside: Callable[[Array], Array],
) -> tuple[Array, Array, Array]:
    """Oedema, enhancing and necrotic extents (nested, soft) of one irregular lesion."""
    shape = points.shape[1:]
    core = rng.uniform(0.22, 0.34)
    halo, hole = core * rng.uniform(1.5, 1.9), core * rng.uniform(0.55, 0.75)
    distance = np.linalg.norm([p - c for p, c in zip(points, centre, strict=True)], axis=0)
    distance = distance + 0.05 * _smooth_noise(rng, shape, 0.25)
    oedema = distance + 0.08 * _smooth_noise(rng, shape, 0.3) - halo
    return inside(oedema), inside(distance - core), inside(distance - hole)


def _vessels(rng: np.random.Generator, points: Array, starts: Sequence[Sequence[float]]) -> Array:
    """Signed distance to thin straight-ish tubes through ``starts`` (negative inside)."""
    distances = []
    for start in starts:
        axis = rng.standard_normal(3)
        axis /= np.linalg.norm(axis)
        offset = np.stack([p - c for p, c in zip(points, start, strict=True)])
        along = np.tensordot(axis, offset, axes=1)
        across = np.linalg.norm(offset - axis[:, None, None, None] * along, axis=0)
        distances.append(np.maximum(across - 0.035, np.abs(along) - 0.5))
    return np.min(distances, axis=0)


def _smooth_noise(rng: np.random.Generator, shape: Sequence[int], scale: float) -> Array:
    """Gaussian random field with mean 0, sd 1 and correlation length ``scale`` (the volume is 2 wide)."""
    spectrum = np.fft.rfftn(rng.standard_normal(shape))
    frequencies = np.meshgrid(*[np.fft.fftfreq(s, 2 / s) for s in shape], indexing="ij", sparse=True)
    square = np.sum(np.broadcast_arrays(*[f**2 for f in frequencies]), axis=0)[..., : shape[-1] // 2 + 1]
    blurred = spectrum * np.exp(-0.5 * (np.pi * scale) ** 2 * square)
    field = np.fft.irfftn(blurred, s=tuple(shape), axes=range(len(shape)))
    field -= field.mean()
    return np.asarray(field / field.std())


def _jitter(rng: np.random.Generator, tissue: Tissue, spread: float = 0.04) -> Tissue:
    """The same tissue in another patient: every value a few per cent off."""
    pd, t1, t2, uptake = np.exp(spread * rng.standard_normal(4))
    return Tissue(tissue.pd * pd, tissue.t1 * t1, tissue.t2 * t2, tissue.uptake * uptake)

"""Where which tissue is: deformed ellipsoids with soft edges, and one irregular lesion."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from passion_plugin.phantom._contrast import TISSUES

Array = NDArray[np.float64]


def draw_anatomy(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[NDArray[np.bool_], dict[str, Array]]:
    """Return the brain mask (*shape) and the volume fraction (*shape) of every tissue; they sum to 1 in the brain."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij"))
    edge = 1.5 / min(shape)
    warped = grid + 0.05 * np.stack([smooth_noise(rng, shape, 0.55) for _ in range(3)])

    def inside(distance: Array) -> Array:
        """Return a soft step: 1 where ``distance`` is negative, with partial volume over about one voxel."""
        return 1 / (1 + np.exp(np.clip(distance / edge, -30, 30)))

    def ellipsoid(centre: Sequence[float], radii: Sequence[float] | Array) -> Array:
        """Return the signed distance, approximately; negative inside."""
        scaled = [(p - c) / r for p, c, r in zip(warped, centre, radii, strict=True)]
        return np.asarray((np.linalg.norm(scaled, axis=0) - 1) * min(radii))

    radii = rng.uniform(0.82, 0.92, size=3)
    head = ellipsoid((0, 0, 0), radii)
    folds = 0.05 * smooth_noise(rng, shape, 0.14)
    nuclei = np.minimum(*[ellipsoid((0.05, -0.05, s * 0.22), (0.16, 0.2, 0.1)) for s in (-1, 1)])
    ventricles = np.minimum(*[ellipsoid((0.12, 0.05, s * 0.13), (0.1, 0.32, 0.07)) for s in (-1, 1)])

    def spot(depth: float, reach: float) -> tuple[float, ...]:
        """Return a point in a random direction, between ``depth`` and ``reach`` of the way to the surface."""
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
    rng: np.random.Generator, points: Array, centre: Sequence[float], inside: Callable[[Array], Array]
) -> tuple[Array, Array, Array]:
    """Return oedema, enhancing and necrotic extents (nested, soft) of one irregular lesion."""
    shape = points.shape[1:]
    core = rng.uniform(0.22, 0.34)
    halo, hole = core * rng.uniform(1.5, 1.9), core * rng.uniform(0.55, 0.75)
    distance = np.linalg.norm([p - c for p, c in zip(points, centre, strict=True)], axis=0)
    distance = distance + 0.05 * smooth_noise(rng, shape, 0.25)
    oedema = distance + 0.08 * smooth_noise(rng, shape, 0.3) - halo
    return inside(oedema), inside(distance - core), inside(distance - hole)


def _vessels(rng: np.random.Generator, points: Array, starts: Sequence[Sequence[float]]) -> Array:
    """Return the signed distance to thin straight tubes through ``starts``; negative inside."""
    distances = []
    for start in starts:
        axis = rng.standard_normal(3)
        axis /= np.linalg.norm(axis)
        offset = np.stack([p - c for p, c in zip(points, start, strict=True)])
        along = np.tensordot(axis, offset, axes=1)
        across = np.linalg.norm(offset - axis[:, None, None, None] * along, axis=0)
        distances.append(np.maximum(across - 0.035, np.abs(along) - 0.5))
    return np.min(distances, axis=0)


def smooth_noise(rng: np.random.Generator, shape: Sequence[int], scale: float) -> Array:
    """Return a Gaussian random field with mean 0, sd 1 and correlation length ``scale`` (the volume is 2 wide)."""
    spectrum = np.fft.rfftn(rng.standard_normal(shape))
    frequencies = np.meshgrid(*[np.fft.fftfreq(s, 2 / s) for s in shape], indexing="ij", sparse=True)
    square = np.sum(np.broadcast_arrays(*[f**2 for f in frequencies]), axis=0)[..., : shape[-1] // 2 + 1]
    blurred = spectrum * np.exp(-0.5 * (np.pi * scale) ** 2 * square)
    field = np.fft.irfftn(blurred, s=tuple(shape), axes=range(len(shape)))
    field -= field.mean()
    return np.asarray(field / field.std())

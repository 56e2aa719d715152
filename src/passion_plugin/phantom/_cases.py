"""Phantom patients: images, labels and a data set of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from passion_plugin.phantom._anatomy import draw_anatomy, smooth_noise
from passion_plugin.phantom._contrast import PROTOCOL, TISSUES, Tissue

MODALITIES: tuple[str, ...] = tuple(PROTOCOL)
"""Order of the image channels: flair, t1ce, t1, t2."""

CLASSES: tuple[str, ...] = ("background", "necrosis", "oedema", "enhancing")
"""Names of labels 0..3."""


def make_case(
    seed: int, shape: Sequence[int] = (48, 48, 48), *, noise: float = 0.06
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Draw one patient.

    Args:
        seed: the same seed and shape give the same case, bit for bit.
        shape: voxels (z, y, x), each at least 16.
        noise: standard deviation of the Rician noise, relative to the signal of white matter.

    Returns:
        image (4, *shape) float32, channels as in ``MODALITIES``, arbitrary scanner units, 0 outside the brain;
        label (*shape) int64: 0 background, 1 necrotic core, 2 oedema, 3 enhancing rim.

    Raises:
        ValueError: when ``shape`` is not three sizes of at least 16.

    Example:
        >>> image, label = make_case(0, (32, 32, 32))
        >>> image.shape, sorted(set(label.ravel().tolist()))
        ((4, 32, 32, 32), [0, 1, 2, 3])
    """
    if len(shape) != 3 or min(shape) < 16:
        raise ValueError(f"shape is {tuple(shape)}; the phantom needs three sizes of at least 16 voxels")
    rng = np.random.default_rng(seed)
    brain, fractions = draw_anatomy(rng, tuple(shape))
    names = list(fractions)
    amounts = np.stack([fractions[name] for name in names])
    tissues = [_jitter(rng, TISSUES[name]) for name in names]
    channels = []
    for signal in PROTOCOL.values():
        values = np.array([signal(tissue) for tissue in tissues])
        clean = np.tensordot(values, amounts, axes=1) * np.exp(0.08 * smooth_noise(rng, shape, 0.5))
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

    A brain mask made from all modalities, as is common, would leak what is supposed to be missing.

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

    def __init__(self, n: int, shape: Sequence[int] = (48, 48, 48), seed: int = 0, *, noise: float = 0.06) -> None:
        if not 1 <= n <= 1000:
            raise ValueError(f"n is {n}; a phantom data set holds 1 to 1000 patients")
        self.n, self.shape, self.seed, self.noise = n, tuple(shape), seed, noise
        self._cases: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Return the number of patients."""
        return self.n

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        """Return patient ``index``; IndexError past the end, so that plain iteration stops."""
        if not -self.n <= index < self.n:
            raise IndexError(f"index {index} is outside 0..{self.n - 1}")
        index %= self.n
        case = 1000 * self.seed + index
        if index not in self._cases:
            drawn, truth = make_case(case, self.shape, noise=self.noise)
            self._cases[index] = torch.from_numpy(standardise(drawn)), torch.from_numpy(truth)
        image, label = self._cases[index]
        return {"image": image.clone(), "label": label.clone(), "id": f"phantom_{case}"}

    @property
    def ids(self) -> list[str]:
        """Names of the patients, in order."""
        return [f"phantom_{1000 * self.seed + index}" for index in range(self.n)]


def _jitter(rng: np.random.Generator, tissue: Tissue, spread: float = 0.04) -> Tissue:
    """Return the tissue of another patient: every value a few per cent off."""
    pd, t1, t2, uptake = np.exp(spread * rng.standard_normal(4))
    return Tissue(tissue.pd * pd, tissue.t1 * t1, tissue.t2 * t2, tissue.uptake * uptake)

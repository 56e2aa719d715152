"""A synthetic multi-contrast brain with a lesion, so that everything runs without a download.

ModuleSummary is a handful of deformed ellipsoids with soft edges (partial volume); contrasts come from the signal
equations of the sequences that a tumour protocol uses, evaluated on relaxation times of each tissue. What a
lesion part looks like in which modality is therefore a consequence of physics and not painted in: oedema is
bright in FLAIR and T2 and near grey matter in T1ce; the enhancing rim is bright in T1ce alone, because
contrast agent shortens its T1; necrosis equals CSF in T2 and nearly white matter in FLAIR. Distractors make
single modalities ambiguous: CSF is as bright as necrosis in T2, gliosis looks like oedema in FLAIR, vessels
enhance in T1ce, and old blood is bright in T1ce and in T1, which only T1 can tell from enhancement.

Equations and relaxation times: :mod:`passion_plugin.phantom.contrast`.
"""

from __future__ import annotations

from passion_plugin.phantom._cases import CLASSES, MODALITIES, PhantomDataset, make_case, standardise
from passion_plugin.phantom._contrast import (
    PROTOCOL,
    TISSUES,
    Tissue,
    inversion_recovery,
    spin_echo,
    spoiled_gradient_echo,
)

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

"""A synthetic multi-contrast brain with a lesion, so that everything runs without a download.

The anatomy is a handful of deformed ellipsoids with soft edges (partial volume). The contrasts come from the signal
equations of the sequences of a tumour protocol and the relaxation times of each tissue, both in ``_contrast.py``. So
physics decides what a part of the lesion looks like in which modality: oedema is bright in FLAIR and T2 and near grey
matter in T1ce; the enhancing rim is bright in T1ce alone, because contrast agent shortens its T1; necrosis equals CSF
in T2 and nearly white matter in FLAIR. Distractors make single modalities ambiguous: CSF is as bright as necrosis in
T2, gliosis looks like oedema in FLAIR, vessels enhance in T1ce, and old blood is bright in T1ce and in T1, which only
T1 can tell from enhancement.
"""

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

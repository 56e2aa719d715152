"""Compact reference networks, written from the papers: 2-D and 3-D, any number of modalities and classes.

Every network takes ``forward(x, mask)`` with ``x`` (B, M, *spatial) and ``mask`` (B, M) ``torch.bool``,
True = present, and answers with logits (B, K, *spatial). They are small on purpose (tens of thousands of
parameters): they show the structure that PASSION needs, not the capacity of the published models.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from examples.backbones.mmformer_like import MMFormerLike
from examples.backbones.rfnet_like import RFNetLike, rfnet_spec
from examples.backbones.uhemis_like import UHeMISLike

__all__ = ["BACKBONES", "MMFormerLike", "RFNetLike", "UHeMISLike", "rfnet_spec"]

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "uhemis": UHeMISLike,
    "rfnet": RFNetLike,
    "mmformer": MMFormerLike,
}
"""Constructors by name; all accept ``modalities``, ``num_classes``, ``ndim`` and ``widths``."""

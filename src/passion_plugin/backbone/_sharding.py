"""Whether a backbone is sharded, or its forward a collective call."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

# Where FSDPModule is: the second one up to PyTorch 2.5.
_FULLY_SHARD = ("torch.distributed.fsdp", "torch.distributed._composable.fsdp")


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP2) was applied to the module or a part of it."""
    if not is_distributed():
        return False
    # What nobody has imported has sharded nothing, and importing it takes a second.
    known = (getattr(sys.modules.get(name), "FSDPModule", None) for name in _FULLY_SHARD)
    classes: tuple[Any, ...] = tuple(found for found in known if found is not None)
    return any(isinstance(part, classes) for part in module.modules())


def has_collective_forward(backbone: nn.Module) -> bool:
    """Whether a forward of the backbone is a collective call, so that all processes need the same number of them.

    It is for shards, which are gathered, and for SyncBatchNorm, which adds up statistics.
    """
    together = is_distributed() and any(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules())
    return together or is_sharded(backbone)


def is_distributed() -> bool:
    """Whether ``torch.distributed`` is in use."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()

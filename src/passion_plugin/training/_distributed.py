"""What processes that train together tell each other."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from passion_plugin.backbone import is_distributed, is_sharded
from passion_plugin.errors import UsageError


def all_reduce_sum(values: Tensor, what: str) -> Tensor:
    """Add up over all processes; a collective call that every one of them must reach.

    Args:
        values: (n,) sums or counts of this process.
        what: what they are of; must be the same everywhere.

    Returns:
        (n,) float64 on the CPU, the same numbers in every process. Without ``torch.distributed``: the values.

    Raises:
        UsageError: in every process, when another one brought something else.
    """
    if not is_distributed():
        return values.cpu().double()
    kinds = [part.partition(":")[0] for part in torch.distributed.get_backend_config().split(",")]
    device = "cpu" if "cpu" in kinds else kinds[0]
    # Compared before anything is added: sums of different things would be added without complaint, and those of
    # different sizes hang.
    mine = torch.tensor([zlib.crc32(what.encode()), len(values)], device=device)
    everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyone, mine)
    others = [rank for rank, theirs in enumerate(everyone) if not torch.equal(theirs, mine)]
    if others:
        raise UsageError(
            f"end_epoch() of rank {torch.distributed.get_rank()} closes {what}, but rank(s) "
            f"{', '.join(map(str, others))} something else. Call it once per epoch in every process, for the same "
            f"models in the same order; when a run is resumed, load the add-on state in every process"
        )
    # MPS has no float64, but no process group either.
    total = values.to(device, torch.float64, copy=True)
    torch.distributed.all_reduce(total)
    return total.cpu()


def check_heads(heads: nn.ModuleList, backbone: nn.Module, *, single_call: bool) -> None:
    """Check that the gradients of heads are reduced over all processes; ``single_call``: the target was in the call."""
    if not len(heads) or not is_distributed():
        return
    if is_sharded(backbone):
        raise UsageError(
            "the students of this backbone are heads outside of it, whose gradients fully_shard(backbone) does not "
            "reduce: shard the wrapper alone, fully_shard(model)"
        )
    ddp: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None:
        return
    reduced = {id(parameter) for parameter in ddp.module.parameters()}
    if any(id(parameter) not in reduced for parameter in heads.parameters()):
        raise UsageError(
            "the students of this backbone are heads outside of what DistributedDataParallel holds, so that every "
            "process would train its own: use DistributedDataParallel(PassionWrapper(backbone, ...))"
        )
    if ddp.find_unused_parameters and not ddp.static_graph and not single_call:
        raise UsageError(
            "find_unused_parameters=True looks at what forward returns, which does not depend on the heads, and would "
            "take them for unused: call model(..., passion_target=target), which returns the loss too, or leave "
            "find_unused_parameters out"
        )

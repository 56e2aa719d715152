"""Reentrant activation checkpointing, which students cannot be trained through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

__all__ = ["passes_reentrant", "reentrant_problem"]


def passes_reentrant(outputs: Any) -> bool:
    """Whether the graph behind any tensor in ``outputs`` passes through reentrant activation checkpointing."""
    waiting = [leaf.grad_fn for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in node.name():
            return True
        waiting += [parent for parent, _ in node.next_functions]
    return False


def reentrant_problem(names: Sequence[str] = ()) -> str:
    """Return the sentence that says what is wrong and what to do.

    Args:
        names: encoders and classifier that were seen to run without gradient.
    """
    around = f" around {', '.join(map(repr, names))}" if names else ""
    return (
        f"reentrant activation checkpointing{around}: what is inside runs without gradient, and again in a backward of "
        f"its own for the fused pass and every student. Features cannot be recorded there, DistributedDataParallel "
        f"refuses the repeated backward and fully_shard gets wrong gradients. Call "
        f"torch.utils.checkpoint.checkpoint(..., use_reentrant=False), which saves as much memory"
    )

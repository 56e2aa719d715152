"""Which engine is in charge of which backbone: two at once would scale the same gradients twice."""

from __future__ import annotations

import gc
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from passion_plugin.errors import UsageError

__all__ = ["claim", "engine_of", "refuse_claimed", "release"]

# Kept here and not on the backbone, which is never written to; an entry ends with its backbone or its engine.
_ENGINES: WeakKeyDictionary[nn.Module, ref[Any]] = WeakKeyDictionary()


def refuse_claimed(backbone: nn.Module) -> None:
    """Check that no engine is in charge of a backbone, of a module in it, or of one around it.

    Raises:
        UsageError: one is, and it still exists.
    """
    if _claimed(backbone):
        # An engine that nobody holds any more may still hang in a cycle of references.
        gc.collect()
    for other in _claimed(backbone):
        where = "" if other is backbone else f", through the {type(other).__name__} in it or around it,"
        raise UsageError(
            f"this backbone{where} has a Passion engine already; unwrap() or detach() that first. Two engines would "
            f"scale the same gradients twice: to compare them, give each a copy.deepcopy of the backbone, made "
            f"before an engine is put on it"
        )


def claim(backbone: nn.Module, engine: Any) -> None:
    """Put an engine in charge of a backbone, until it is released or either of them is gone.

    Its strategy belongs to it from then on; one that was refused before may serve the next attempt.
    """
    _ENGINES[backbone] = ref(engine)
    engine.strategy.taken = True


def release(backbone: nn.Module, engine: Any) -> None:
    """Leave the backbone to whoever claims it next, if it is this engine that is in charge of it."""
    if engine_of(backbone) is engine:
        del _ENGINES[backbone]


def engine_of(backbone: nn.Module) -> Any:
    """Return the engine that is in charge of a backbone, None where there is none."""
    reference = _ENGINES.get(backbone)
    return None if reference is None else reference()


def _claimed(backbone: nn.Module) -> list[nn.Module]:
    inside = set(backbone.modules())
    held = [other for other in list(_ENGINES) if engine_of(other) is not None]
    return [other for other in held if other in inside or backbone in set(other.modules())]

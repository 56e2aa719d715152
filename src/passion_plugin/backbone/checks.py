"""What a backbone does with its mask and its batch, asked by experiment."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from passion_plugin.backbone.masks import MaskCodec
from passion_plugin.backbone.probe import Probe, relative_difference
from passion_plugin.errors import short

__all__ = [
    "BatchBehaviour",
    "MaskBehaviour",
    "equality_tolerance",
    "mask_behaviour",
    "mask_meaning",
    "settle_batch",
]

EFFECT = 1e-5
"""Relative change of the prediction from which on content or a mask counts as having an effect."""


def equality_tolerance(tensor: Tensor) -> float:
    """Return the relative difference up to which two ways to compute a tensor count as equal."""
    return max(1e-3, 16 * torch.finfo(tensor.dtype).eps)


@dataclass
class BatchBehaviour:
    """How samples of one batch relate.

    Attributes:
        repeatable: two runs from different random states agree.
        single: a batch of one runs; otherwise the message of its exception.
        mixing: relative change of a sample when the content of its neighbour changes; None when not tried.
        mixed: relative difference between different masks in one batch and the same masks apart; None when
            that is not possible at all.
        reason: why a batch of two or different masks are not possible.
    """

    repeatable: float = 0.0
    single: str = ""
    mixing: float | None = None
    mixed: float | None = None
    reason: str = ""


def settle_batch(probe: Probe) -> BatchBehaviour:
    """Find out whether a batch of two runs, mixes its samples, and may have different masks; size the probe.

    Every comparison is between batches of one size from one random state, so that dropout that is always on
    draws the same numbers on both sides.
    """
    found = BatchBehaviour()
    if probe.batch == 1:
        probe.resize(2)
        try:
            probe.predict(probe.images(), probe.presence())
        except Exception as error:
            found.reason = f"a batch of two raises {short(error)}"
            probe.resize(1)
    everything = probe.presence()
    base = probe.predict(probe.images(), everything)
    found.repeatable = relative_difference(probe.predict(probe.images(), everything, seed=1), base)
    if probe.batch == 1:
        return found
    # Every row: what is read off the first one and used for all does not change with the others.
    changed = [probe.predict(probe.neighbours(row), everything)[row] for row in range(probe.batch)]
    found.mixing = max(relative_difference(other, base[row]) for row, other in enumerate(changed))
    try:
        probe.predict(probe.images(), everything, rows=torch.tensor([0]))
    except Exception as error:
        found.single = f"a batch of one raises {short(error)}"
    try:
        found.mixed = _mixed_difference(probe)
    except Exception as error:
        found.reason = f"different masks in one batch raise {short(error)}"
    return found


def _mixed_difference(probe: Probe) -> float:
    count = len(probe.modalities)
    table = torch.ones(probe.batch, count, dtype=torch.bool)
    for row in range(probe.batch):
        table[row, (row + 1) % count] = False
    together = probe.predict(probe.images(), table)
    differences = []
    for row in range(probe.batch):
        apart = probe.predict(probe.images(), table[row].expand_as(table))
        differences.append(relative_difference(together[row], apart[row]))
    return max(differences)


def mask_meaning(probe: Probe) -> str:
    """Return ``"present"`` or ``"missing"``: what a 1 in the mask says.

    Under a mask of ones the content must matter if a 1 says "present"; if it does not, but matters under a
    mask of zeros, a 1 says "missing". When this does not decide it, what the probe assumes is returned.
    """
    before = probe.interface
    assumed, other = ("present", "missing") if before.mask_meaning == "present" else ("missing", "present")
    if isinstance(before.mask_format, MaskCodec) or before.mask_argument is None or _content_matters(probe):
        return assumed
    try:
        probe.reinterpret(replace(before, mask_meaning=other))
        return other if _content_matters(probe) else assumed
    finally:
        probe.reinterpret(before)


def _content_matters(probe: Probe) -> bool:
    try:
        base = probe.predict(probe.images(), probe.presence())
        changed = probe.predict(probe.images(*range(len(probe.modalities))), probe.presence())
    except Exception:
        return False
    return bool(torch.isfinite(base).all()) and relative_difference(changed, base) > EFFECT


@dataclass
class MaskBehaviour:
    """What letting one modality through by the mask alone does, nothing blanked; numbers in order of modality.

    Attributes:
        effect: relative change of the prediction against that with everything present.
        own: relative change when the content of the modality itself changes.
        leak: relative change when the content of all the others changes.
        columns: for a column that does not show its own modality: the numbers of those that it shows.
        failure: the exception that one of these masks raised.
    """

    effect: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    leak: list[float] = field(default_factory=list)
    columns: dict[int, tuple[int, ...]] = field(default_factory=dict)
    failure: str = ""

    @property
    def has_effect(self) -> bool:
        """Whether any mask changed the prediction."""
        return any(not effect <= EFFECT for effect in self.effect)

    @property
    def leaks(self) -> bool:
        """Whether hidden content changed the prediction."""
        return any(leak > EFFECT for leak in self.leak)

    def permutation(self) -> tuple[int, ...] | None:
        """Return which modality each column switches, when that is a permutation other than the identity."""
        order = tuple(self.columns[k][0] if len(self.columns.get(k, ())) == 1 else k for k in range(len(self.effect)))
        clean = all(len(shown) == 1 for shown in self.columns.values())
        return order if self.columns and clean and sorted(order) == list(range(len(order))) else None


def mask_behaviour(probe: Probe) -> MaskBehaviour:
    """Let one modality after the other through by the mask alone, and change content to see what is shown."""
    count = len(probe.modalities)
    found = MaskBehaviour()
    full = probe.predict(probe.images(), probe.presence())
    for k in range(count):
        keep = probe.presence(k)
        others = [m for m in range(count) if m != k]
        try:
            base = probe.predict(probe.images(), keep)
            own = relative_difference(probe.predict(probe.images(k), keep), base)
            leak = relative_difference(probe.predict(probe.images(*others), keep), base)
            if not torch.isfinite(base).all():
                own = leak = float("nan")
            found.effect.append(relative_difference(base, full))
            found.own.append(own)
            found.leak.append(leak)
            if own <= EFFECT < leak:
                changes = [relative_difference(probe.predict(probe.images(m), keep), base) for m in range(count)]
                found.columns[k] = tuple(m for m in range(count) if changes[m] > EFFECT)
        except Exception as error:
            found.failure = f"a mask with only {probe.modalities[k]!r} present raises {short(error)}"
            break
    return found

"""Relative preference: how far each modality lags behind, and the gates and weights that follow from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passion_plugin._types import Mode
from passion_plugin._validate import as_tuple, describe, is_int, is_number, is_one_of, modality_problems
from passion_plugin.errors import ConfigError, InputError, raise_problems, warn_user
from passion_plugin.training._distributed import all_reduce_sum
from passion_plugin.training._frequencies import values_by_modality
from passion_plugin.training._state import state_problems


@dataclass(frozen=True, eq=False)
class EpochReport:
    """What one epoch said about the modalities. All tensors are float64, on the CPU, of shape (M,).

    Attributes:
        modalities: names, in mask-column order.
        epoch: number of the epoch that ended, from 0.
        beta: weights for the next epoch.
        relative_preference: 1 - distance / mean distance; negative where a modality lags behind, 0 where
            nothing was measured.
        distance: mean prototype distance of the epoch; NaN where nothing was measured.
        counts: number of distances that went into the mean. All zero: the epoch was empty, beta unchanged.
        eta: step size that was used.
        skipped: number of distances, or scores of other rules, that were left out because they were NaN or infinite;
            None where that was not counted. A training resumed within the epoch counts from there on.
    """

    modalities: tuple[str, ...]
    epoch: int
    beta: Tensor
    relative_preference: Tensor
    distance: Tensor
    counts: Tensor
    eta: float = math.nan
    skipped: Tensor | None = None

    @property
    def empty(self) -> bool:
        """True when the epoch held no usable distance at all."""
        return not bool(self.counts.any())

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Return plain numbers by modality name, for loggers.

        Returns:
            ``{name: {"beta": ..., "relative_preference": ..., "distance": ..., "count": ...}}``.
        """
        columns = (self.beta, self.relative_preference, self.distance, self.counts)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        keys = ("beta", "relative_preference", "distance", "count")
        return {name: dict(zip(keys, row, strict=True)) for name, row in zip(self.modalities, rows, strict=True)}

    def __str__(self) -> str:
        """Return a table with one line per modality."""
        width = max(len("modality"), *(len(name) for name in self.modalities))
        title = f"epoch {self.epoch}" + (" (empty: beta unchanged)" if self.empty else "")
        lines = [title, f"{'modality':<{width}}  {'beta':>7}  {'RP':>8}  {'distance':>9}  {'samples':>7}"]
        lines += [
            f"{name:<{width}}  {row['beta']:7.4f}  {row['relative_preference']:+8.4f}  "
            f"{row['distance']:9.6f}  {row['count']:7.0f}"
            for name, row in self.as_dict().items()
        ]
        return "\n".join(lines)


def project_beta(beta: Tensor, *, norm: float, minimum: float) -> Tensor:
    r"""Rescale weights to a given Euclidean norm without letting any fall below a minimum.

    .. math::
        \beta'_m = \max(s\, \beta_m,\ \beta_{min}), \qquad
        s > 0 \text{ such that } \lVert \beta' \rVert_2 = norm

    The norm of the right-hand side grows with ``s``, so there is one solution: components that plain
    rescaling would push below the minimum are fixed at it and the others are rescaled to what is left, again
    until none is below. Applied twice it changes nothing more. (The published code only rescales, and may
    end below.)

    Args:
        beta: (M,) float64, all positive.
        norm: wanted norm, at least ``sqrt(M) * minimum``.
        minimum: smallest component, positive.

    Returns:
        (M,) new tensor.

    Raises:
        ConfigError: ``norm`` is too small for M components of at least ``minimum``, or beta is not positive.

    Example:
        >>> projected = project_beta(torch.tensor([0.1, 3.0, 4.0]), norm=3**0.5, minimum=0.1)
        >>> [round(value, 4) for value in projected.tolist()]
        [0.1, 1.0375, 1.3833]
    """
    size = len(beta)
    if not bool((beta > 0).all()) or norm**2 < size * minimum**2 * (1 - 1e-12):
        raise ConfigError(
            f"project_beta: beta={beta.tolist()}, norm={norm}, minimum={minimum}: need positive beta and a "
            f"norm of at least sqrt({size}) * minimum"
        )
    fixed = torch.zeros_like(beta, dtype=torch.bool)
    scaled = beta
    for _ in range(size):
        left = max(norm**2 - minimum**2 * int(fixed.sum()), 0.0)
        scaled = beta * math.sqrt(left / float(beta[~fixed].square().sum()))
        below = ~fixed & (scaled < minimum)
        if not below.any() or (fixed | below).all():
            break
        fixed = fixed | below
    return torch.where(fixed, minimum, scaled.clamp(min=minimum))


def usable_distances(distance: Tensor, presence: Tensor, modalities: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Check one batch of distances and blank what is absent or not finite.

    Returns:
        ``(distance, presence, usable)``, (B, M), on the device of ``distance``: at least float32 with zeros
        where unusable; bool as given; bool, present and finite.
    """
    size = len(modalities)
    problems = []
    if distance.ndim != 2 or distance.shape[1] != size or not distance.is_floating_point():
        problems.append(
            f"distance is {describe(distance)}; pass a floating-point tensor of shape (B, {size}), one "
            f"column for each of {modalities}"
        )
    if presence.dtype != torch.bool or presence.ndim != 2 or presence.shape[1] != size:
        problems.append(
            f"presence is {describe(presence)}; pass a torch.bool tensor of shape (B, {size}), True = "
            "present" + ("" if presence.dtype == torch.bool else " (presence.bool() converts a 0/1 mask)")
        )
    elif not problems and presence.shape != distance.shape:
        problems.append(
            f"presence is {describe(presence)} but distance is {describe(distance)}; pass both for the same samples"
        )
    # Looking at values on an accelerator would wait for it; an empty row is harmless there, it never counts.
    elif presence.device.type == "cpu" and not torch.compiler.is_compiling():
        empty = (~presence.any(1)).nonzero().flatten().tolist()
        if empty:
            problems.append(
                f"presence has no modality at all in row {', '.join(map(str, empty))}; a sample needs at "
                "least one, drop such samples from the data"
            )
    raise_problems(problems, what="relative preference", error=InputError)
    if distance.dtype in (torch.float16, torch.bfloat16):
        distance = distance.float()
    # Not waiting is safe towards an accelerator only; towards the CPU the values would not be there yet.
    presence = presence.to(distance.device, non_blocking=distance.device.type != "cpu")
    usable = presence & torch.isfinite(distance)
    return torch.where(usable, distance, 0), presence, usable


class PreferenceEstimator(nn.Module):
    r"""Turn prototype distances into gates per sample and weights per epoch (the paper, arXiv:2407.14796).

    .. math::
        \bar D_b = \frac{\sum_m a_{bm} D_{bm}}{\sum_m a_{bm}}, \qquad
        RP_{bm} = 1 - D_{bm} / \bar D_b, \qquad \omega_{bm} = \mathbb 1[RP_{bm} < 0]

    .. math::
        \hat D_m = \frac{\sum_b D_{bm}}{n_m}, \quad
        \widehat{RP}_m = 1 - \frac{\hat D_m}{\mathrm{mean}_m \hat D}, \quad \beta \leftarrow
        \mathrm{rescale}(\mathrm{clip}(\beta - \eta\, \widehat{RP}, \beta_{min}, \beta_{max}))

    with the sum over one epoch. :math:`\beta` starts at 1; :math:`\eta` grows by ``eta_growth`` at the end of
    epochs 0, ``eta_every``, 2 ``eta_every``, … before it is used.

    What counts: distances of present modalities that are finite (an overflow says nothing). A sample with one
    available modality is its own teacher: no student runs and its distance is 0 by construction. In default
    mode such a zero is no observation and is left out of :math:`\hat D`, which would otherwise flatter the
    modalities that often come alone; a non-zero distance of such a sample was measured by somebody, and
    counts. Its RP is 0 and its gate False in every case.

    ================ ================================== =================================================
    ..               default                            official (the published code)
    ================ ================================== =================================================
    gate             per sample and modality            per modality and batch: the sum of
                                                        ``D / Dbar - 1`` over the batch is positive
    :math:`n_m`      distances counted                  ``presence_counts``, else distances counted
    lone zeros       left out                           counted
    rescale          :func:`project_beta`: norm sqrt(M) times 2 / norm, whatever M; may end below
                     and ``beta >= beta_min``           ``beta_min``
    ================ ================================== =================================================

    In both modes a modality without a counted distance in the epoch has RP 0 (default: its beta stays and the
    others share what it leaves of the norm), and distances that are all zero change nothing. Where the
    published code divides 0 by 0 the gate is off.

    :meth:`update` and :meth:`gate` never wait for the device. Sums are float64 there (float32 on MPS, which
    has no float64). The state travels in ``state_dict`` as extra state and not as buffers, because
    DistributedDataParallel would overwrite each rank's own sums with those of rank 0.

    Args:
        modalities: M >= 2 names, in mask-column order.
        presence_counts: number of training samples that have each modality, (M,) or by name. Only official
            mode uses it.
        mode: ``"default"`` or ``"official"``.
        eta: initial step size.
        eta_growth: factor on eta.
        eta_every: epochs between two growths.
        beta_min: smallest weight, in (0, 1].
        beta_max: largest weight before rescaling, at least 1.

    Raises:
        ConfigError: listing everything that is wrong with the arguments.

    Example:
        >>> estimator = PreferenceEstimator(("flair", "t1ce"))
        >>> distance, presence = torch.tensor([[0.1, 0.3]]), torch.tensor([[True, True]])
        >>> estimator.gate(distance, presence).tolist()
        [[False, True]]
        >>> estimator.update(distance, presence)
        >>> [round(value, 4) for value in estimator.end_epoch().beta.tolist()]
        [0.9925, 1.0075]
    """

    def __init__(
        self,
        modalities: Sequence[str],
        presence_counts: Mapping[str, float] | Iterable[float] | None = None,
        *,
        mode: Mode = "default",
        eta: float = 0.01,
        eta_growth: float = 1.5,
        eta_every: int = 100,
        beta_min: float = 0.1,
        beta_max: float = 4.0,
    ) -> None:
        super().__init__()
        self.modalities = as_tuple(modalities) or ()
        size = len(self.modalities)
        problems = modality_problems(self.modalities or modalities, least=2)
        if not is_one_of(mode, ("default", "official")):
            problems.append(f"mode={mode!r}: pass 'default' or 'official'")
        if not is_number(eta, least=0):
            problems.append(f"eta={eta!r}: pass a finite number, 0 or more")
        if not is_number(eta_growth, above=0):
            problems.append(f"eta_growth={eta_growth!r}: pass a finite number above 0")
        if not is_int(eta_every, least=1):
            problems.append(f"eta_every={eta_every!r}: pass a number of epochs, 1 or more")
        if not is_number(beta_min, above=0, most=1) or not is_number(beta_max, least=1):
            problems.append(f"beta_min={beta_min!r}, beta_max={beta_max!r}: need 0 < min <= 1 <= max")
        self.presence_counts: Tensor | None = None
        if presence_counts is not None:
            counts, found = values_by_modality(presence_counts, self.modalities)
            if not found and not all(is_number(count, above=0) for count in counts):
                found = [f"got {counts}, need positive numbers; leave out a modality that nobody has"]
            problems += [f"presence_counts: {problem}" for problem in found]
        raise_problems(problems, what="PreferenceEstimator")
        if presence_counts is not None:
            self.presence_counts = torch.tensor([float(count) for count in counts], dtype=torch.float64)
        self.mode = mode
        self.eta_initial, self.eta_growth, self.eta_every = float(eta), float(eta_growth), int(eta_every)
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)
        self.epoch = 0
        self.samples_seen = 0
        self._growths = 0
        self._warned_empty = False
        self._beta = torch.ones(size, dtype=torch.float64)
        self._sums = torch.zeros(size, dtype=torch.float64)
        self._counts = torch.zeros(size, dtype=torch.float64)
        self._skipped = torch.zeros(size, dtype=torch.float64)

    @property
    def beta(self) -> Tensor:
        """Current weights (M,), float64, on the device of the last distances; a copy."""
        return self._beta.clone()

    @property
    def eta(self) -> float:
        """Step size that was used last; before the end of the first epoch, the initial one."""
        return float(self.eta_initial * self.eta_growth**self._growths)

    @torch.no_grad()
    def relative_preference(self, distance: Tensor, presence: Tensor) -> Tensor:
        """Return RP (B, M) of every sample: 1 - D / mean of the sample's available distances.

        Args:
            distance: (B, M) floating point, prototype distance per sample and modality.
            presence: (B, M) bool, True = present. Rows that are all False raise if the tensor is on the CPU.

        Returns:
            (B, M) of at least float32: 0 where a modality is absent or its distance not finite, for a sample
            with a single available modality, and for a sample whose distances are all zero.

        Raises:
            InputError: wrong shape or dtype, or a sample without any modality.
        """
        distance, _, usable = usable_distances(distance, presence, self.modalities)
        available = usable.sum(1, keepdim=True)
        mean = distance.sum(1, keepdim=True) / available.clamp(min=1)
        defined = usable & (available > 1) & (mean > 0)
        return torch.where(defined, 1 - distance / torch.where(mean > 0, mean, 1), 0)

    @torch.no_grad()
    def gate(self, distance: Tensor, presence: Tensor) -> Tensor:
        """Return omega (B, M) bool: True where a modality lags behind and its prototypes are distilled.

        False wherever a modality is absent or its distance is not finite. Arguments and errors as in
        :meth:`relative_preference`.
        """
        preference = self.relative_preference(distance, presence)
        if self.mode == "default":
            return preference < 0
        _, _, usable = usable_distances(distance, presence, self.modalities)
        return (preference.sum(0) < 0) & usable

    @torch.no_grad()
    def update(self, distance: Tensor, presence: Tensor) -> None:
        """Add one batch to the sums of the running epoch; arguments and errors as in :meth:`relative_preference`."""
        distance, presence, finite = usable_distances(distance, presence, self.modalities)
        usable = finite
        if self.mode == "default":
            alone = presence.sum(1, keepdim=True) == 1
            usable = finite & ~(alone & (distance == 0))
        self._move(distance.device)
        self._sums = self._sums + distance.to(self._sums.dtype).sum(0)
        self._counts = self._counts + usable.to(self._counts.dtype).sum(0)
        self._skipped = self._skipped + (presence & ~finite).to(self._counts.dtype).sum(0)
        self.samples_seen += distance.shape[0]

    @torch.no_grad()
    def end_epoch(self, *, update_beta: bool = True) -> EpochReport:
        """Close the epoch: update beta from its distances, reset the sums, return what was found.

        With ``torch.distributed`` initialised every process must call this, once per epoch: the sums and
        counts of all of them are added in a single all-reduce.

        Args:
            update_beta: False leaves beta and eta alone (warm-up epochs) and only reports.

        Returns:
            The :class:`EpochReport` of the epoch. An empty epoch leaves beta as it is, has counts of zero and
            warns once.

        Raises:
            UsageError: in every process, when they do not close the same epoch of the same modalities.
        """
        sums, counts, skipped, samples = self._totals()
        if update_beta and self.epoch % self.eta_every == 0:
            self._growths += 1
        measured = counts > 0
        divisor = counts
        if self.mode == "official" and self.presence_counts is not None:
            divisor = self.presence_counts
        mean = torch.where(measured, sums / divisor, math.nan)
        preference = torch.zeros_like(sums)
        empty = not bool(measured.any())
        if not empty and mean[measured].sum() > 0:
            preference[measured] = 1 - mean[measured] / mean[measured].mean()
            if update_beta:
                self._beta = self._step(preference, measured).to(self._beta)
        report = (self._beta.to("cpu", torch.float64, copy=True), preference, mean, counts)
        ended, self.epoch, self.samples_seen = self.epoch, self.epoch + 1, 0
        self._sums, self._counts, self._skipped = (torch.zeros_like(self._sums) for _ in range(3))
        if empty:
            # Last, so that the epoch is closed where warnings are errors, too.
            self._warn_empty(ended, samples)
        return EpochReport(self.modalities, ended, *report, eta=self.eta, skipped=skipped)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the state as tensors, numbers and names, readable with ``torch.load(weights_only=True)``.

        In the middle of an epoch the sums are those of this process only; save between epochs, or save one
        state per process. What was skipped so far is not part of it.
        """
        return {
            "modalities": list(self.modalities),
            "epoch": self.epoch,
            "eta_growths": self._growths,
            "samples_seen": self.samples_seen,
            "beta": self._beta.to("cpu", copy=True),
            "sums": self._sums.to("cpu", copy=True),
            "counts": self._counts.to("cpu", copy=True),
        }

    def set_extra_state(self, state: Any) -> None:
        """Restore what :meth:`get_extra_state` returned.

        Raises:
            ConfigError: it is not such a state, or belongs to other modalities; nothing has been changed.
        """
        ours = self.get_extra_state()
        names = state.get("modalities", ours["modalities"]) if isinstance(state, Mapping) else None
        if names is not None and list(names) != ours["modalities"]:
            problems = [f"it was saved for {list(names)}, this estimator has {ours['modalities']}"]
        else:
            problems = state_problems(ours, state)
        if not problems:
            problems = [
                f"{name} is not finite" for name in ("beta", "sums", "counts") if not state[name].isfinite().all()
            ]
        raise_problems(problems, what="state of PreferenceEstimator")
        self.epoch, self._growths = state["epoch"], state["eta_growths"]
        self.samples_seen = state["samples_seen"]
        self._beta = state["beta"].to(self._beta, copy=True)
        self._sums = state["sums"].to(self._sums, copy=True)
        self._counts = state["counts"].to(self._counts, copy=True)
        self._skipped = torch.zeros_like(self._sums)

    def extra_repr(self) -> str:
        """Return what ``print(module)`` shows."""
        return f"modalities={self.modalities}, mode={self.mode!r}, epoch={self.epoch}"

    def _step(self, preference: Tensor, measured: Tensor) -> Tensor:
        """Return the new weights (M,) on the CPU; ``preference`` is 0 where nothing was measured."""
        beta = self._beta.to("cpu", torch.float64, copy=True)
        moved = (beta - self.eta * preference).clamp(self.beta_min, self.beta_max)
        if self.mode == "official":
            return 2 * moved / moved.square().sum().sqrt()
        left = len(beta) - float(beta[~measured].square().sum())
        # A state from official mode has another norm and may leave too little: grant at least the floor.
        left = max(left, int(measured.sum()) * self.beta_min**2)
        beta[measured] = project_beta(moved[measured], norm=math.sqrt(left), minimum=self.beta_min)
        return beta

    def _move(self, device: torch.device) -> None:
        if self._sums.device != device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._beta, self._sums, self._counts, self._skipped = (
                tensor.to(device, dtype) for tensor in (self._beta, self._sums, self._counts, self._skipped)
            )

    def _totals(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return sums, counts and skipped distances, (M,) each, and the number of samples, over all processes."""
        samples = self._sums.new_tensor([self.samples_seen])
        stacked = torch.cat((self._sums, self._counts, self._skipped, samples))
        totals = all_reduce_sum(stacked, f"epoch {self.epoch} of {self.modalities}")
        sums, counts, skipped = totals[:-1].view(3, -1).clone()
        return sums, counts, skipped, int(totals[-1])

    def _warn_empty(self, epoch: int, samples: int) -> None:
        if self._warned_empty:
            return
        self._warned_empty = True
        cause = (
            f"none of its {samples} samples gave a usable distance, because each had a single modality or "
            "a distance that was not finite; check the presence table, and the features for overflow"
            if samples
            else "no distance was recorded; compute the PASSION loss of every training batch before "
            "end_epoch(), in train() mode, and call end_epoch() once per epoch"
        )
        warn_user(f"end_epoch() closed epoch {epoch}, which was empty: {cause}. Beta stays as it is.")

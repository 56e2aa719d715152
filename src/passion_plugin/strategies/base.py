"""What a balancing rule is to the engine, and the rule that does nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from passion_plugin.balance import Preference
from passion_plugin.config import PassionConfig
from passion_plugin.errors import UsageError, raise_problems
from passion_plugin.logged import flat
from passion_plugin.modulation import tied_encoders
from passion_plugin.parallel import summed
from passion_plugin.rarity import Rarity
from passion_plugin.segments import Segment
from passion_plugin.state_checks import cpu_copies, entry_problems

if TYPE_CHECKING:
    from passion_plugin.backbone.binding import BoundBackbone
    from passion_plugin.objective import LossTerms
    from passion_plugin.preference import PreferenceEstimator
    from passion_plugin.step import TrainingStep

__all__ = ["Plain", "Strategy"]


class Strategy:
    """A balancing rule beside the user's own loss; subclass it and pass an object as ``strategy=``.

    In each step the engine asks for :meth:`segments`, runs those passes, and calls :meth:`loss` and
    :meth:`factors` once the target is known. Factors are put on the gradients of the encoders through hooks that
    are removed before the next forward, so that they act within the backward of their own step only. PASSION is
    such a rule too: :class:`~passion_plugin.strategies.PassionRule`.

    Attributes:
        name: by which the registry knows it, and its state is recognised.
        students: ``"none"``: there are no passes; ``"scored"``: their predictions are only looked at and carry
            no gradient; ``"trained"``: :meth:`loss` differentiates through them.
        scales_encoders: whether :meth:`factors` gives any; then every encoder needs parameters of its own.
        needs_features: whether the step has to keep what the encoders put out.
        noise: add Gaussian noise of its own standard deviation to each gradient that is scaled.
        teacher_sees_all: whether :meth:`loss` or :meth:`factors` take the teacher for the prediction from all that
            students may see; then ``passion_presence`` may not name more than the mask lets through.
        neutral: the factor that changes nothing.
        stateful: attributes that travel in the state: numbers, tensors, or dicts of tensors.
        taken: whether a model trains with this object; it cannot serve another one.
        modalities: M names, known from :meth:`prepare` on.
        config: of the engine, known from :meth:`prepare` on.
        rarity: how rare each modality is in the training set, known from :meth:`prepare` on.
        epoch: number of epochs that ended.
        preference: relative preference of PASSION; None where a rule keeps none.
    """

    name: ClassVar[str]
    students: ClassVar[Literal["none", "scored", "trained"]] = "none"
    scales_encoders: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    teacher_sees_all: ClassVar[bool] = False
    neutral: ClassVar[float] = 1.0
    stateful: ClassVar[tuple[str, ...]] = ("epoch", "_sums", "_counts")
    noise: bool = False
    taken: bool = False
    modalities: tuple[str, ...] = ()
    epoch: int = 0
    preference: PreferenceEstimator | None = None

    def prepare(self, modalities: Sequence[str], config: PassionConfig, rarity: Rarity) -> None:
        """Get ready for one model; called once, before training.

        Args:
            modalities: M names, in mask-column order.
            config: of the engine; other rules use what is not about PASSION, such as ``backend``.
            rarity: how rare each modality is in the training set.

        Raises:
            UsageError: this object serves another model already.
        """
        if self.taken:
            raise UsageError(f"this {type(self).__name__} belongs to another model; make one for each model")
        self.modalities = tuple(modalities)
        self.config, self.rarity = config, rarity
        self._sums = torch.zeros(len(self.modalities))
        self._counts = torch.zeros(len(self.modalities))
        self._skipped = torch.zeros(len(self.modalities))
        self._last_factors: dict[str, Tensor] = {}

    def check(self, bound: BoundBackbone) -> None:
        """Check that the rule can work on this backbone.

        Raises:
            ConfigError: it cannot.
        """
        problems = []
        if (self.scales_encoders or self.needs_features) and not bound.encoders:
            problems.append("it needs BackboneSpec.encoders, and none were given or found")
        if self.students == "scored" and bound.spec.students == "heads":
            problems.append(
                "the students of this backbone are heads, which this rule would score without ever training them"
            )
        raise_problems(problems, what=f"strategy {self.name!r}")
        if self.scales_encoders:
            tied_encoders(bound.encoders, what=f"strategy {self.name!r} needs encoders of their own")

    def segments(self, presence: Tensor) -> list[Segment]:
        """Return which subsets of modalities to predict from, in which rows; none by default.

        Args:
            presence: bool (B, M) on the CPU.
        """
        return []

    def loss(self, step: TrainingStep, labels: Tensor) -> Tensor | None:
        """Return a scalar to add to the user's loss, or None.

        Args:
            step: teacher, students, presence and, if asked for, features of this step.
            labels: (B, *spatial) or masks (B, K, *spatial), checked, at the resolution of the user's target.
        """
        return None

    def factors(self, step: TrainingStep, labels: Tensor) -> dict[str, Tensor]:
        """Return a scalar for each encoder whose gradient is to be scaled in the backward of this step.

        Args:
            step: as for :meth:`loss`, which is called first.
            labels: as for :meth:`loss`.

        Returns:
            By modality; no entry where the batch says nothing about a modality, which then gets no hook. Where
            there is any, they take the place of :meth:`standing_factors`.
        """
        return {}

    def standing_factors(self) -> dict[str, Tensor]:
        """Return factors that no batch changes: they act from the end of the forward on, before the target is known.

        Returns:
            By modality, a scalar each.
        """
        return {}

    def record(self, factors: Mapping[str, Tensor]) -> None:
        """Add the factors of one step to what :meth:`end_epoch` reports; nothing waits for the device."""
        for name, factor in factors.items():
            column = self.modalities.index(name)
            self._last_factors[name] = factor.detach()
            self._sums = self._sums.to(factor.device)
            self._sums[column] += factor.detach()
            self._counts[column] += 1

    def skip(self, active: Tensor, scores: Tensor) -> None:
        """Count the scores that are not finite, for what :meth:`end_epoch` reports; nothing waits for the device.

        Args:
            active: bool (B, M), where there is a score.
            scores: (B, M).
        """
        broken = active.to(scores.device) & ~scores.isfinite()
        self._skipped = self._skipped.to(scores.device) + broken.sum(0)

    def step_metrics(self) -> dict[str, float]:
        """Return numbers of the last step for a logger; only here the device is waited for.

        Returns:
            ``"factor/<modality>"``, of the last step in which the modality had one. Never NaN.
        """
        return flat({"factor": {name: float(factor) for name, factor in self._last_factors.items()}})

    def loss_terms(self) -> LossTerms:
        """Return the terms of PASSION of the last step.

        Raises:
            UsageError: there are none, of this rule at all or yet.
        """
        raise UsageError(f"strategy {self.name!r} has no terms of PASSION; see what end_epoch() returns")

    def end_epoch(self) -> Preference:
        """End the epoch and report it; to be called on every process, whose sums are added.

        Returns:
            ``beta`` is the mean factor of each modality over the steps of the epoch that had one (:attr:`neutral`
            where none had), ``counts`` their number; a rule that updates weights reports those instead.
        """
        stacked = torch.cat([tensor.cpu().double() for tensor in (self._sums, self._counts, self._skipped)])
        sums, counts, skipped = summed(stacked, f"epoch {self.epoch} of {self.name} on {self.modalities}").chunk(3)
        mean = torch.where(counts > 0, sums / counts, self.neutral)
        unknown = torch.full_like(mean, math.nan)
        report = Preference(self.modalities, self.epoch, mean, torch.zeros_like(mean), unknown, counts, skipped=skipped)
        self.epoch += 1
        self._sums, self._counts, self._skipped = (torch.zeros(len(self.modalities)) for _ in range(3))
        return report

    def settings(self) -> dict[str, Any]:
        """Return the options that decide what is learned, by name: a state saved with others is refused.

        Returns:
            Numbers, texts and None only.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed training needs, on the CPU."""
        return cpu_copies({key: getattr(self, key) for key in self.stateful})

    def state_problems(self, state: Any) -> list[str]:
        """Say why :meth:`load_state_dict` would refuse a state, a sentence each; nothing is changed."""
        return entry_problems(self.state_dict(), state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ConfigError: it is not such a state; nothing has been changed.
        """
        raise_problems(self.state_problems(state), what=f"state of strategy {self.name!r}")
        for key in self.stateful:
            setattr(self, key, cpu_copies(state[key]))

    def addon_entries(self) -> dict[str, Any]:
        """Return what the add-on state of a model holds of its rule: by which name, and :meth:`state_dict`."""
        return {"strategy": self.name, "strategy_state": self.state_dict()}

    def addon_problems(self, state: Mapping[str, Any]) -> list[str]:
        """Say why :meth:`load_addon_entries` would refuse a state.

        Args:
            state: the whole add-on state, of a model with the same rule and modalities.
        """
        return [f"strategy_state: {problem}" for problem in self.state_problems(state.get("strategy_state"))]

    def load_addon_entries(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`addon_entries` returned.

        Args:
            state: the whole add-on state, of a model with the same rule.

        Raises:
            ConfigError: it is not such a state.
        """
        self.load_state_dict(state["strategy_state"])


class Plain(Strategy):
    """No rule at all: training on the imperfect data as it is (IDT), the baseline of every comparison.

    The encoders of missing modalities see blank images as with every other rule; there is no student and no loss
    beside the user's own.

    Example:
        >>> Plain().segments(torch.ones(1, 2, dtype=torch.bool))
        []
    """

    name = "plain"

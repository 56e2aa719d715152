"""PASSION itself: both distillations, and the preference that gates and weights them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from passion_plugin.balance import Preference
from passion_plugin.config import HOW_PASSES_RUN, PassionConfig
from passion_plugin.errors import ConfigError, PassionWarning, UsageError
from passion_plugin.logged import flat
from passion_plugin.modulation import tied_encoders
from passion_plugin.objective import LossTerms, UnimodalLoss, passion_objective
from passion_plugin.preference import PreferenceEstimator
from passion_plugin.rarity import Rarity
from passion_plugin.segments import Segment
from passion_plugin.strategies.base import Strategy
from passion_plugin.students import active_students, random_subsets

if TYPE_CHECKING:
    from passion_plugin.backbone.binding import BoundBackbone
    from passion_plugin.step import TrainingStep

__all__ = ["PassionRule"]

_STEPS_WITHOUT_EPOCH = 1000


class PassionRule(Strategy):
    r"""PASSION (Shi et al., ACM MM 2024, arXiv:2407.14796); what runs unless ``strategy=`` names another rule.

    .. math::
        L = \frac1B \sum_b \sum_m w_m \left(
            \lambda_{pix}\, \beta_m K_{bm} + \lambda_{proto}\, \omega_{bm} P_{bm} + u\, S_{bm} \right)

    The terms and what weighs them are :func:`~passion_plugin.objective.passion_objective`, the gate :math:`\omega`
    and the weights :math:`\beta` are :class:`~passion_plugin.PreferenceEstimator`. All hyper-parameters are in the
    :class:`~passion_plugin.PassionConfig` of the engine; during its warm-up epochs :math:`\beta` rests.

    Args:
        unimodal_loss: :math:`S`, the segmentation loss of the students: a function that takes logits (n, K, *spatial)
            and labels (n, *spatial), or masks for sigmoid outputs, and gives one number for all n samples or one for
            each. The loss that the network is trained with anyway is a good choice. None: weighted cross-entropy plus
            Dice, as in the published code.

    Raises:
        ConfigError: ``unimodal_loss`` cannot be called.

    Attributes:
        preference: the estimator, from :meth:`prepare` on.
    """

    name = "passion"
    students = "trained"
    preference: PreferenceEstimator

    def __init__(self, unimodal_loss: UnimodalLoss | None = None) -> None:
        if unimodal_loss is not None and not callable(unimodal_loss):
            raise ConfigError(f"unimodal_loss must be a function of logits and labels, got {unimodal_loss!r}")
        self.unimodal_loss = unimodal_loss

    def prepare(self, modalities: Sequence[str], config: PassionConfig, rarity: Rarity) -> None:
        """Get ready for one model; see :meth:`Strategy.prepare`."""
        if self.unimodal_loss is not None and config.mode == "official":
            raise ConfigError("unimodal_loss goes with mode='default': the official mode has the published code's loss")
        if config.subset_students and len(modalities) < 3:
            raise ConfigError(
                f"subset_students=True needs three modalities or more, and there are {tuple(modalities)}: leave it out"
            )
        if config.subset_students and "subset" in modalities:
            raise ConfigError(
                "subset_students=True reports its students under the name 'subset', which a modality has: rename that"
            )
        super().prepare(modalities, config, rarity)
        self.preference = PreferenceEstimator(
            self.modalities,
            rarity.counts,
            mode=config.mode,
            eta=config.eta,
            eta_growth=config.eta_growth,
            eta_every=config.eta_every,
            beta_min=config.beta_min,
            beta_max=config.beta_max,
        )
        self._terms: LossTerms | None = None
        self._steps_since_epoch = 0
        self._reminded = False

    @property
    def epoch(self) -> int:  # type: ignore[override]
        """Number of epochs that ended; the preference counts them, and may be restored without this object."""
        return self.preference.epoch

    @property
    def warming_up(self) -> bool:
        """Whether this is a warm-up epoch."""
        return self.epoch < self.config.warmup_epochs

    def check(self, bound: BoundBackbone) -> None:
        """Check that mode and modulation suit the backbone; see :meth:`Strategy.check`."""
        if self.config.mode == "official" and bound.spec.outputs == "sigmoid":
            raise ConfigError(
                "mode='official' is only defined for softmax outputs, which the published code has; use "
                "mode='default' with sigmoid outputs"
            )
        if self.config.subset_students and bound.spec.students == "heads":
            raise ConfigError(
                "subset_students=True needs a backbone that can predict from several modalities, and the students of "
                "this one are heads on single encoders: leave it out"
            )
        if self.config.modulation == "encoder":
            if not bound.encoders:
                raise ConfigError("modulation='encoder' needs BackboneSpec.encoders, and none were given or found")
            tied_encoders(bound.encoders)

    def segments(self, presence: Tensor) -> list[Segment]:
        """Every modality alone, in the rows that have it beside another one; and random subsets where asked for."""
        alone = Segment.singles(self.modalities, active_students(presence))
        if not self.config.subset_students:
            return alone
        return alone + Segment.subsets(self.modalities, random_subsets(presence))

    def loss(self, step: TrainingStep, labels: Tensor) -> Tensor:
        """Return the objective, and count the distances for the end of the epoch."""
        terms = self.terms(step, labels)
        beta = self.preference.beta.to(terms.pixel.device)
        rarity = self.rarity.weights if self.config.rarity_weights else (1.0,) * len(self.modalities)
        loss = passion_objective(terms, rarity, beta, self.config, warming_up=self.warming_up)
        # Counted when nothing can fail any more: an exception leaves the preference as it was.
        self.preference.update(terms.distance, step.presence.to(terms.distance.device))
        self._terms = terms.detached()
        self._remind_of_epochs()
        return loss

    def terms(self, step: TrainingStep, labels: Tensor) -> LossTerms:
        """Return the terms of a step before any weight: what a variation of the method overrides.

        Students see one modality each, those of ``subset_students`` several.

        Args:
            step: as for :meth:`loss`.
            labels: as for :meth:`loss`.
        """
        return step.terms(labels, self.config, self.preference, self.unimodal_loss)

    def standing_factors(self) -> dict[str, Tensor]:
        """Return beta where ``modulation="encoder"`` puts it on encoders; it only changes with the epoch."""
        if self.config.modulation != "encoder":
            return {}
        return dict(zip(self.modalities, self.preference.beta, strict=True))

    def loss_terms(self) -> LossTerms:
        """Return the terms of the last step; see :meth:`Strategy.loss_terms`."""
        if self._terms is None:
            raise UsageError("there are no loss terms yet: call forward in training mode, then passion_loss(target)")
        return self._terms

    def step_metrics(self) -> dict[str, float]:
        """Return the means of the terms of the last step, such as ``"pixel/flair"``; see :meth:`LossTerms.means`."""
        return {} if self._terms is None else flat(self._terms.means())

    def end_epoch(self) -> Preference:
        """Update the relative preference and beta; to be called on every process, whose sums are added."""
        self._steps_since_epoch = 0
        return self.preference.end_epoch(update_beta=not self.warming_up)

    def settings(self) -> dict[str, Any]:
        """Return the configuration, without how passes are run; see :meth:`Strategy.settings`."""
        chosen = {key: value for key, value in self.config.as_dict().items() if key not in HOW_PASSES_RUN}
        own = self.unimodal_loss
        if own is None:
            return chosen
        return {**chosen, "unimodal_loss": getattr(own, "__qualname__", type(own).__name__)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the preference, which is all there is; see :meth:`Strategy.state_dict`."""
        return self.preference.get_extra_state()

    def state_problems(self, state: Any) -> list[str]:
        """Say what is wrong with a state of the preference; see :meth:`Strategy.state_problems`."""
        return self.preference.state_problems(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; see :meth:`Strategy.load_state_dict`."""
        self.preference.set_extra_state(state)

    def addon_entries(self) -> dict[str, Any]:
        """Return the preference without a name: that is how states look that have no ``strategy``."""
        return {"preference": self.state_dict()}

    def addon_problems(self, state: Mapping[str, Any]) -> list[str]:
        """Say why the preference would be refused; see :meth:`Strategy.addon_problems`."""
        return [f"preference: {problem}" for problem in self.state_problems(state.get("preference"))]

    def load_addon_entries(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`addon_entries` returned; see :meth:`Strategy.load_addon_entries`."""
        self.load_state_dict(state["preference"])

    def _remind_of_epochs(self) -> None:
        self._steps_since_epoch += 1
        samples, seen = self.rarity.samples, self.preference.samples_seen
        # An epoch may be many passes over a small training set.
        late = self._steps_since_epoch > _STEPS_WITHOUT_EPOCH and (samples is None or seen > 2 * samples)
        if late and not self._reminded:
            self._reminded = True
            warnings.warn(
                f"end_epoch() has not been called for {seen} samples in {self._steps_since_epoch} steps: beta and the "
                "relative preference are only updated there. Call it once after each epoch",
                PassionWarning,
                stacklevel=4,
            )

"""Strategy: what a balancing rule is to the engine; Plain, which does nothing, and PASSION itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from passion_plugin.backbone import BackboneAdapter, StudentInput, active_students, random_subsets
from passion_plugin.config import HOW_PASSES_RUN, PassionConfig
from passion_plugin.errors import ConfigError, UsageError, raise_problems, warn_user
from passion_plugin.training._distributed import all_reduce_sum
from passion_plugin.training._frequencies import ModalityFrequencies
from passion_plugin.training._gradient_scaling import check_untied_encoders
from passion_plugin.training._metrics import flatten
from passion_plugin.training._objective import LossTerms, UnimodalLoss, passion_objective
from passion_plugin.training._preference import EpochReport, PreferenceEstimator
from passion_plugin.training._state import cpu_copies, state_problems
from passion_plugin.training._step import TrainingStep


class Strategy:
    """A balancing rule in addition to the user's own loss; subclass it and pass an object as ``strategy=``.

    In each step the engine asks for :meth:`student_inputs`, runs those passes, and calls :meth:`loss` and
    :meth:`factors` once the target is known. Factors are put on the gradients of the encoders through hooks that
    are removed before the next forward, so that they act within the backward of their own step only. PASSION is
    such a rule too: :class:`~passion_plugin.training.PassionRule`.

    Attributes:
        name: by which the registry knows it, and its state is recognised.
        students: ``"none"``: there are no passes; ``"scored"``: their predictions are only looked at and carry
            no gradient; ``"trained"``: :meth:`loss` differentiates through them.
        scales_encoders: whether :meth:`factors` gives any; then every encoder needs parameters of its own.
        needs_features: whether the step has to keep what the encoders return.
        noise: add Gaussian noise of its own standard deviation to each gradient that is scaled.
        needs_full_teacher: whether :meth:`loss` or :meth:`factors` take the teacher for the prediction from all that
            students may see; then ``passion_presence`` may not name more than the mask lets through.
        default_factor: the factor that changes nothing.
        state_keys: attributes that travel in the state: numbers, tensors, or dicts of tensors.
        modalities: M names, known from :meth:`prepare` on.
        config: of the engine, known from :meth:`prepare` on.
        frequencies: how rare each modality is in the training set, known from :meth:`prepare` on.
        epoch: number of epochs that ended.
        preference: relative preference of PASSION; None where a rule keeps none.
    """

    name: ClassVar[str]
    students: ClassVar[Literal["none", "scored", "trained"]] = "none"
    scales_encoders: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    needs_full_teacher: ClassVar[bool] = False
    default_factor: ClassVar[float] = 1.0
    state_keys: ClassVar[tuple[str, ...]] = ("epoch", "_sums", "_counts")
    noise: bool = False
    _in_use: bool = False
    modalities: tuple[str, ...] = ()
    epoch: int = 0
    preference: PreferenceEstimator | None = None

    def prepare(self, modalities: Sequence[str], config: PassionConfig, frequencies: ModalityFrequencies) -> None:
        """Get ready for one model; called once, before training.

        Args:
            modalities: M names, in mask-column order.
            config: of the engine; other rules use what is not about PASSION, such as ``backend``.
            frequencies: how rare each modality is in the training set.

        Raises:
            UsageError: this object serves another model already.
        """
        if self._in_use:
            raise UsageError(f"this {type(self).__name__} belongs to another model; make one for each model")
        self.modalities = tuple(modalities)
        self.config, self.frequencies = config, frequencies
        self._sums, self._counts, self._skipped = (torch.zeros(len(self.modalities)) for _ in range(3))
        self._last_factors: dict[str, Tensor] = {}

    def check(self, adapter: BackboneAdapter) -> None:
        """Check that the rule can work on this backbone.

        Raises:
            ConfigError: it cannot.
        """
        problems = []
        if (self.scales_encoders or self.needs_features) and not adapter.encoders:
            problems.append("it needs BackboneSpec.encoders, and none were given or found")
        if self.students == "scored" and adapter.spec.students == "heads":
            problems.append(
                "the students of this backbone are heads, which this rule would score without ever training them"
            )
        raise_problems(problems, what=f"strategy {self.name!r}")
        if self.scales_encoders:
            check_untied_encoders(adapter.encoders, what=f"strategy {self.name!r} needs encoders of their own")

    def student_inputs(self, presence: Tensor) -> list[StudentInput]:
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

        Arguments as for :meth:`loss`, which is called first.

        Returns:
            By modality; no entry where the batch says nothing about a modality, which then gets no hook. Where
            there is any, they take the place of :meth:`constant_factors`.
        """
        return {}

    def constant_factors(self) -> dict[str, Tensor]:
        """Return factors that no batch changes, a scalar by modality: they act before the target is known."""
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
        return flatten({"factor": {name: float(factor) for name, factor in self._last_factors.items()}})

    def loss_terms(self) -> LossTerms:
        """Return the terms of PASSION of the last step.

        Raises:
            UsageError: there are none, of this rule at all or yet.
        """
        raise UsageError(f"strategy {self.name!r} has no terms of PASSION; see what end_epoch() returns")

    def end_epoch(self) -> EpochReport:
        """End the epoch and report it; to be called on every process, whose sums are added.

        Returns:
            ``beta`` is the mean factor of each modality over the steps of the epoch that had one, or
            :attr:`default_factor`; ``counts`` is their number. A rule that updates weights reports those instead.
        """
        stacked = torch.cat([tensor.cpu().double() for tensor in (self._sums, self._counts, self._skipped)])
        totals = all_reduce_sum(stacked, f"epoch {self.epoch} of {self.name} on {self.modalities}")
        sums, counts, skipped = totals.chunk(3)
        mean = torch.where(counts > 0, sums / counts, self.default_factor)
        nothing, unknown = torch.zeros_like(mean), torch.full_like(mean, math.nan)
        report = EpochReport(self.modalities, self.epoch, mean, nothing, unknown, counts, skipped=skipped)
        self.epoch += 1
        self._sums, self._counts, self._skipped = (torch.zeros(len(self.modalities)) for _ in range(3))
        return report

    def settings(self) -> dict[str, Any]:
        """Return the options that decide what is learned, by name; loading a state saved with others warns.

        Returns:
            Numbers, texts and None only.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed training needs, on the CPU."""
        return cpu_copies({key: getattr(self, key) for key in self.state_keys})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ConfigError: it is not such a state; nothing has been changed.
        """
        raise_problems(state_problems(self.state_dict(), state), what=f"state of strategy {self.name!r}")
        for key in self.state_keys:
            setattr(self, key, cpu_copies(state[key]))


class Plain(Strategy):
    """No rule at all: training on the imperfect data as it is (IDT), the baseline of every comparison.

    The encoders of missing modalities see blank images as with every other rule; there is no student and no loss
    in addition to the user's own.

    Example:
        >>> Plain().student_inputs(torch.ones(1, 2, dtype=torch.bool))
        []
    """

    name = "plain"


_STEPS_WITHOUT_EPOCH = 1000


class PassionRule(Strategy):
    r"""PASSION (Shi et al., ACM MM 2024, arXiv:2407.14796); what runs unless ``strategy=`` names another rule.

    .. math::
        L = \frac1B \sum_b \sum_m w_m \left(
            \lambda_{pix}\, \beta_m K_{bm} + \lambda_{proto}\, \omega_{bm} P_{bm} + u\, S_{bm} \right)

    The terms and what weighs them are :func:`~passion_plugin.training.passion_objective`, the gate :math:`\omega`
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

    def prepare(self, modalities: Sequence[str], config: PassionConfig, frequencies: ModalityFrequencies) -> None:
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
        super().prepare(modalities, config, frequencies)
        self.preference = PreferenceEstimator(
            self.modalities,
            frequencies.counts,
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

    def check(self, adapter: BackboneAdapter) -> None:
        """Check that mode and modulation suit the backbone; see :meth:`Strategy.check`."""
        if self.config.mode == "official" and adapter.spec.outputs == "sigmoid":
            raise ConfigError(
                "mode='official' is only defined for softmax outputs, which the published code has; use "
                "mode='default' with sigmoid outputs"
            )
        if self.config.subset_students and adapter.spec.students == "heads":
            raise ConfigError(
                "subset_students=True needs a backbone that can predict from several modalities, and the students of "
                "this one are heads on single encoders: leave it out"
            )
        if self.config.modulation == "encoder":
            if not adapter.encoders:
                raise ConfigError("modulation='encoder' needs BackboneSpec.encoders, and none were given or found")
            check_untied_encoders(adapter.encoders)

    def student_inputs(self, presence: Tensor) -> list[StudentInput]:
        """Every modality alone, in the rows that have it and another one; and random subsets where asked for."""
        alone = StudentInput.singles(self.modalities, active_students(presence))
        if not self.config.subset_students:
            return alone
        return alone + StudentInput.subsets(self.modalities, random_subsets(presence))

    def loss(self, step: TrainingStep, labels: Tensor) -> Tensor:
        """Return the objective, and count the distances for the end of the epoch."""
        terms = self.terms(step, labels)
        beta = self.preference.beta.to(terms.pixel.device)
        rarity = self.frequencies.weights if self.config.rarity_weights else (1.0,) * len(self.modalities)
        loss = passion_objective(terms, rarity, beta, self.config, warming_up=self.warming_up)
        # Counted when nothing can fail any more: an exception leaves the preference as it was.
        self.preference.update(terms.distance, step.presence.to(terms.distance.device))
        self._terms = terms.detached()
        self._remind_of_epochs()
        return loss

    def terms(self, step: TrainingStep, labels: Tensor) -> LossTerms:
        """Return the terms of a step before any weight: what a variation of the method overrides.

        Arguments as for :meth:`loss`. Students see one modality each, those of ``subset_students`` several.
        """
        return step.terms(labels, self.config, self.preference, self.unimodal_loss)

    def constant_factors(self) -> dict[str, Tensor]:
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
        return {} if self._terms is None else flatten(self._terms.means())

    def end_epoch(self) -> EpochReport:
        """Update the relative preference and beta; to be called on every process, whose sums are added."""
        self._steps_since_epoch = 0
        return self.preference.end_epoch(update_beta=not self.warming_up)

    def settings(self) -> dict[str, Any]:
        """Return the configuration, without how passes are run; see :meth:`Strategy.settings`."""
        chosen = {key: value for key, value in self.config.as_dict().items() if key not in HOW_PASSES_RUN}
        own = self.unimodal_loss
        return chosen if own is None else {**chosen, "unimodal_loss": _name_of(own)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the preference, which is all there is; see :meth:`Strategy.state_dict`."""
        return self.preference.get_extra_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; see :meth:`Strategy.load_state_dict`."""
        self.preference.set_extra_state(state)

    def _remind_of_epochs(self) -> None:
        self._steps_since_epoch += 1
        samples, seen = self.frequencies.samples, self.preference.samples_seen
        # An epoch may be many passes over a small training set.
        late = self._steps_since_epoch > _STEPS_WITHOUT_EPOCH and (samples is None or seen > 2 * samples)
        if late and not self._reminded:
            self._reminded = True
            warn_user(
                f"end_epoch() has not been called for {seen} samples in {self._steps_since_epoch} steps: beta and the "
                "relative preference are only updated there. Call it once after each epoch"
            )


def check_strategy(strategy: Any, config: PassionConfig) -> Strategy:
    """Return a strategy, after checking that it does not ignore what ``config`` says.

    Raises:
        ConfigError: it is no object of a subclass of :class:`Strategy`, or ``config`` is about PASSION, which does not
            run.
    """
    if not isinstance(strategy, Strategy):
        hint = "; pass an object such as OGMGE(), not its class" if isinstance(strategy, type) else ""
        raise ConfigError(f"strategy must be an object of a subclass of Strategy, got {strategy!r}{hint}")
    if not isinstance(strategy, PassionRule):
        ignored = [
            f"{field.name}={getattr(config, field.name)!r} is about PASSION, which does not run here: leave it out"
            for field in fields(config)
            if field.name not in HOW_PASSES_RUN and getattr(config, field.name) != field.default
        ]
        raise_problems(ignored, what=f"config= together with strategy {strategy.name!r}")
    return strategy


def _name_of(function: Any) -> str:
    """Name a function so that two different ones have different names: all lambdas of a module are ``<lambda>``."""
    if isinstance(function, functools.partial):
        return f"{_name_of(function.func)}{function.args}{function.keywords}"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    line = f":{code.co_firstlineno}" if code is not None and "<lambda>" in name else ""
    return f"{getattr(function, '__module__', '')}.{name}{line}"

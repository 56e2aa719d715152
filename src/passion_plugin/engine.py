"""Passion: one training step from forward to loss, and the only place that knows the order of things."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from passion_plugin.addon_state import addon_state, load_addon_state
from passion_plugin.backbone.binding import BoundBackbone
from passion_plugin.backbone.calls import BackboneCall
from passion_plugin.backbone.settle import check_setup, example_call, example_heads, initial_spec, settled_backbone
from passion_plugin.backbone.spec import BackboneSpec
from passion_plugin.claims import claim, refuse_claimed, release
from passion_plugin.config import PassionConfig
from passion_plugin.errors import ConfigError, UsageError
from passion_plugin.heads import refuse_late_heads
from passion_plugin.logged import epoch_metrics
from passion_plugin.modulation import EncoderModulation
from passion_plugin.notices import Notices
from passion_plugin.objective import LossTerms, differentiable
from passion_plugin.overrides import one_at_a_time
from passion_plugin.parallel import check_heads
from passion_plugin.plain_values import members
from passion_plugin.preference import Preference, PreferenceEstimator
from passion_plugin.rarity import Rarity
from passion_plugin.step import TrainingStep
from passion_plugin.strategies.base import Strategy
from passion_plugin.strategies.registry import resolve

__all__ = ["Passion"]


class Passion:
    """The engine: runs students beside the backbone and turns what they say into a loss.

    Use :meth:`attach` to put it on a backbone without wrapping it, or
    :class:`~passion_plugin.PassionWrapper`, which is a thin module around it.

    Args:
        backbone: any multi-encoder segmentation module. Never edited.
        modalities: M >= 2 names, in mask-column order.
        presence: which training sample has what: a PresenceTable or a bool array (N, M).
        missing_rates: instead of ``presence``: the missing rate of each modality.
        spec: how to talk to the backbone; the name of a preset; or None to choose a preset by the structure
            of the class, or else to detect it with the first training batch.
        config: hyper-parameters; the defaults when None.
        strategy: another balancing rule to run in place of PASSION: a name or an object of
            :mod:`passion_plugin.strategies`; None for PASSION as ``config`` says.
        example_input: images to detect and check the spec with at once instead of at the first batch. Needed
            when students turn out to be heads, which must exist before the optimizer is made.
        example_mask: the mask that goes with it.

    Raises:
        ConfigError: listing what is wrong with names, rates, spec or strategy.
        BackboneError: the example shows that the backbone cannot be used.
        InputError: the example does not fit the arguments that the spec names.
        UsageError: the backbone has an engine already.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        modalities: Sequence[str],
        presence: Any = None,
        missing_rates: Any = None,
        spec: BackboneSpec | str | None = None,
        config: PassionConfig | None = None,
        strategy: Strategy | str | None = None,
        example_input: Any = None,
        example_mask: Any = None,
    ) -> None:
        self.backbone = backbone
        self.modalities = members(modalities) or (modalities,)
        self.strategy, self.config = resolve(strategy, config)
        if example_mask is not None and example_input is None:
            raise ConfigError("example_mask was given without example_input")
        check_setup(backbone, self.modalities, self.config)
        refuse_claimed(backbone)
        self.rarity = Rarity.of(self.modalities, presence, missing_rates)
        self.heads = nn.ModuleList()
        self.bound: BoundBackbone | None = None
        self.previous_forward: Any = None
        self._attached = False
        self._disabled = 0
        self._detached = False
        self._inside: dict[str, int] = {}  # "thread": the one that is in a step
        self._modulation = EncoderModulation()
        self._step: TrainingStep | None = None
        self._notices = Notices()
        self._last_epoch: Preference | None = None
        self._spec = initial_spec(backbone, self.modalities, spec)
        if self._spec is not None:
            # Wrong names are reported here and now; the behaviour of the backbone when data is there.
            BoundBackbone(backbone, self._spec, self.modalities)
        if example_input is not None:
            call = example_call(backbone, example_input, example_mask, self._spec)
            self.bound = settled_backbone(backbone, call, self.modalities, self._spec, self.config)
        self.strategy.prepare(self.modalities, self.config, self.rarity)
        if self.bound is not None:
            self.strategy.check(self.bound)
            if self._needs_heads(self.bound):
                self.heads = example_heads(self.bound, call)
        claim(backbone, self)

    @classmethod
    def attach(cls, backbone: nn.Module, **options: Any) -> Passion:
        """Put the engine on a backbone without wrapping it.

        The backbone keeps its class, its checkpoints and its name; until :meth:`detach` its ``forward`` also
        takes ``passion_target=`` and ``passion_presence=``.

        Args:
            backbone: any multi-encoder segmentation module.
            **options: as for :class:`Passion`.

        Returns:
            The engine; its :meth:`loss`, :meth:`end_epoch` and :meth:`detach` are what a training loop needs.
        """
        passion = cls(backbone, **options)
        passion.previous_forward = backbone.__dict__.get("forward")
        passion._attached = True
        if passion.bound is not None:
            passion.bound.forward = passion._bare_forward
        backbone.__dict__["forward"] = passion._attached_forward
        return passion

    @property
    def preference(self) -> PreferenceEstimator | None:
        """The relative preference and beta of PASSION; None while another strategy runs, which keeps no such thing."""
        return self.strategy.preference

    def detach(self) -> nn.Module:
        """Take everything off the backbone: no hook, no attribute, no changed ``forward`` is left.

        A ``forward`` that somebody put around ours since then is theirs and stays; ours in it only passes calls on.

        Returns:
            The backbone.
        """
        self._modulation.remove()
        release(self.backbone, self)
        if self._attached and self.backbone.__dict__.get("forward") == self._attached_forward:
            if self.previous_forward is None:
                self.backbone.__dict__.pop("forward", None)
            else:
                self.backbone.__dict__["forward"] = self.previous_forward
        self._attached, self._detached, self._step = False, True, None
        return self.backbone

    # torch.compiler.disable would import the compiler with this module, which takes seconds.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def train_forward(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        target: Tensor | None = None,
        presence: Tensor | None = None,
    ) -> Any:
        """Run the backbone and, where there is something to distil, its students.

        Args:
            args: positional arguments of the backbone.
            kwargs: keyword arguments of the backbone.
            target: when given, the loss is computed at once.
            presence: bool (B, M), what may be looked at: needed when the backbone takes no mask, and for
                students of modalities that the mask hides from the teacher (a random subset of complete data).

        Returns:
            What the backbone returns; with ``target`` a pair of that and the loss.

        Raises:
            UsageError: another thread is in a step of this model, or somebody took away the hooks of the last one.
            InputError: the batch or the target is not usable.
        """

        def run() -> Any:
            dropped, self._step = self._step is not None, None  # Its graphs must be gone before the next ones come.
            self._modulation.finish()
            if dropped:
                self._notices.dropped_step()
            check_heads(self.heads, self.backbone, single_call=target is not None)
            call = BackboneCall(args, dict(kwargs))
            bound = self._settle(call)
            step = TrainingStep.run(bound, call, presence, self.config, self.heads, self.strategy)
            self._modulation.install(bound.encoders, self.strategy.standing_factors())
            self._step = step
            return step.raw if target is None else (step.raw, self.loss(target))

        # Nobody comes back for a step that failed, not even where only the target was refused.
        return one_at_a_time(self._inside, run, on_error=self._drop_step)

    def loss(self, target: Tensor) -> Tensor:
        """Return the loss of the last forward, to be added to the user's own.

        Args:
            target: integer labels (B, *spatial), or one-hot (B, K, *spatial); for sigmoid outputs region masks
                (B, K, *spatial).

        Returns:
            A scalar tensor with gradient.

        Raises:
            UsageError: there was no training forward since the last call, it was in another thread, or somebody took
                its hooks away.
            InputError: the target has the wrong shape, dtype or content.
        """
        if self._step is None:
            raise UsageError(
                "there is nothing to compute a loss from: call forward in training mode with gradients enabled "
                "first, and passion_loss once after each forward"
            )
        step, strategy = self._step, self.strategy
        labels = step.labels(target)
        # Only a target that was refused may be handed over again: after this the distances have been counted.
        self._step = None
        try:
            self._modulation.check()
            loss = strategy.loss(step, labels)
            factors = strategy.factors(step, labels)
            if factors:
                strategy.record(factors)
                self._modulation.install(step.bound.encoders, factors, noise=strategy.noise)
        except BaseException:
            self._drop_step()
            raise
        return differentiable(step.with_idle(torch.zeros((), device=labels.device) if loss is None else loss))

    def loss_terms(self) -> LossTerms:
        """Return the terms of the last step, per sample and modality.

        Raises:
            UsageError: no loss has been computed yet, or another strategy runs, which has no such terms.
        """
        return self.strategy.loss_terms()

    def metrics(self) -> dict[str, float]:
        """Return numbers of the last step and the last epoch for a logger; only here the device is waited for.

        Returns:
            Names are stable: ``"<quantity>/<modality>"`` and ``"epoch"``. What does not exist (yet, in this step, or
            for this strategy) is left out, and nothing is NaN. All but the epoch's are of this process.

            * last step of PASSION, means over the samples that have the term: ``pixel``, ``prototype``, ``distance``,
              ``unimodal`` (see :class:`LossTerms`), with ``subset_students`` of ``subset`` too; ``gate``, open gates;
            * last step of a strategy that scales encoders or terms: ``factor``;
            * last epoch that ended since the model was made: ``beta`` (for such a strategy its mean factor, 1 where
              it had none), ``relative_preference`` and ``epoch_distance`` where measured, ``skipped`` where comparisons
              were left out because they were not finite, and ``epoch``, from 0.
        """
        last = {} if self._last_epoch is None else epoch_metrics(self._last_epoch)
        return {**self.strategy.step_metrics(), **last}

    def end_epoch(self) -> Preference:
        """Update the preference, or what the strategy keeps; to be called once per epoch, on every rank."""
        self._modulation.check()
        self._last_epoch = self.strategy.end_epoch()
        self._notices.skipped(self._last_epoch)
        return self._last_epoch

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Make the backbone train as if this library were not there, while the context is open.

        Call backward for the last step before entering: ``modulation="encoder"`` and strategies that scale encoders
        let go of the parameters here.
        """
        self._modulation.remove()
        self._disabled += 1
        try:
            yield
        finally:
            self._disabled -= 1

    def bare_result(self, result: Any, target: Tensor | None) -> Any:
        """Return a result without students the way a call with or without ``passion_target`` expects it."""
        if torch.is_grad_enabled() and not self._inside:
            # Whatever is differentiated from here on is none of our business.
            self._modulation.remove()
        if target is None:
            return result
        return result, torch.zeros((), device=target.device)

    def should_distil(self, training: bool) -> bool:
        """Whether a forward has anything to do beyond calling the backbone."""
        # A pass of this thread may come by here again; another thread must not get a step without students unawares.
        inside = self._inside and self._inside.get("thread") == threading.get_ident()
        return training and not (self._detached or self._disabled or inside) and torch.is_grad_enabled()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is ours and nothing of the backbone; refused where heads are sharded."""
        return addon_state(self.modalities, self.heads, self.strategy)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ConfigError: it is of another format, modalities, strategy or settings, or incomplete. Nothing was changed.
        """
        load_addon_state(state, self.modalities, self.heads, self.strategy)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running step: graph tensors can be neither copied nor pickled."""
        return {**self.__dict__, "_step": None, "_inside": {}, "_modulation": EncoderModulation()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take charge of the backbone that was copied or unpickled with this engine."""
        self.__dict__.update(state)
        if not self._detached:
            claim(self.backbone, self)

    def _drop_step(self) -> None:
        self._step = None
        self._modulation.remove()

    def _settle(self, call: BackboneCall) -> BoundBackbone:
        """Return the backbone with its spec, after detection and checks on the first call."""
        if self.bound is None:
            forward = self._bare_forward if self._attached else None
            bound = settled_backbone(self.backbone, call, self.modalities, self._spec, self.config, forward)
            self.strategy.check(bound)
            if self._needs_heads(bound):
                refuse_late_heads()
            self.bound = bound
        return self.bound

    def _needs_heads(self, bound: BoundBackbone) -> bool:
        return self.strategy.students == "trained" and bound.spec.students == "heads"

    def _bare_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.previous_forward is not None:
            return self.previous_forward(*args, **kwargs)
        return type(self.backbone).forward(self.backbone, *args, **kwargs)

    def _attached_forward(
        self,
        *args: Any,
        passion_target: Tensor | None = None,
        passion_presence: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.should_distil(self.backbone.training):
            return self.train_forward(args, kwargs, passion_target, passion_presence)
        return self.bare_result(self._bare_forward(*args, **kwargs), passion_target)

"""Passion: one training step from forward to loss, and the only place that knows the order of things."""

from __future__ import annotations

import warnings
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
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError, ConfigError, PassionWarning, UsageError
from passion_plugin.logged import epoch_metrics
from passion_plugin.modulation import EncoderModulation
from passion_plugin.objective import LossTerms
from passion_plugin.parallel import check_heads
from passion_plugin.preference import Preference, PreferenceEstimator
from passion_plugin.rarity import Rarity
from passion_plugin.settings import members
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
        if has_engine(backbone):
            raise UsageError("this backbone has a Passion engine already; unwrap() or detach() that first")
        if example_mask is not None and example_input is None:
            raise ConfigError("example_mask was given without example_input")
        check_setup(backbone, self.modalities, self.config)
        self.rarity = Rarity.of(self.modalities, presence, missing_rates)
        self.heads = nn.ModuleList()
        self.bound: BoundBackbone | None = None
        self.previous_forward: Any = None
        self._attached = False
        self._disabled = 0
        self._detached = False
        self._inside = False
        self._modulation = EncoderModulation()
        self._step: TrainingStep | None = None
        self._warned = False
        self._last_epoch: Preference | None = None
        self._spec = initial_spec(backbone, self.modalities, spec)
        if self._spec is not None:
            # Wrong names are reported here and now; the behaviour of the backbone when data is there.
            BoundBackbone(backbone, self._spec, self.modalities)
        if example_input is not None:
            call = example_call(example_input, example_mask, self._spec)
            self.bound = settled_backbone(backbone, call, self.modalities, self._spec, self.config)
        self.strategy.prepare(self.modalities, self.config, self.rarity)
        if self.bound is not None:
            self.strategy.check(self.bound)
            if self._needs_heads(self.bound):
                self.heads = example_heads(self.bound, call)

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

        Returns:
            The backbone.
        """
        self._modulation.remove()
        if self._attached:
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
        """
        if self._step is not None:
            self._step = None
            self._warn_of_dropped_step()
        self._modulation.remove()
        check_heads(self.heads, self.backbone, single_call=target is not None)
        call = BackboneCall(args, dict(kwargs))
        self._inside = True
        try:
            bound = self._settle(call)
            step = TrainingStep.run(bound, call, presence, self.config, self.heads, self.strategy)
            self._modulation.install(bound.encoders, self.strategy.standing_factors())
        finally:
            self._inside = False
        self._step = step
        if target is None:
            return step.raw
        try:
            return step.raw, self.loss(target)
        finally:
            # In this style nobody comes back for the step, not even when the target was refused.
            self._step = None

    def loss(self, target: Tensor) -> Tensor:
        """Return the loss of the last forward, to be added to the user's own.

        Args:
            target: integer labels (B, *spatial), or one-hot (B, K, *spatial); for sigmoid outputs region masks
                (B, K, *spatial).

        Returns:
            A scalar tensor with gradient.

        Raises:
            UsageError: there was no training forward since the last call.
            InputError: the target has the wrong shape, dtype or content.
        """
        if self._step is None:
            raise UsageError(
                "there is nothing to compute a loss from: call forward in training mode with gradients enabled "
                "first, and passion_loss once after each forward"
            )
        step, strategy = self._step, self.strategy
        labels = step.labels(target)
        loss = strategy.loss(step, labels)
        factors = strategy.factors(step, labels)
        if factors:
            strategy.record(factors)
            self._modulation.install(step.bound.encoders, factors, noise=strategy.noise)
        self._step = None
        if loss is None:
            loss = torch.zeros((), device=labels.device)
        loss = step.with_idle(loss)
        # A batch without students still gives something to call backward on.
        return loss if loss.requires_grad or not torch.is_grad_enabled() else loss.requires_grad_()

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
              ``unimodal`` (see :class:`LossTerms`) and ``gate``, the fraction of open gates;
            * last step of a strategy that scales encoders or terms: ``factor``;
            * last epoch that ended since the model was made: ``beta`` (for such a strategy its mean factor, 1 where
              it had none), ``relative_preference`` and ``epoch_distance`` where measured, and ``epoch``, from 0.
        """
        last = {} if self._last_epoch is None else epoch_metrics(self._last_epoch)
        return {**self.strategy.step_metrics(), **last}

    def end_epoch(self) -> Preference:
        """Update the preference, or what the strategy keeps; to be called once per epoch, on every rank."""
        self._last_epoch = self.strategy.end_epoch()
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
        off = self._detached or self._disabled or self._inside
        return training and not off and torch.is_grad_enabled()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is ours and nothing of the backbone."""
        return addon_state(self.modalities, self.heads, self.strategy)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ConfigError: it is of another format, modalities, strategy or settings, or incomplete. Nothing was changed.
        """
        load_addon_state(state, self.modalities, self.heads, self.strategy)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running step: graph tensors can be neither copied nor pickled."""
        return {**self.__dict__, "_step": None, "_modulation": EncoderModulation()}

    def _settle(self, call: BackboneCall) -> BoundBackbone:
        """Return the backbone with its spec, after detection and checks on the first call."""
        if self.bound is None:
            forward = self._bare_forward if self._attached else None
            bound = settled_backbone(self.backbone, call, self.modalities, self._spec, self.config, forward)
            self.strategy.check(bound)
            if self._needs_heads(bound):
                raise BackboneError(
                    "this backbone cannot let a single modality through, so its students are heads with "
                    "parameters of their own, which must exist before the optimizer is made: pass "
                    "example_input= and example_mask= when you wrap it"
                )
            self.bound = bound
        return self.bound

    def _needs_heads(self, bound: BoundBackbone) -> bool:
        return self.strategy.students == "trained" and bound.spec.students == "heads"

    def _warn_of_dropped_step(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "forward ran again before passion_loss of the previous forward was taken; that step is dropped. "
                "Use passion_disabled() for passes that are not trained on",
                PassionWarning,
                stacklevel=4,
            )

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


def has_engine(backbone: Any) -> bool:
    """Whether ``backbone`` is a wrapper, or has an engine attached."""
    attributes = getattr(backbone, "__dict__", {})
    owner = getattr(attributes.get("forward"), "__self__", None)
    return isinstance(owner, Passion) or isinstance(attributes.get("passion"), Passion)

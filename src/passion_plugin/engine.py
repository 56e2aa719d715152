"""Passion: one training step from forward to loss, and the only place that knows the order of things."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passion_plugin.backbone.binding import BoundBackbone
from passion_plugin.backbone.calls import BackboneCall
from passion_plugin.backbone.masks import check_mask
from passion_plugin.backbone.settle import example_heads, initial_spec, settled_backbone
from passion_plugin.backbone.spec import BackboneSpec
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError, ConfigError, InputError, PassionWarning, UsageError, raise_problems
from passion_plugin.modulation import EncoderModulation
from passion_plugin.objective import LossTerms, collect_terms, passion_objective, unimodal_loss
from passion_plugin.passes import Prediction, fused_pass
from passion_plugin.preference import Preference, PreferenceEstimator
from passion_plugin.rarity import Rarity
from passion_plugin.students import Student, active_students, run_students
from passion_plugin.targets import prepare_target

__all__ = ["Passion"]

_STATE_FORMAT = 1
_STEPS_WITHOUT_EPOCH = 1000


@dataclass(frozen=True)
class _Step:
    """What a forward leaves for the loss.

    Attributes:
        teacher: the fused prediction, without gradient.
        version: of the teacher's logits, to notice an in-place change by the user.
        students: predictions that saw one modality.
        presence: bool (B, M) on the CPU.
        active: bool (B, M) on the CPU, where a student ran.
        unimodal: predictions of the backbone's own uni-modal decoder, one per modality, or None.
    """

    teacher: Prediction
    version: int
    students: list[Student]
    presence: Tensor
    active: Tensor
    unimodal: Sequence[Tensor] | None


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
        example_input: images to detect and check the spec with at once instead of at the first batch. Needed
            when students turn out to be heads, which must exist before the optimizer is made.
        example_mask: the mask that goes with it.

    Raises:
        ConfigError: listing what is wrong with names, rates or spec.
        BackboneError: the example shows that the backbone cannot be used.
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
        example_input: Any = None,
        example_mask: Any = None,
    ) -> None:
        self.backbone = backbone
        self.modalities = (modalities,) if isinstance(modalities, str) else tuple(modalities)
        self.config = config if config is not None else PassionConfig()
        raise_problems(_problems_of(backbone, self.modalities, self.config), what="Passion")
        self.rarity = Rarity.of(self.modalities, presence, missing_rates)
        self.preference = PreferenceEstimator(
            self.modalities,
            self.rarity.counts,
            mode=self.config.mode,
            eta=self.config.eta,
            eta_growth=self.config.eta_growth,
            eta_every=self.config.eta_every,
            beta_min=self.config.beta_min,
            beta_max=self.config.beta_max,
        )
        self.heads = nn.ModuleDict()
        self.bound: BoundBackbone | None = None
        self._previous_forward: Any = None
        self._attached = False
        self._enabled = True
        self._inside = False
        self._modulation = EncoderModulation()
        self._step: _Step | None = None
        self._terms: LossTerms | None = None
        self._steps_since_epoch = 0
        self._warned: set[str] = set()
        self._spec = initial_spec(backbone, self.modalities, spec)
        if self._spec is not None:
            # Wrong names are reported here and now; the behaviour of the backbone when data is there.
            BoundBackbone(backbone, self._spec, self.modalities)
        if example_input is not None:
            self._settle_with_example(example_input, example_mask)

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

        Raises:
            UsageError: another engine is attached already.
        """
        if isinstance(getattr(backbone.__dict__.get("forward"), "__self__", None), Passion):
            raise UsageError("a Passion engine is attached to this backbone already; detach() it first")
        passion = cls(backbone, **options)
        passion._previous_forward = backbone.__dict__.get("forward")
        passion._attached = True
        if passion.bound is not None:
            passion.bound.forward = passion._bare_forward
        backbone.__dict__["forward"] = passion._attached_forward
        return passion

    def detach(self) -> nn.Module:
        """Take everything off the backbone: no hook, no attribute, no changed ``forward`` is left.

        Returns:
            The backbone.
        """
        self._modulation.remove()
        if self._attached:
            if self._previous_forward is None:
                self.backbone.__dict__.pop("forward", None)
            else:
                self.backbone.__dict__["forward"] = self._previous_forward
        self._attached = self._enabled = False
        self._step = None
        return self.backbone

    @torch.compiler.disable
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
            self._warn_once(
                "forward ran again before passion_loss of the previous forward was taken; that step is dropped. "
                "Use passion_disabled() for passes that are not trained on"
            )
        call = BackboneCall(args, dict(kwargs))
        self._inside = True
        try:
            bound = self._settle(call)
            available = _availability(bound, call, presence)
            bound.check_finite(call, available)
            fused = fused_pass(bound, call, available, keep_random_state=self.config.share_random_state)
            active = active_students(available)
            students = run_students(bound, fused, active, self.config, self.heads)
            if self.config.modulation == "encoder":
                self._modulation.install(bound.encoders, dict(zip(self.modalities, self.preference.beta, strict=True)))
        finally:
            self._inside = False
        own = bound.spec.unimodal_outputs if self.config.mode == "official" else None
        self._step = _Step(
            teacher=fused.prediction.detached(),
            version=fused.prediction.logits._version,
            students=students,
            presence=available,
            active=active,
            unimodal=None if own is None else own(fused.raw),
        )
        if target is None:
            return fused.raw
        return fused.raw, self.loss(target)

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
        step, bound = self._step, self.bound
        if step is None or bound is None:
            raise UsageError(
                "there is nothing to compute a loss from: call forward in training mode with gradients enabled "
                "first, and passion_loss once after each forward"
            )
        logits, outputs = step.teacher.logits, bound.spec.outputs
        if logits._version != step.version:
            raise UsageError(
                "the prediction was changed in place between forward and passion_loss, and the teacher with it; "
                "use an out-of-place operation on what forward returned"
            )
        labels = prepare_target(target, logits.shape[1], len(logits), logits.ndim - 2, outputs).to(logits.device)
        self._step = None
        presence, active = step.presence.to(logits.device), step.active.to(logits.device)
        matrices = collect_terms(step.teacher, step.students, labels, self.modalities, self.config, outputs)
        if step.unimodal is not None:
            columns = [unimodal_loss(_log(p), labels, self.config, outputs) for p in step.unimodal]
            matrices["unimodal"] = torch.where(presence, torch.stack(columns, dim=1), 0)
        distance = matrices["distance"]
        terms = LossTerms(
            self.modalities,
            **matrices,
            gate=self.preference.gate(distance, presence) & active,
            active=active,
            supervised=active if step.unimodal is None else presence,
        )
        self.preference.update(distance, presence)
        self._terms = terms.detached()
        self._remind_of_epochs()
        return passion_objective(
            terms,
            self.rarity.weights,
            self.preference.beta.to(logits.device),
            self.config,
            warming_up=self.preference.epoch < self.config.warmup_epochs,
        )

    def loss_terms(self) -> LossTerms:
        """Return the terms of the last step, per sample and modality.

        Raises:
            UsageError: no loss has been computed yet.
        """
        if self._terms is None:
            raise UsageError("there are no loss terms yet: call forward in training mode, then passion_loss(target)")
        return self._terms

    def end_epoch(self) -> Preference:
        """Update the preference; to be called once per epoch, on every rank."""
        self._steps_since_epoch = 0
        return self.preference.end_epoch(update_beta=self.preference.epoch >= self.config.warmup_epochs)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Make the backbone train as if this library were not there, while the context is open."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def bare_result(self, result: Any, target: Tensor | None) -> Any:
        """Return a result without students the way a call with or without ``passion_target`` expects it."""
        if target is None:
            return result
        return result, torch.zeros((), device=target.device)

    def should_distil(self, training: bool) -> bool:
        """Whether a forward has anything to do beyond calling the backbone."""
        return training and self._enabled and not self._inside and torch.is_grad_enabled()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that is ours and nothing of the backbone."""
        return {
            "format": _STATE_FORMAT,
            "modalities": list(self.modalities),
            "preference": self.preference.get_extra_state(),
            "heads": self.heads.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ConfigError: it is of another format, of other modalities, or incomplete.
        """
        needed = {"format", "modalities", "preference", "heads"}
        if not isinstance(state, Mapping) or needed - set(state):
            raise ConfigError(f"not an add-on state: it must hold {sorted(needed)}")
        problems = []
        if state["format"] != _STATE_FORMAT:
            problems.append(f"format {state['format']!r}, this version reads {_STATE_FORMAT}")
        if list(state["modalities"]) != list(self.modalities):
            problems.append(f"it was saved for modalities {state['modalities']}, this model has {list(self.modalities)}")
        if set(state["heads"]) != set(self.heads.state_dict()):
            problems.append("its heads do not fit those of this model")
        raise_problems(problems, what="add-on state")
        self.heads.load_state_dict(state["heads"])
        self.preference.set_extra_state(state["preference"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running step: graph tensors can be neither copied nor pickled."""
        return {**self.__dict__, "_step": None, "_modulation": EncoderModulation()}

    def _settle(self, call: BackboneCall) -> BoundBackbone:
        """Return the backbone with its spec, after detection and checks on the first call."""
        if self.bound is None:
            forward = self._bare_forward if self._attached else None
            bound = settled_backbone(self.backbone, call, self.modalities, self._spec, self.config, forward)
            if bound.spec.students == "heads" and not self.heads:
                raise BackboneError(
                    "this backbone cannot let a single modality through, so its students are heads with "
                    "parameters of their own, which must exist before the optimizer is made: pass "
                    "example_input= and example_mask= when you wrap it"
                )
            self.bound = bound
        return self.bound

    def _settle_with_example(self, example_input: Any, example_mask: Any) -> None:
        several = isinstance(example_input, tuple) and self._spec is not None and not isinstance(self._spec.input_argument, (int, str))
        args = tuple(example_input) if several else (example_input,)
        call = BackboneCall(args if example_mask is None else (*args, example_mask), {})
        bound = settled_backbone(self.backbone, call, self.modalities, self._spec, self.config)
        if bound.spec.students == "heads":
            self.heads = example_heads(bound, call)
        self.bound = bound

    def _remind_of_epochs(self) -> None:
        self._steps_since_epoch += 1
        samples = self.rarity.samples
        seen = self.preference.samples_seen
        if (seen > 2 * samples) if samples is not None else (self._steps_since_epoch > _STEPS_WITHOUT_EPOCH):
            self._warn_once(
                f"end_epoch() has not been called for {seen} samples in {self._steps_since_epoch} steps: beta and the "
                "relative preference are only updated there. Call it once after each epoch"
            )

    def _warn_once(self, message: str) -> None:
        key = message[:20]
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, PassionWarning, stacklevel=4)

    def _bare_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._previous_forward is not None:
            return self._previous_forward(*args, **kwargs)
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


def _availability(bound: BoundBackbone, call: BackboneCall, presence: Tensor | None) -> Tensor:
    """Return bool (B, M): what may be looked at, at least what the mask of the call lets through."""
    if presence is None:
        return bound.presence_of(call)
    available = check_mask(presence, bound.batch_of(call), bound.modalities, what="passion_presence")
    if bound.has_mask(call) and bool((bound.presence_of(call) & ~available).any()):
        raise InputError("the mask lets modalities through that passion_presence says are missing")
    return available


def _log(probabilities: Tensor) -> Tensor:
    """Turn probabilities into logits of the same softmax."""
    return probabilities.float().clamp(min=torch.finfo(torch.float32).tiny).log()


def _problems_of(backbone: Any, modalities: tuple[str, ...], config: Any) -> list[str]:
    problems = []
    if not isinstance(backbone, nn.Module):
        problems.append(f"the backbone must be a torch.nn.Module, got {type(backbone).__name__}")
    if len(modalities) < 2 or not all(isinstance(name, str) and name for name in modalities):
        problems.append(f"modalities must be at least two names, got {modalities!r}")
    if len(set(modalities)) != len(modalities):
        problems.append(f"modalities must be different names, got {modalities!r}")
    if not isinstance(config, PassionConfig):
        problems.append(f"config must be a PassionConfig, got {type(config).__name__}")
    return problems

"""PassionEngine: one training step from forward to loss, and the only place that knows the order of things."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from passion_plugin._validate import describe
from passion_plugin.backbone import (
    BackboneAdapter,
    BackboneCall,
    BackboneSpec,
    FusedPass,
    Skip,
    Student,
    active_students,
    fused_pass,
    has_collective_forward,
    passes_reentrant,
    reentrant_problem,
    run_students,
    with_dummy_students,
)
from passion_plugin.config import PassionConfig
from passion_plugin.detection import check_setup, example_call, example_heads, initial_spec, prepare_backbone
from passion_plugin.errors import BackboneError, ConfigError, UsageError, raise_problems, warn_user
from passion_plugin.training._checkpoint import extra_state, load_extra_state
from passion_plugin.training._distributed import check_heads
from passion_plugin.training._frequencies import ModalityFrequencies
from passion_plugin.training._gradient_scaling import EncoderGradientScaling
from passion_plugin.training._metrics import by_modality, epoch_metrics
from passion_plugin.training._objective import LossTerms, ensure_requires_grad
from passion_plugin.training._preference import EpochReport, PreferenceEstimator
from passion_plugin.training._state import state_problems
from passion_plugin.training._step import TrainingStep
from passion_plugin.training._strategy import PassionRule, Strategy, check_strategy


class PassionEngine(nn.Module):
    """Runs students next to the backbone and turns what they predict into a loss.

    Made by :class:`~passion_plugin.PassionWrapper`, where it is ``model.passion``, and by :func:`attach`. It is a
    module that holds what is ours and nothing of the backbone: the heads, where students are heads, and the state of
    the strategy. Its ``state_dict()`` is the add-on checkpoint.

    Args:
        backbone: any multi-encoder segmentation module. Never edited.
        modalities, presence, missing_rates, spec, config, strategy, example_input, example_mask: as for
            :class:`~passion_plugin.PassionWrapper`.

    Attributes:
        backbone: the module; not registered as a part of the engine.
        adapter: the backbone with its spec; None before the first batch or an example was seen.
        heads: students of a backbone that cannot predict from a single modality; else empty.

    Raises:
        ConfigError: listing what is wrong with names, rates, spec or strategy.
        BackboneError: the example shows that the backbone cannot be used.
        InputError: the example does not fit the arguments that the spec names.
        UsageError: the backbone has an engine already.
    """

    backbone: nn.Module

    def __init__(
        self,
        backbone: nn.Module,
        *,
        modalities: Sequence[str],
        presence: Any = None,
        missing_rates: Any = None,
        spec: BackboneSpec | str | None = None,
        config: PassionConfig | None = None,
        strategy: Strategy | None = None,
        example_input: Any = None,
        example_mask: Any = None,
    ) -> None:
        super().__init__()
        # Past nn.Module, which would register it: the engine holds nothing of the backbone.
        self.__dict__["backbone"] = backbone
        self.config = PassionConfig() if config is None else config
        self.modalities = check_setup(backbone, modalities, self.config)
        self.strategy = PassionRule() if strategy is None else check_strategy(strategy, self.config)
        if example_mask is not None and example_input is None:
            raise ConfigError("example_mask was given without example_input")
        _refuse_second_engine(backbone)
        self.frequencies = ModalityFrequencies.of(self.modalities, presence, missing_rates)
        self.adapter: BackboneAdapter | None = None
        self.previous_forward: Any = None
        self._attached = self._detached = self._running = False
        self._disabled = 0
        self._checked = False  # Whether a first training pass has been looked at.
        self._compared = False  # Whether students were seen to differ from their teacher.
        self._collective = False  # What that found: whether a forward is a collective call.
        self._scaling = EncoderGradientScaling()
        self._step: TrainingStep | None = None
        self._warned: set[str] = set()
        self._last_epoch: EpochReport | None = None
        self._spec = initial_spec(backbone, self.modalities, spec)
        if self._spec is not None:
            # Wrong names are reported here and now; the behaviour of the backbone when data is there.
            BackboneAdapter(backbone, self._spec, self.modalities)
        if example_input is not None:
            where = () if self._spec is None else (self._spec.input_argument, self._spec.mask_argument)
            call = example_call(backbone, example_input, example_mask, *where)
            self.adapter = prepare_backbone(backbone, call, self.modalities, self._spec, self.config)
        self.strategy.prepare(self.modalities, self.config, self.frequencies)
        self.heads = nn.ModuleList()
        if self.adapter is not None:
            self.strategy.check(self.adapter)
            if self._needs_heads(self.adapter):
                self.heads = example_heads(self.adapter, call)
        self.strategy._in_use = True

    @property
    def preference(self) -> PreferenceEstimator | None:
        """The relative preference and beta of PASSION; None while another strategy runs, which keeps no such thing."""
        return self.strategy.preference

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
            UsageError: somebody removed the hooks of the last step, or heads are not trained with the model.
            InputError: the batch or the target is not usable.
            BackboneError: the first batch shows that the backbone is not.
        """
        self._running = True
        try:
            dropped, self._step = self._step is not None, None  # Its graphs must be gone before the next ones come.
            self._scaling.check()
            self._scaling.remove()
            if dropped:
                self._warn_once(
                    "forward ran again before passion_loss of the previous forward was taken; that step is dropped. "
                    "Use model.passion.disabled() for passes that are not trained on"
                )
            check_heads(self.heads, self.backbone, single_call=target is not None)
            call = BackboneCall(args, dict(kwargs))
            adapter = self._prepared(call)
            self._step = self._run(adapter, call, presence)
            self._scaling.install(adapter.encoders, self.strategy.constant_factors())
            raw = self._step.raw
            return raw if target is None else (raw, self.loss(target))
        except BaseException:
            # Nobody comes back for a step that failed, not even where only the target was refused.
            self._step = None
            self._scaling.remove()
            raise
        finally:
            self._running = False

    def loss(self, target: Tensor) -> Tensor:
        """Return the loss of the last forward, to be added to the user's own.

        Args:
            target: integer labels (B, *spatial), or one-hot (B, K, *spatial); for sigmoid outputs region masks
                (B, K, *spatial).

        Returns:
            A scalar tensor with gradient.

        Raises:
            UsageError: there was no training forward since the last call, or somebody removed its hooks.
            InputError: the target has the wrong shape, dtype or content; the right one may still be handed over.
        """
        if self._step is None:
            raise UsageError(
                "there is nothing to compute a loss from: call forward in training mode with gradients enabled "
                "first, and passion_loss once after each forward"
            )
        step, strategy = self._step, self.strategy
        labels = step.labels(target)
        # From here on the distances are counted: the step cannot be used again.
        self._step = None
        try:
            self._scaling.check()
            loss = strategy.loss(step, labels)
            factors = strategy.factors(step, labels)
            if factors:
                strategy.record(factors)
                self._scaling.install(step.adapter.encoders, factors, noise=strategy.noise)
        except BaseException:
            self._scaling.remove()
            raise
        return ensure_requires_grad(step.with_unused(torch.zeros((), device=labels.device) if loss is None else loss))

    def loss_terms(self) -> LossTerms:
        """Return the terms of the last step, per sample and modality.

        Raises:
            UsageError: no loss has been computed yet, or another strategy runs, which has no such terms.
        """
        return self.strategy.loss_terms()

    def metrics(self) -> dict[str, float]:
        """Return numbers of the last step and the last epoch for a logger; only this waits for the device.

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

    def end_epoch(self) -> EpochReport:
        """Update the preference, or what the strategy keeps; to be called once per epoch, on every rank."""
        self._scaling.check()
        report = self._last_epoch = self.strategy.end_epoch()
        skipped = by_modality(epoch_metrics(report), "skipped")
        if skipped:
            found = ", ".join(f"{name!r}: {count:.0f}" for name, count in skipped.items())
            self._warn_once(
                f"in epoch {report.epoch} comparisons of modalities were NaN or infinite and were left out ({found}): "
                f"features or logits overflowed, or weights are NaN. What balances the modalities stays finite; the "
                f"loss of such a batch does not: let a GradScaler skip the step, or skip it where the loss is not "
                f"finite. Later epochs say so in EpochReport.skipped and metrics() only",
                key="skipped",
            )
        return report

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Make the backbone train as if this library were not there, while the context is open.

        Call backward for the last step before entering: ``modulation="encoder"`` and strategies that scale encoders
        remove their hooks here.
        """
        self._scaling.remove()
        self._disabled += 1
        try:
            yield
        finally:
            self._disabled -= 1

    def detach(self) -> nn.Module:
        """Remove everything from the backbone: no hook, no attribute, no changed ``forward`` is left.

        A ``forward`` that somebody put around ours since then is theirs and stays; ours in it only passes calls on.

        Returns:
            The backbone.
        """
        self._scaling.remove()
        if self._attached and self.backbone.__dict__.get("forward") == self._attached_forward:
            if self.previous_forward is None:
                self.backbone.__dict__.pop("forward", None)
            else:
                self.backbone.__dict__["forward"] = self.previous_forward
        self._attached, self._detached, self._step = False, True, None
        return self.backbone

    def bare_result(self, result: Any, target: Tensor | None) -> Any:
        """Return a result without students the way a call with or without ``passion_target`` expects it."""
        if torch.is_grad_enabled() and not self._running:
            # Whatever is differentiated from here on is not ours.
            self._scaling.remove()
        return result if target is None else (result, torch.zeros((), device=target.device))

    def should_distil(self, training: bool) -> bool:
        """Whether a forward has anything to do beyond calling the backbone."""
        return training and not (self._detached or self._disabled or self._running) and torch.is_grad_enabled()

    def get_extra_state(self) -> dict[str, Any]:
        """Return modalities, settings and the state of the strategy, for ``state_dict()``."""
        return extra_state(self.modalities, self.strategy)

    def set_extra_state(self, state: Any) -> None:
        """Restore what :meth:`get_extra_state` returned; warnings and errors as :func:`set_passion_state_dict`."""
        load_extra_state(state, self.modalities, self.strategy)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running step: graph tensors can be neither copied nor pickled."""
        fresh = {"_step": None, "_running": False, "_checked": False, "_scaling": EncoderGradientScaling()}
        return {**self.__dict__, **fresh}

    def _prepared(self, call: BackboneCall) -> BackboneAdapter:
        """Return the backbone with its spec, after detection and checks on the first call."""
        if self.adapter is None:
            forward = self._bare_forward if self._attached else None
            adapter = prepare_backbone(self.backbone, call, self.modalities, self._spec, self.config, forward)
            self.strategy.check(adapter)
            if self._needs_heads(adapter):
                raise BackboneError(
                    "this backbone cannot predict from a single modality, so its students are heads with parameters of "
                    "their own, which must exist before the optimizer is made: pass example_input= and example_mask= "
                    "when you wrap it"
                )
            self.adapter = adapter
        return self.adapter

    def _run(self, adapter: BackboneAdapter, call: BackboneCall, presence: Tensor | None) -> TrainingStep:
        """Run the fused pass and every student that the batch needs."""
        strategy, config, first = self.strategy, self.config, not self._checked
        available = adapter.check_batch(call, presence)
        if strategy.needs_full_teacher and adapter.has_mask(call) and not adapter.presence_of(call).equal(available):
            raise UsageError(
                f"strategy {strategy.name!r} takes the network's prediction for that from all modalities of a sample, "
                "but passion_presence names more of them than the mask lets through; leave passion_presence out"
            )
        if first:
            self._collective = has_collective_forward(adapter.backbone)
        fused = fused_pass(
            adapter,
            call,
            available,
            keep_rng_state=config.share_random_state,
            keep_features=strategy.needs_features,
            copy_features=bool(self._collective),
            skip=self._skip(adapter),
        )
        if first:
            _check_first(adapter, fused)
        students, unused = self._students(adapter, fused, available)
        self._checked = True
        if students and not self._compared:
            self._compared = _differ_from_teacher(adapter, fused, students)
        return TrainingStep(
            adapter=adapter,
            call=fused.call,
            raw=fused.raw,
            teacher=fused.prediction.detached(),
            version=fused.prediction.logits._version,
            students=students,
            presence=available,
            active=active_students(available),
            image_size=adapter.image_size(call),
            features={name: fused.features.features(name) for name in self.modalities}
            if strategy.needs_features
            else {},
            unused=unused,
        )

    def _skip(self, adapter: BackboneAdapter) -> Skip:
        wanted = adapter.spec.can_skip_encoders and self.config.skip_missing_encoders
        if self._collective and wanted is True:
            raise UsageError(
                "skip_missing_encoders=True, but a forward of this backbone waits for all processes, because it is "
                "sharded or has SyncBatchNorm layers, and each process lacks other modalities: use 'auto', which "
                "runs every encoder there"
            )
        if self._collective or not wanted:
            return "no"
        return "absent" if wanted == "auto" else "rows"

    def _students(
        self, adapter: BackboneAdapter, fused: FusedPass, available: Tensor
    ) -> tuple[list[Student], tuple[Tensor, ...]]:
        """Run the students of a batch; return them and :attr:`TrainingStep.unused`."""
        strategy, config = self.strategy, self.config
        inputs = strategy.student_inputs(available)
        is_dummy = [False] * len(inputs)
        if self._collective:
            if config.subset_students:
                raise UsageError(
                    "subset_students=True draws students anew in every process, but a forward of this backbone waits "
                    "for all processes, because it is sharded or has SyncBatchNorm layers: leave subset_students out, "
                    "or use DistributedDataParallel without SyncBatchNorm"
                )
            complete = torch.ones(1, len(self.modalities), dtype=torch.bool)
            inputs, is_dummy = with_dummy_students(inputs, strategy.student_inputs(complete))
        with torch.set_grad_enabled(strategy.students == "trained"):
            ran = run_students(adapter, fused, inputs, config, self.heads)
        students: list[Student] = []
        unused: list[Tensor] = []
        for student, dummy in zip(ran, is_dummy, strict=True):
            if dummy:
                unused += student.prediction.tensors()
            else:
                students.append(student)
        # Heads without a student in this batch would have no gradient here and one in another process.
        for modality, head in zip(self.modalities, self.heads, strict=False):
            if all(modality not in student.modalities for student in students):
                unused += head.parameters()
        return students, tuple(tensor for tensor in unused if tensor.requires_grad)

    def _needs_heads(self, adapter: BackboneAdapter) -> bool:
        return self.strategy.students == "trained" and adapter.spec.students == "heads"

    def _warn_once(self, message: str, key: str = "") -> None:
        if (key or message) not in self._warned:
            self._warned.add(key or message)
            warn_user(message)

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


def attach(backbone: nn.Module, **options: Any) -> PassionEngine:
    """Train a backbone with PASSION without wrapping it.

    The backbone keeps its class, its checkpoints and its name; until :meth:`PassionEngine.detach` its ``forward``
    also takes ``passion_target=`` and ``passion_presence=``.

    Args:
        backbone: any multi-encoder segmentation module.
        **options: as for :class:`PassionEngine`.

    Returns:
        The engine; its :meth:`~PassionEngine.loss`, :meth:`~PassionEngine.end_epoch` and
        :meth:`~PassionEngine.detach` are what a training loop needs.

    Raises:
        ConfigError, BackboneError, InputError, UsageError: as for :class:`PassionEngine`.
    """
    engine = PassionEngine(backbone, **options)
    engine.previous_forward = backbone.__dict__.get("forward")
    engine._attached = True
    if engine.adapter is not None:
        engine.adapter.forward = engine._bare_forward
    backbone.__dict__["forward"] = engine._attached_forward
    return engine


def find_engine(model: Any) -> PassionEngine:
    """Return the one engine in a model, whatever a trainer has put around it.

    Args:
        model: a :class:`PassionEngine`, a :class:`~passion_plugin.PassionWrapper`, or a module that holds a wrapper or
            a network with an attached engine: a LightningModule, what Fabric or Accelerate return, a compiled module.

    Raises:
        UsageError: there is none, or there are several.

    Example:
        >>> find_engine(nn.Linear(1, 1))
        Traceback (most recent call last):
        passion_plugin.errors.UsageError: there is no PassionWrapper in this Linear, ...
    """
    found = _engines_in(model) if isinstance(model, nn.Module) else {}
    if len(found) == 1:
        return next(iter(found))
    if found:
        names = ", ".join(map(repr, found.values()))
        raise UsageError(
            f"there are {len(found)} engines in this {type(model).__name__}: {names}; pass the one you mean"
        )
    raise UsageError(
        f"there is no PassionWrapper in this {type(model).__name__}, and no engine attached: wrap the network before "
        "the trainer gets it, or pass the wrapper or the engine itself"
    )


def get_passion_state_dict(model: Any) -> dict[str, Any]:
    """Return everything that is ours and nothing of the backbone: the ``state_dict()`` of the engine, on the CPU.

    Args:
        model: as for :func:`find_engine`.

    Returns:
        Tensors, numbers and names, readable with ``torch.load(weights_only=True)``.

    Raises:
        UsageError: there is no engine in ``model``, or there are several, or its heads are sharded.

    Example:
        >>> torch.save(get_passion_state_dict(model), "passion.pt")                            # doctest: +SKIP
        >>> set_passion_state_dict(model, torch.load("passion.pt", weights_only=True))         # doctest: +SKIP
    """
    state = _engine_of_whole_heads(model).state_dict()
    return {key: value.cpu().clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def set_passion_state_dict(model: Any, state: Mapping[str, Any]) -> None:
    """Restore what :func:`get_passion_state_dict` returned; a state that does not fit changes nothing.

    Args:
        model: as for :func:`find_engine`.
        state: that dictionary.

    Warns:
        PassionWarning: it was saved with other settings, or by another strategy, whose state is left out.

    Raises:
        UsageError: there is no engine in ``model``, or there are several, or its heads are sharded.
        ConfigError: it is no such state, or of other modalities or heads.
    """
    engine = _engine_of_whole_heads(model)
    if not isinstance(state, Mapping):
        raise ConfigError(f"the add-on state is {describe(state)}; pass what get_passion_state_dict() returned")
    found = {key.removeprefix("heads."): value for key, value in state.items() if key.startswith("heads.")}
    problems = state_problems(engine.heads.state_dict(), found)
    raise_problems([f"its heads do not fit this model: {problem}" for problem in problems], what="add-on state")
    engine.set_extra_state(state.get("_extra_state"))
    engine.heads.load_state_dict(found)


def _engines_in(model: nn.Module) -> dict[PassionEngine, str]:
    """Return the engines of all wrappers in a module and those attached to its parts, with the names of these."""
    found: dict[PassionEngine, str] = {}
    for name, module in model.named_modules():
        attached = getattr(module.__dict__.get("forward"), "__self__", None)
        engine = module if isinstance(module, PassionEngine) else attached
        if isinstance(engine, PassionEngine):
            found.setdefault(engine, name.removesuffix("passion").removesuffix("."))
    return found


def _refuse_second_engine(backbone: nn.Module) -> None:
    if any(not engine._detached for engine in _engines_in(backbone)):
        raise UsageError(
            "this backbone has a PassionEngine already; unwrap() or detach() that first. Two engines would distil the "
            "same network twice: to compare them, give each a copy.deepcopy of the backbone, made before an engine is "
            "put on it"
        )


def _engine_of_whole_heads(model: Any) -> PassionEngine:
    engine = find_engine(model)
    # Only a DTensor has full_tensor; importing its class takes a second.
    if any(hasattr(value, "full_tensor") for value in engine.heads.state_dict().values()):
        raise UsageError(
            "the heads of this model are sharded, so that each process has only a part of the add-on state: save and "
            "load the whole model with torch.distributed.checkpoint in every process (docs/checkpoints.md"
            "#distributed-checkpoints), or load the add-on state before fully_shard(model)"
        )
    return engine


def _check_first(adapter: BackboneAdapter, fused: FusedPass) -> None:
    """Check what the first training pass shows about the backbone."""
    logits = fused.prediction.logits
    if passes_reentrant((fused.raw, logits)):
        raise BackboneError(reentrant_problem())
    if adapter.spec.outputs == "softmax" and logits.ndim > 1 and logits.shape[1] == 1:
        raise BackboneError(
            f"the classifier {adapter.spec.classifier!r} gives one class, whose softmax is 1 whatever the network "
            f"says: set BackboneSpec(outputs='sigmoid') and pass region masks (B, 1, *spatial), or give it two classes"
        )


def _differ_from_teacher(adapter: BackboneAdapter, fused: FusedPass, students: Sequence[Student]) -> bool:
    """Whether students see something else than the teacher; False where the images of a batch cannot tell.

    Raises:
        BackboneError: every student has the features of the teacher, bit for bit, although the images of the
            modalities differ: there would be nothing to distil, without a word.
    """
    pairs = [(student.prediction.features, fused.prediction.rows(student.rows).features) for student in students]
    if not all(torch.equal(ours, theirs) for ours, theirs in pairs):
        return True
    rows = torch.cat([student.rows for student in students]).unique()
    dead = not any(bool(theirs.any()) for _, theirs in pairs)  # Dropout or an activation left nothing.
    if dead or not adapter.modalities_differ(adapter.rows(fused.call, rows, fused.batch)):
        return False
    raise BackboneError(
        "every student predicts from the very features of the teacher, so that nothing would be distilled: this "
        "backbone masks its images and not its features. Set BackboneSpec(students='mixed'), or 'auto' to find out"
    )

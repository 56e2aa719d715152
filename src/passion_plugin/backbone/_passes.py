"""The two kinds of passes through a backbone: the fused one, and students that see some modalities only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from passion_plugin.backbone._adapter import BackboneAdapter
from passion_plugin.backbone._calls import BackboneCall
from passion_plugin.backbone._features import FeatureCache, OutputCapture, clone_tensor
from passion_plugin.backbone._heads import feature_maps
from passion_plugin.backbone._patching import (
    ModuleState,
    get_rng_state,
    patched_forward,
    preserved_rng_state,
    set_rng_state,
)
from passion_plugin.backbone._prediction import Prediction
from passion_plugin.backbone._skipping import skipping
from passion_plugin.backbone._student_inputs import StudentInput
from passion_plugin.config import PassionConfig
from passion_plugin.errors import BackboneError, PassionError, UsageError, short

Skip = Literal["no", "absent", "rows"]
"""Where encoders of missing modalities are left out."""

# Told by class and not by words: a slot called "malloc_gate" may be missing. CUDA errors are AcceleratorError since
# PyTorch 2.8, and a plain RuntimeError before.
_OF_THE_MACHINE: tuple[type[BaseException], ...] = (
    MemoryError,
    torch.OutOfMemoryError,
    *(
        found
        for owner, name in ((torch, "AcceleratorError"), (torch.distributed, "DistError"))
        if (found := getattr(owner, name, None)) is not None
    ),
)


@dataclass(frozen=True)
class Student:
    """The prediction of the rows in which only some modalities were kept.

    Attributes:
        modalities: their names.
        rows: int64 (n,), samples of the batch, in ascending order.
        prediction: of these n samples, with gradient.
    """

    modalities: tuple[str, ...]
    rows: Tensor
    prediction: Prediction

    @property
    def modality(self) -> str:
        """Name of the only modality.

        Raises:
            ValueError: there are several.
        """
        (modality,) = self.modalities
        return modality


@dataclass(frozen=True)
class FusedPass:
    """The pass with everything that is available, and what students need of it.

    Attributes:
        call: the arguments, with absent modalities blanked.
        batch: batch size.
        raw: what the backbone returned, untouched.
        prediction: the teacher, with its gradient.
        features: encoder outputs.
        absent_features: those of one sample in which everything is absent, for mixed replay.
        state: what the modules keep on themselves; listed once for all students of the step.
    """

    call: BackboneCall
    batch: int
    raw: Any
    prediction: Prediction
    features: FeatureCache
    absent_features: FeatureCache | None = None
    state: ModuleState | None = None


def fused_pass(
    adapter: BackboneAdapter,
    call: BackboneCall,
    presence: Tensor,
    *,
    keep_rng_state: bool = False,
    keep_features: bool = False,
    copy_features: bool = False,
    skip: Skip = "no",
) -> FusedPass:
    """Run the backbone on all that is available, and capture its prediction and the features of its encoders.

    Absent modalities are blanked in the images first: a NaN that stands for "missing" would otherwise come
    back as 0 × NaN in the gradient of their encoders.

    Args:
        adapter: the backbone.
        call: the user's arguments.
        presence: bool (B, M), modalities whose content may be looked at.
        keep_rng_state: keep the random state after the last encoder.
        keep_features: record what the encoders return even if no student replays it.
        copy_features: replay copies although the backbone does not ask for them. The graph is then the same
            whichever rows a student takes, which a sharded backbone needs: it gathers parameters in backward.
        skip: leave encoders out where their modality is ``"absent"`` from the whole batch, or from single
            ``"rows"`` too.
    """
    call = adapter.blanked(call, presence)
    given = call
    if adapter.spec.students in ("rerun", "mixed"):
        # Students read the images again; a backbone that writes into them must not spoil that.
        given = adapter.with_input(call, tree_map(clone_tensor, adapter.input_of(call)))
    replayed = adapter.spec.students in ("replay", "mixed", "heads")
    features = FeatureCache(adapter.encoders, copy=adapter.spec.copy_features or copy_features)
    features.rng_state = get_rng_state() if keep_rng_state else None
    recording = features.record(features=replayed or keep_features, keep_rng_state=keep_rng_state)
    skipped = {}
    if skip != "no":
        skipped = skipping(adapter.encoders, adapter.modalities, presence, adapter.layouts, by_rows=skip == "rows")
    with patched_forward(skipped), patched_forward(recording), _captured(adapter) as captures:
        raw = adapter.run(given)
    if torch.is_grad_enabled() and replayed:
        features.check_trainable()
    state, absent = ModuleState(adapter.backbone), None
    if adapter.spec.students == "mixed":
        with preserved_rng_state(keep_rng_state):
            absent = _absent_features(adapter, call, len(presence), state)
    return FusedPass(call, len(presence), raw, _prediction(captures), features, absent, state)


def student_pass(adapter: BackboneAdapter, fused: FusedPass, student_input: StudentInput) -> Prediction:
    """Run the backbone on some modalities and rows, in student mode; buffers and attributes stay as they are."""
    modalities, rows = student_input.modalities, student_input.rows
    keep = torch.zeros(len(rows), len(adapter.modalities), dtype=torch.bool)
    keep[:, [adapter.modalities.index(modality) for modality in modalities]] = True
    call = adapter.rows(fused.call, rows, fused.batch)
    if fused.features.rng_state is not None:
        set_rng_state(fused.features.rng_state)
    if adapter.spec.students in ("replay", "mixed"):
        encoders = fused.features.replay(student_input, fused.batch, others=fused.absent_features)
    else:
        encoders = patched_forward(fused.features.no_grad_except(modalities))
    with adapter.student_mode(fused.state), encoders, _captured(adapter) as captures:
        adapter.run_masked(call, keep)
    prediction = _prediction(captures)
    if len(prediction.logits) != len(rows):
        raise BackboneError(
            f"the student of {', '.join(modalities)} was given {len(rows)} sample(s), but its prediction "
            f"has {len(prediction.logits)}{adapter.vector_hint(fused.call, fused.batch)}"
        )
    if torch.is_grad_enabled() and not prediction.features.requires_grad and _can_learn(adapter, modalities):
        raise BackboneError(
            f"the features of the student of {', '.join(modalities)} carry no gradient, so that nothing "
            f"would be distilled: reentrant activation checkpointing? Use checkpoint(..., use_reentrant=False)"
        )
    return prediction


def concatenate_students(students: Sequence[Student], name: str) -> Student:
    """Put students of different rows together, as one under another name, with the rows in ascending order.

    Raises:
        UsageError: a row has several of them.
    """
    rows, order = torch.cat([student.rows for student in students]).sort()
    if len(rows.unique()) < len(rows):
        raise UsageError("a sample can have one student of several modalities in a step, and the strategy gave it more")
    tensors = zip(*(student.prediction.tensors() for student in students), strict=True)
    joined = [torch.cat(parts) for parts in tensors]
    return Student((name,), rows, Prediction.of([each.index_select(0, order.to(each.device)) for each in joined]))


def run_students(
    adapter: BackboneAdapter,
    fused: FusedPass,
    student_inputs: Sequence[StudentInput],
    config: PassionConfig,
    heads: nn.ModuleList,
) -> list[Student]:
    """Run one student for each input, one after the other; ``heads`` are those of a spec with ``students="heads"``."""
    if adapter.spec.students == "heads":
        return [_head_student(adapter, fused, heads, student_input) for student_input in student_inputs]
    students = []
    with preserved_rng_state(config.share_random_state):
        for student_input in student_inputs:
            modalities, rows = student_input.modalities, student_input.rows
            hint = None if len(rows) == fused.batch else partial(adapter.vector_hint, fused.call, fused.batch)
            with explain_errors(f"only {', '.join(modalities)} of {len(rows)} sample(s)", hint):
                prediction = _run(adapter, fused, student_input, config)
            students.append(Student(modalities, rows, prediction))
    return students


def _run(adapter: BackboneAdapter, fused: FusedPass, student_input: StudentInput, config: PassionConfig) -> Prediction:
    if config.memory == "default":
        return student_pass(adapter, fused, student_input)

    def tensors(_: Tensor) -> tuple[Tensor, ...]:
        return student_pass(adapter, fused, student_input).tensors()

    # The argument only says on which device random states have to be kept for the second run.
    return Prediction.of(checkpoint(tensors, fused.prediction.logits.detach(), use_reentrant=False))


def _head_student(
    adapter: BackboneAdapter, fused: FusedPass, heads: nn.ModuleList, student_input: StudentInput
) -> Student:
    modality, *more = student_input.modalities
    if more:
        raise BackboneError(
            f"the students of this backbone are heads on the features of one encoder each, so that it cannot predict "
            f"from {', '.join(student_input.modalities)} together: use single modalities only"
        )
    head = heads[adapter.modalities.index(modality)]
    logits = fused.prediction.logits
    maps = feature_maps(fused.features.features(modality), logits.ndim - 2)
    rows = student_input.rows.to(logits.device)
    prediction = head([feature.index_select(0, rows) for feature in maps], size=logits.shape[2:])
    return Student(student_input.modalities, student_input.rows, prediction)


@contextmanager
def explain_errors(what: str, hint: Callable[[], str] | None = None) -> Iterator[None]:
    """Say of an exception that it comes from a pass that the user never asked for.

    What the machine raises, such as having no memory left, keeps its class and its message, which batch-size finders
    look at, and gets a note. Only for passes within forward: checkpoints recompute in backward, and stop that by an
    exception of their own.

    Args:
        what: what the pass gives to the backbone.
        hint: returns what may be wrong with it; called when something is.
    """
    try:
        yield
    except PassionError:
        raise
    except Exception as error:
        if isinstance(error, _OF_THE_MACHINE):
            # add_note() of Python 3.11 does the same.
            vars(error).setdefault("__notes__", []).append(f"while the backbone was given {what}")
            raise
        few = "more than 1 value" in str(error) or "more than 1 spatial element" in str(error)
        cause = ". Use larger batches or images, or layers without batch statistics" if few else hint() if hint else ""
        raise BackboneError(
            f"the backbone ran on the batch, but raises when it is given {what}: {short(error)}{cause}"
        ) from error


def _can_learn(adapter: BackboneAdapter, modalities: Sequence[str]) -> bool:
    """Whether these modalities can learn in front of the classifier: in their encoders, where they are known."""
    own = [module for name in modalities for module in adapter.encoders.get(name, ())]
    others = [module for name, group in adapter.encoders.items() if name not in modalities for module in group]
    others.append(adapter.classifier)
    elsewhere = {parameter for module in others for parameter in module.parameters()}
    modules = own or [adapter.backbone]
    return any(p.requires_grad for module in modules for p in module.parameters() if p not in elsewhere)


@contextmanager
def _captured(adapter: BackboneAdapter) -> Iterator[list[OutputCapture]]:
    modules = [adapter.classifier, *adapter.deep_supervision]
    captures = [OutputCapture(name) for name in (adapter.spec.classifier, *adapter.spec.deep_supervision)]
    with patched_forward(dict(zip(modules, captures, strict=True))):
        yield captures


def _prediction(captures: Sequence[OutputCapture]) -> Prediction:
    features, logits = captures[0].result()
    return Prediction(logits, features, tuple(capture.result()[1] for capture in captures[1:]))


@torch.no_grad()
def _absent_features(adapter: BackboneAdapter, call: BackboneCall, batch: int, state: ModuleState) -> FeatureCache:
    """Record what the encoders make of one sample in which every modality is absent."""
    features = FeatureCache(adapter.encoders, copy=adapter.spec.copy_features)
    nothing = torch.zeros(1, len(adapter.modalities), dtype=torch.bool)
    call = adapter.blanked(adapter.rows(call, torch.tensor([0]), batch), nothing)
    what = "one sample in which every modality is absent"
    with explain_errors(what), adapter.student_mode(state), patched_forward(features.record()):
        adapter.run_masked(call, ~nothing)
    return features


def passes_reentrant(outputs: Any) -> bool:
    """Whether the graph behind any tensor in ``outputs`` passes through reentrant activation checkpointing."""
    waiting = [leaf.grad_fn for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in node.name():
            return True
        waiting += [parent for parent, _ in node.next_functions]
    return False


def reentrant_problem(names: Sequence[str] = ()) -> str:
    """Say what is wrong and what to do; ``names`` are the modules that were seen to run without gradient."""
    around = f" around {', '.join(map(repr, names))}" if names else ""
    return (
        f"reentrant activation checkpointing{around}: what is inside runs without gradient, and again in a backward of "
        f"its own for the fused pass and every student. Features cannot be recorded there, DistributedDataParallel "
        f"refuses the repeated backward and fully_shard gets wrong gradients. Call "
        f"torch.utils.checkpoint.checkpoint(..., use_reentrant=False), which saves as much memory"
    )

"""What only passes with gradient show: encoders that are cut off, checkpointing, wrong gradients."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from passion_plugin.backbone import (
    BackboneSpec,
    FeatureCache,
    FusedPass,
    Handler,
    Prediction,
    Skip,
    StudentInput,
    fused_pass,
    passes_reentrant,
    patched_forward,
    prediction_of,
    preserved_buffers,
    reentrant_problem,
    student_pass,
)
from passion_plugin.detection._checks import equality_tolerance
from passion_plugin.detection._probe import Probe, relative_difference
from passion_plugin.detection._report import dropout_layers
from passion_plugin.detection._sandbox import reseed, same_values
from passion_plugin.errors import BackboneError

__all__ = [
    "GradientPaths",
    "gradient_difference",
    "gradient_paths",
    "moved_buffers",
    "skipping_difference",
    "student_mode_difference",
    "training_problems",
    "true_student",
]


@dataclass
class GradientPaths:
    """Where gradient does not go.

    Attributes:
        cut: encoder modules whose output carries no gradient although they could learn.
        reentrant: what is wrong with reentrant activation checkpointing, empty where there is none.
        failure: the exception of a pass in training mode.
    """

    cut: list[str] = field(default_factory=list)
    reentrant: str = ""
    failure: str = ""


def gradient_paths(probe: Probe, spec: BackboneSpec) -> GradientPaths:
    """Run the backbone in training mode with gradient, and look at what its encoders and classifier put out.

    Args:
        probe: the backbone, in a sandbox.
        spec: with encoders and classifier.
    """
    found = GradientPaths()
    # Bound as a re-run: features without gradient are to be understood here, not to raise.
    adapter = probe.bind(spec.replaced(students="rerun"))
    assert adapter.classifier is not None
    names = {
        module: name
        for modality, modules in adapter.encoders.items()
        for module, name in zip(modules, spec.encoders[modality], strict=True)
    }
    without_mode: list[nn.Module] = []
    outputs: dict[nn.Module, list[Tensor]] = defaultdict(list)

    def listen(module: nn.Module, forward: Handler, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            without_mode.append(module)
        output = forward(*args, **kwargs)
        outputs[module] += [
            leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        return output

    handlers = {module: functools.partial(listen, module) for module in (*names, adapter.classifier)}
    presence = probe.presence()
    try:
        with torch.enable_grad(), patched_forward(handlers):
            probe.backbone.train()
            reseed()
            fused = fused_pass(adapter, probe.arguments(probe.images(), presence), presence)
    except BackboneError:
        raise
    except Exception as error:
        found.failure = f"{type(error).__name__}: {error}"
        return found
    finally:
        probe.backbone.eval()
    ends = (fused.prediction.logits, prediction_of(fused.raw))
    if passes_reentrant(ends):
        named = {**names, adapter.classifier: spec.classifier}
        found.reentrant = reentrant_problem(list(dict.fromkeys(named[module] for module in without_mode)))
        return found
    for module, name in names.items():
        learns = any(parameter.requires_grad for parameter in module.parameters())
        if learns and outputs[module] and not any(leaf.requires_grad for leaf in outputs[module]):
            found.cut.append(name)
    return found


def training_problems(probe: Probe, spec: BackboneSpec) -> tuple[list[str], list[str]]:
    """Run a fused pass and every student once in training mode with gradient.

    Args:
        probe: the backbone, in a sandbox.
        spec: with ``students`` decided.

    Returns:
        Problems and warnings.
    """
    adapter = probe.bind(spec)
    presence = probe.presence()
    rows = torch.arange(probe.batch)
    try:
        with torch.enable_grad():
            probe.backbone.train()
            reseed()
            fused = fused_pass(adapter, probe.arguments(probe.images(), presence), presence)
            if not any(parameter.requires_grad for parameter in probe.backbone.parameters()):
                return [], ["no parameter requires gradient: there is nothing to train"]
            if spec.students != "heads":
                student_pass(adapter, fused, StudentInput(probe.modalities[:1], rows))
    except BackboneError as error:
        return [f"in training mode: {error}"], []
    except Exception as error:
        return [], [f"a pass in training mode raised {type(error).__name__}: {error}"]
    finally:
        probe.backbone.eval()
    return [], []


def gradient_difference(probe: Probe, spec: BackboneSpec) -> float:
    """Return the largest relative difference between the gradient of a student and that of a true run.

    Equal outputs are not enough: a checkpointed encoder runs again in backward, when nothing is replayed any
    more. Training mode decides, since networks may checkpoint in training only; evaluation mode does where students
    and true runs differ in training for another reason, such as noise.

    Args:
        probe: the backbone, in a sandbox.
        spec: with ``students`` decided.
    """
    with _training_mode(probe.backbone):
        differences = _gradient_differences(probe, spec) if _runs(probe, spec) else [None]
    if None in differences:
        differences = _gradient_differences(probe, spec)
    return max([0.0, *(math.inf if found is None else found for found in differences)])


def student_mode_difference(probe: Probe, spec: BackboneSpec, light: BackboneSpec) -> float:
    """Return the relative difference that light mode makes to the gradient of a true run in training mode.

    A checkpointed decoder runs again in backward, when light mode is over.

    Args:
        probe: the backbone, in a sandbox.
        spec: how to talk to it.
        light: the same with light mode.
    """
    presence, student_input = probe.presence(), _whole_batch(probe, probe.modalities[0])
    parameters = [parameter for parameter in probe.backbone.parameters() if parameter.requires_grad]
    with _training_mode(probe.backbone):
        if not _runs(probe, spec):
            return 0.0
        with torch.enable_grad():
            reference, student = (true_student(probe, how, presence, student_input).logits for how in (spec, light))
            return _gradient_apart(probe, student, reference, parameters) or 0.0


def moved_buffers(probe: Probe, spec: BackboneSpec) -> list[str]:
    """Return the names of the buffers that the backward of a student changes in training mode.

    Buffers rest while a student runs forward. What is checkpointed runs again in backward.

    Args:
        probe: the backbone, in a sandbox.
        spec: with ``students`` decided.
    """
    if spec.students == "heads":
        return []
    adapter, presence = probe.bind(spec), probe.presence()
    parameters = [parameter for parameter in probe.backbone.parameters() if parameter.requires_grad]
    with _training_mode(probe.backbone):
        try:
            reseed()
            # Without gradient, so that backward ends at what is replayed: the bare network runs that again too.
            fused = fused_pass(adapter, probe.arguments(probe.images(), presence), presence)
            with torch.enable_grad():
                student = student_pass(adapter, fused, _whole_batch(probe, probe.modalities[0])).logits
                total = _projected(student)
            before = {name: buffer.clone() for name, buffer in probe.backbone.named_buffers()}
            torch.autograd.grad(total, parameters, allow_unused=True)
        except Exception:  # there is nothing to train, or nothing that can be: others say so
            return []
        after = dict(probe.backbone.named_buffers())
        return [name for name, buffer in before.items() if name in after and not same_values(after[name], buffer)]


def skipping_difference(probe: Probe, spec: BackboneSpec, skip: Skip) -> float:
    """Return the largest relative difference that skipping the encoders of missing modalities makes.

    Compared in training mode are all maps and numbers that the backbone returns, its buffers afterwards and, for
    ``"absent"``, the gradient that is sent to all parameters. Where encoders run on fewer rows, rounding flips
    activations near zero and gradients with them. Statistics of batch normalisation, wherever they are taken, may
    follow what a skipped encoder would put out; noise, what it would draw.

    Args:
        probe: the backbone, in a sandbox.
        spec: with encoders.
        skip: ``"absent"``: one half of the modalities is missing in all rows, then the other. ``"rows"``: another
            one in each row.
    """
    adapter = probe.bind(spec)
    parameters = [parameter for parameter in probe.backbone.parameters() if parameter.requires_grad]
    worst = 0.0
    columns = torch.arange(len(probe.modalities)).expand(probe.batch, -1)
    first_half = columns < len(probe.modalities) // 2
    one_each = columns != torch.arange(probe.batch)[:, None] % len(probe.modalities)
    for table in [first_half, ~first_half] if skip == "absent" else [one_each]:
        results = []
        for how in ("no", skip):
            with torch.enable_grad(), _training_mode(probe.backbone):
                reseed()
                fused = fused_pass(adapter, probe.arguments(probe.images(), table), table, skip=how)
                leaves = [leaf for leaf in tree_leaves(fused.raw) if isinstance(leaf, Tensor)]
                outputs = [leaf for leaf in leaves if leaf.is_floating_point()]
                total = sum(_projected(leaf) for leaf in outputs if leaf.requires_grad)
                results.append([leaf.detach() for leaf in (*outputs, *probe.backbone.buffers())])
                if skip == "absent" and isinstance(total, Tensor):
                    results[-1].append(_gradient(probe, total, parameters))
        # A buffer may hold infinities, which have no difference.
        changed = [pair for pair in zip(*results, strict=True) if not torch.equal(*pair)]
        worst = max([worst, *(relative_difference(skipped, full) for full, skipped in changed)])
    return worst


def true_student(
    probe: Probe, spec: BackboneSpec, presence: Tensor, student_input: StudentInput, *changed: int
) -> Prediction:
    """Return what a student should give: everything runs, on a blanked input with a one-hot mask.

    Args:
        probe: the backbone, in a sandbox.
        spec: how to talk to it.
        presence: bool (B, M) of the call.
        student_input: modalities and rows.
        *changed: numbers of modalities that get other content.
    """
    adapter = probe.bind(spec.replaced(students="rerun"))
    call = probe.arguments(probe.images(*changed), presence)
    nobody = Prediction(torch.empty(0), torch.empty(0))
    reseed()
    fused = FusedPass(call, len(presence), None, nobody, FeatureCache({}))
    return student_pass(adapter, fused, student_input)


@contextmanager
def _training_mode(backbone: nn.Module) -> Iterator[None]:
    """Training mode, but for dropout layers, whose noise would hide other differences, and with buffers at rest."""
    backbone.train()
    try:
        for layer in dropout_layers(backbone):
            layer.eval()
        with preserved_buffers(backbone):
            yield
    finally:
        backbone.eval()


def _whole_batch(probe: Probe, modality: str) -> StudentInput:
    return StudentInput((modality,), torch.arange(probe.batch))


def _runs(probe: Probe, spec: BackboneSpec) -> bool:
    """Whether a true run goes through in the mode that the backbone is in."""
    try:
        true_student(probe, spec, probe.presence(), _whole_batch(probe, probe.modalities[0]))
    except Exception:
        return False
    return True


def _gradient_differences(probe: Probe, spec: BackboneSpec) -> list[float | None]:
    """Compare the students of all modalities with true runs, in the mode that the backbone is in.

    Students run on the whole batch, on which recorded features are the same bit for bit: rounding that depends on the
    batch size flips activations near zero, and gradients with them.
    """
    adapter = probe.bind(spec)
    presence = probe.presence()
    owners = {
        id(parameter): name
        for name, modules in adapter.encoders.items()
        for module in modules
        for parameter in module.parameters()
    }
    differences = []
    with torch.enable_grad():
        reseed()
        with preserved_buffers(probe.backbone):
            keep = spec.students in ("replay", "mixed")
            fused = fused_pass(adapter, probe.arguments(probe.images(), presence), presence, keep_rng_state=keep)
        for modality in probe.modalities:
            parameters = [
                parameter
                for parameter in probe.backbone.parameters()
                if parameter.requires_grad and owners.get(id(parameter), modality) == modality
            ]
            student_input = _whole_batch(probe, modality)
            reference = true_student(probe, spec, presence, student_input).logits
            if not parameters or not reference.requires_grad:
                continue
            reseed()
            student = student_pass(adapter, fused, student_input).logits
            differences.append(_gradient_apart(probe, student, reference, parameters))
    return differences


def _gradient_apart(probe: Probe, student: Tensor, reference: Tensor, parameters: Sequence[Tensor]) -> float | None:
    """Return the relative difference of two gradients, or None where the outputs are not equal to begin with."""
    wanted, got = (_gradient(probe, _projected(output), parameters) for output in (reference, student))
    if relative_difference(student.detach(), reference.detach()) > equality_tolerance(reference):
        return None
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _projected(output: Tensor) -> Tensor:
    """A number with a gradient in every entry, the same weights for the same shape."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return (output * weights).sum()


def _gradient(probe: Probe, total: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    # What is checkpointed runs again here: on the buffers that it met before.
    with preserved_buffers(probe.backbone):
        found = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
    flat = [
        torch.zeros_like(parameter) if gradient is None else gradient
        for parameter, gradient in zip(parameters, found, strict=True)
    ]
    return torch.cat([gradient.flatten().double() for gradient in flat])

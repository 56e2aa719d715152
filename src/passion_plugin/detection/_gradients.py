"""What only passes with gradient show: encoders that are cut off, checkpointing, wrong gradients, moved buffers.

Every function takes a ``probe`` (the backbone, in a sandbox) and a ``spec`` of it.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    passes_reentrant,
    patched_forward,
    prediction_of,
    preserved_buffers,
    reentrant_problem,
    student_pass,
)
from passion_plugin.detection._probe import (
    BackboneRunError,
    Probe,
    backbone_errors,
    equality_tolerance,
    relative_difference,
)
from passion_plugin.detection._report import BackboneReport, dropout_layers
from passion_plugin.detection._sandbox import reseed, same_values, sandbox
from passion_plugin.errors import BackboneError, PassionError, quoted


def true_student(
    probe: Probe,
    spec: BackboneSpec,
    student_input: StudentInput | None = None,
    presence: Tensor | None = None,
    changed: Sequence[int] = (),
) -> Prediction:
    """Return what a student should give: everything runs, on a blanked input with a one-hot mask.

    Unless said otherwise it sees the first modality in a whole batch with everything present; ``changed`` modalities
    get other content.
    """
    adapter = probe.bind(spec.replaced(students="rerun"))
    presence = probe.presence() if presence is None else presence
    call = probe.arguments(probe.images(*changed), presence)
    nobody = Prediction(torch.empty(0), torch.empty(0))
    reseed()
    fused = FusedPass(call, len(presence), None, nobody, FeatureCache({}))
    return student_pass(adapter, fused, student_input or probe.whole_batch(probe.modalities[0]))


def cut_off_encoders(probe: Probe, report: BackboneReport, spec: BackboneSpec) -> list[str]:
    """Return encoder modules whose output carries no gradient in training mode although they could learn.

    Raises:
        BackboneError: reentrant activation checkpointing.
    """
    # Bound as a re-run: features without gradient are to be understood here, not to raise.
    adapter = probe.bind(spec.replaced(students="rerun"))
    names = {
        module: name
        for modality, modules in adapter.encoders.items()
        for module, name in zip(modules, spec.encoders[modality], strict=True)
    }
    without_grad: list[nn.Module] = []
    outputs: dict[nn.Module, list[Tensor]] = defaultdict(list)

    def capture(module: nn.Module, forward: Handler, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            without_grad.append(module)
        output = forward(*args, **kwargs)
        outputs[module] += _floating(output)
        return output

    handlers = {module: functools.partial(capture, module) for module in (*names, adapter.classifier)}
    try:
        with _train_mode(probe.backbone), torch.enable_grad(), patched_forward(handlers):
            fused = probe.fused(adapter)
    except BackboneRunError as error:
        report.warnings.append(f"a pass in training mode raised {error}")
        return []
    if passes_reentrant((fused.prediction.logits, prediction_of(fused.raw))):
        named = {**names, adapter.classifier: spec.classifier}
        raise BackboneError(reentrant_problem(list(dict.fromkeys(named[module] for module in without_grad))))
    return [
        name
        for module, name in names.items()
        if any(parameter.requires_grad for parameter in module.parameters())
        and outputs[module]
        and not any(leaf.requires_grad for leaf in outputs[module])
    ]


def check_training(probe: Probe, report: BackboneReport, spec: BackboneSpec) -> None:
    """Run a fused pass and a student in training mode with gradient; ``spec`` says how students are run."""
    adapter = probe.bind(spec)
    try:
        with _train_mode(probe.backbone), torch.enable_grad():
            fused = probe.fused(adapter)
            if not _trained(probe):
                report.warnings.append("no parameter requires gradient: there is nothing to train")
            elif spec.students != "heads":
                student_pass(adapter, fused, probe.whole_batch(probe.modalities[0]))
    except BackboneRunError as error:
        report.warnings.append(f"a pass in training mode raised {error}")
    except PassionError as error:
        report.problems.append(f"in training mode: {error}")


def check_buffers(probe: Probe, report: BackboneReport, spec: BackboneSpec) -> None:
    """Warn of buffers that the backward of a student changes in training mode.

    A student moves no buffer while it runs forward. What is checkpointed runs again in backward.
    """
    if spec.students == "heads":
        return
    adapter = probe.bind(spec)
    with sandbox(probe.backbone), _train_mode(probe.backbone, dropout=False):
        try:
            # Without gradient, so that backward ends at what is replayed: the bare network runs that again too.
            fused = probe.fused(adapter)
            with torch.enable_grad():
                student = student_pass(adapter, fused, probe.whole_batch(probe.modalities[0])).logits
            if not student.requires_grad:
                return
            before = {name: buffer.clone() for name, buffer in probe.backbone.named_buffers()}
            _backward([student], _trained(probe))
        except PassionError:  # check_training() has said so
            return
        buffers = probe.backbone.named_buffers()
        moved = [name for name, buffer in buffers if not same_values(buffer, before.get(name, buffer))]
    layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in moved))
    if layers:
        text = (
            f"buffers of {quoted(layers)} (running statistics?) change in the backward of students too: activation "
            f"checkpointing runs these layers again there. Single modalities then move the statistics that are used "
            f"at test time. Keep these layers out of what is checkpointed, or use normalisation without running "
            f"statistics"
        )
        report.warnings.append(text)
        report.emitted.append(text)


def gradient_difference(probe: Probe, spec: BackboneSpec) -> float:
    """Return the largest relative difference between the gradient of a student and that of a true run.

    Equal outputs are not enough: a checkpointed encoder runs again in backward, when nothing is replayed any
    more. Training mode decides, since networks may checkpoint in training only; evaluation mode does where students
    and true runs differ in training for another reason, such as noise.
    """
    with _comparable_training(probe.backbone):
        differences: list[float | None] = _gradient_differences(probe, spec) if _runs(probe, spec) else [None]
    if None in differences:
        differences = _gradient_differences(probe, spec)
    return max([0.0, *(math.inf if found is None else found for found in differences)])


def student_mode_difference(probe: Probe, spec: BackboneSpec, changed: BackboneSpec) -> float:
    """Return the relative difference between the gradients of true runs with two specs in training mode.

    A checkpointed decoder runs again in backward, when the student mode is over.
    """
    with _comparable_training(probe.backbone):
        if not _runs(probe, spec):
            return 0.0
        with torch.enable_grad():
            reference, student = (true_student(probe, how).logits for how in (spec, changed))
            return _gradient_apart(probe, student, reference, _trained(probe)) or 0.0


def skipping_difference(probe: Probe, spec: BackboneSpec, skip: Skip) -> float:
    """Return the largest relative difference that skipping the encoders of missing modalities makes.

    Compared in training mode are all maps and numbers that the backbone returns, its buffers afterwards (statistics
    of batch normalisation may follow what a skipped encoder would output) and, for ``"absent"``, the gradient of all
    parameters. Where encoders run on fewer rows, rounding flips activations near zero and gradients with them.
    For ``"absent"`` one half of the modalities is missing in all rows, then the other; for ``"rows"`` another one in
    each row.
    """
    adapter = probe.bind(spec)
    worst = 0.0
    columns = torch.arange(len(probe.modalities)).expand(probe.batch, -1)
    first_half = columns < len(probe.modalities) // 2
    one_each = columns != torch.arange(probe.batch)[:, None] % len(probe.modalities)
    for table in [first_half, ~first_half] if skip == "absent" else [one_each]:
        results = []
        for how in ("no", skip):
            with torch.enable_grad(), _comparable_training(probe.backbone):
                fused = probe.fused(adapter, table, skip=how)
                outputs = _floating(fused.raw)
                results.append([leaf.detach() for leaf in (*outputs, *probe.backbone.buffers())])
                with_grad = [leaf for leaf in outputs if leaf.requires_grad]
                if skip == "absent" and with_grad:
                    results[-1].append(_gradient(probe, with_grad, _trained(probe)))
        # A buffer may hold infinities, which have no difference.
        changed = [pair for pair in zip(*results, strict=True) if not torch.equal(*pair)]
        worst = max([worst, *(relative_difference(skipped, full) for full, skipped in changed)])
    return worst


@contextmanager
def _train_mode(backbone: nn.Module, *, dropout: bool = True) -> Iterator[None]:
    backbone.train()
    try:
        for layer in [] if dropout else dropout_layers(backbone):
            layer.eval()
        yield
    finally:
        backbone.eval()


@contextmanager
def _comparable_training(backbone: nn.Module) -> Iterator[None]:
    """Training mode, but for dropout layers, whose noise would hide other differences; buffers are kept."""
    with _train_mode(backbone, dropout=False), preserved_buffers(backbone):
        yield


def _trained(probe: Probe) -> list[nn.Parameter]:
    return [parameter for parameter in probe.backbone.parameters() if parameter.requires_grad]


def _floating(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _runs(probe: Probe, spec: BackboneSpec) -> bool:
    """Whether a true run works in the mode that the backbone is in."""
    try:
        true_student(probe, spec)
    except PassionError:
        return False
    return True


def _gradient_differences(probe: Probe, spec: BackboneSpec) -> list[float | None]:
    """Compare the students of all modalities with true runs, in the mode that the backbone is in.

    Students run on the whole batch, on which captured features are the same bit for bit: rounding that depends on the
    batch size flips activations near zero, and gradients with them.
    """
    adapter = probe.bind(spec)
    owners = {
        id(parameter): name
        for name, modules in adapter.encoders.items()
        for module in modules
        for parameter in module.parameters()
    }
    differences = []
    with torch.enable_grad():
        with preserved_buffers(probe.backbone):
            fused = probe.fused(adapter, keep_rng_state=spec.students in ("replay", "mixed"))
        for modality in probe.modalities:
            parameters = [p for p in _trained(probe) if owners.get(id(p), modality) == modality]
            student_input = probe.whole_batch(modality)
            reference = true_student(probe, spec, student_input).logits
            if not parameters or not reference.requires_grad:
                continue
            reseed()
            student = student_pass(adapter, fused, student_input).logits
            differences.append(_gradient_apart(probe, student, reference, parameters))
    return differences


def _gradient_apart(probe: Probe, student: Tensor, reference: Tensor, parameters: Sequence[Tensor]) -> float | None:
    """Return the relative difference of two gradients, or None where the outputs are not equal to begin with."""
    wanted, got = (_gradient(probe, [output], parameters) for output in (reference, student))
    if relative_difference(student.detach(), reference.detach()) > equality_tolerance(reference.dtype):
        return None
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _gradient(probe: Probe, outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Return the gradient of a random projection as one vector; what is checkpointed runs again and moves no buffer."""
    with preserved_buffers(probe.backbone):
        return _backward(outputs, parameters)


def _backward(outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    parts = []
    with torch.enable_grad():
        for output in outputs:
            generator = torch.Generator().manual_seed(0)
            weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
            parts.append((output * weights).sum())
    with backbone_errors():
        found = torch.autograd.grad(parts, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten().double() for gradient in found])

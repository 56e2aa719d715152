"""Measuring a trial: students against true single-modality runs of the bare model, without asking the library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from passion_plugin.backbone import PRESETS, BackboneCall, preset
from passion_plugin.config import PassionConfig
from passion_plugin.detection import inspect_call
from passion_plugin.errors import PassionError
from passion_plugin.training import PassionRule
from passion_plugin.training._step import TrainingStep
from passion_plugin.wrapper import PassionWrapper
from tools.backbones.traces import differences, traces
from tools.backbones.trial import Call, Trial

__all__ = ["TOLERANCE", "Measured", "measure"]

TOLERANCE = 1e-4
"""Relative difference up to which two runs of a network in float32 count as equal."""

_STEPS = 6
_STUDENTS = {"exact": "replay", "mixed": "mixed", "rerun": "rerun", "heads": "heads"}
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Measured:
    """What a trial gave.

    Attributes:
        outcome: how the students are run, or ``"refused"``.
        found: where the spec came from: ``"given"``, ``"preset NAME"`` or ``"detected"``.
        difference: largest absolute difference between the logits of a student (or of the teacher) and those of
            a true run of the bare model; None for heads.
        relative: the same, as a fraction of the largest logit.
        leak: largest change of a student's logits when the other modalities get other content, as a fraction of
            the largest logit.
        losses: task loss + passion_loss at each optimizer step.
        left: what was different on the backbone after ``unwrap()``.
        error: message of the refusal.
    """

    outcome: str
    found: str
    difference: float | None = None
    relative: float | None = None
    leak: float | None = None
    losses: tuple[float, ...] = ()
    left: tuple[str, ...] = ()
    error: str = ""

    def failures(self, trial: Trial) -> list[str]:
        """Say in which respects this is not what the trial expects."""
        if trial.expect == "refused":
            if self.outcome != "refused":
                return [f"a refusal was expected, but the students are {self.outcome!r}"]
            return [] if trial.reason in self.error else [f"refused, but not because of {trial.reason!r}"]
        if self.outcome == "refused":
            return ["it was refused"]
        problems = []
        if self.outcome != _STUDENTS[trial.expect]:
            problems.append(f"the students are {self.outcome!r}, {_STUDENTS[trial.expect]!r} was expected")
        if self.relative is not None and not self.relative <= TOLERANCE:
            problems.append(f"students differ from true runs by {self.relative:.1e} of the largest logit")
        if self.leak is None or not self.leak <= TOLERANCE:
            problems.append(f"students see the content of other modalities: {self.leak} of the largest logit")
        if not all(map(math.isfinite, self.losses)) or not self.losses[-1] < self.losses[0]:
            problems.append(f"the loss does not fall: {self.losses}")
        if self.left:
            problems.append(f"different on the backbone after unwrap(): {', '.join(self.left[:5])}")
        return problems


class _Listening(PassionRule):
    """PASSION; remembers what the teacher and each student predicted in the last step."""

    def loss(self, step: TrainingStep, labels: Tensor) -> Tensor:
        self.fused = step.teacher.logits
        self.heard = [student.prediction.logits.detach() for student in step.students]
        return super().loss(step, labels)


def measure(trial: Trial) -> Measured:
    """Examine, wrap, compare, train and unwrap a model; the report is printed.

    Args:
        trial: the model and how it is called.

    Raises:
        Exception: whatever the model raises when it is called the way the trial says.
    """
    model = trial.model.train()
    count = len(trial.modalities)
    name = next((entry.name for entry in PRESETS.values() if entry.matches(model)), "")
    found = "given" if trial.spec is not None else f"preset {name}" if name else "detected"
    _print_report(trial, name)
    rule = _Listening()
    try:
        wrapper = PassionWrapper(
            model,
            trial.modalities,
            missing_rates=[0.2] * count,
            spec=trial.spec,
            strategy=rule,
            # Students draw the same random numbers behind the encoders as a true run from the same seed.
            config=PassionConfig(share_random_state=True),
            **trial.wrap,
        ).train()
        _step(wrapper, trial, trial.full())
    except PassionError as error:
        return Measured("refused", found, error=str(error))
    assert wrapper.passion.adapter is not None
    outcome = wrapper.passion.adapter.spec.students
    with wrapper.passion.disabled():
        wanted = [_true_logits(trial, trial.full()), *(_true_logits(trial, trial.alone(m)) for m in range(count))]
    before = traces(wrapper.train().backbone)
    _step(wrapper, trial, trial.full())
    got = [rule.fused, *rule.heard]
    size = max(float(tensor.abs().max()) for tensor in got)
    if outcome == "heads":
        difference = None
    else:
        difference = max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True))
    leak = 0.0
    for m in range(count):
        _step(wrapper, trial, trial.disturbed(m))
        leak = max(leak, float((rule.heard[m] - got[m + 1]).abs().max()) / size)
    losses = _trained(wrapper, trial)
    left = differences(before, traces(wrapper.unwrap()))
    relative = None if difference is None else difference / size
    return Measured(outcome, found, difference, relative, leak, losses, left)


def _print_report(trial: Trial, name: str) -> None:
    """Print what :func:`passion_plugin.inspect_backbone` does, and whether a search agrees with a preset."""
    call = BackboneCall(*trial.full())
    spec = preset(trial.spec, trial.model, trial.modalities) if isinstance(trial.spec, str) else trial.spec
    report = inspect_call(trial.model, call, trial.modalities, spec=spec)
    print(report)
    if spec is None and name and report.spec is not None:
        known = preset(name, trial.model, trial.modalities)
        for field in ("encoders", "classifier"):
            same = getattr(known, field) == getattr(report.spec, field)
            print(f"{field} of preset {name}: {'as found' if same else getattr(known, field)}")


def _step(wrapper: PassionWrapper, trial: Trial, call: Call) -> None:
    """Run one training step from a fixed seed, without dropout layers and without moving running statistics."""
    args, keywords = call
    state = {name: buffer.clone() for name, buffer in wrapper.backbone.named_buffers()}
    torch.manual_seed(0)
    _without_dropout(wrapper.backbone)
    wrapper(*args, **keywords, **trial.call)
    wrapper.passion_loss(trial.target)
    for name, buffer in wrapper.backbone.named_buffers():
        buffer.copy_(state[name])


@torch.no_grad()
def _true_logits(trial: Trial, call: Call) -> Tensor:
    """Run the bare model, as in :func:`_step`, and listen to its classifier."""
    args, keywords = call
    heard: list[Tensor] = []
    state = {name: buffer.clone() for name, buffer in trial.model.named_buffers()}
    torch.manual_seed(0)
    _without_dropout(trial.model)
    hook = trial.model.get_submodule(trial.truth).register_forward_hook(lambda *passed: heard.append(passed[2]))
    try:
        trial.model(*args, **keywords)
    finally:
        hook.remove()
    for name, buffer in trial.model.named_buffers():
        buffer.copy_(state[name])
    (logits,) = heard
    return logits


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _DROPOUT):
            module.eval()


def _trained(wrapper: PassionWrapper, trial: Trial) -> tuple[float, ...]:
    args, keywords = trial.full()
    wrapper.train()
    optimizer = torch.optim.Adam(wrapper.parameters(), lr=1e-3)
    losses = []
    for _ in range(_STEPS):
        torch.manual_seed(0)
        raw = wrapper(*args, **keywords, **trial.call)
        assert trial.task_loss is not None
        loss: Any = trial.task_loss(raw, trial.target) + wrapper.passion_loss(trial.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return tuple(losses)

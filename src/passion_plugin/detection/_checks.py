"""What a backbone does with its mask and its batch, by experiment, and what that means for the user."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from passion_plugin.backbone import MaskCodec
from passion_plugin.detection._probe import EFFECT, Probe, equality_tolerance, reason_of, relative_difference
from passion_plugin.detection._report import BackboneReport, BatchBehaviour, MaskBehaviour, batch_norms
from passion_plugin.errors import PassionError, quoted

_BLANKED = "Students get a blanked input; keep missing channels blank in your data too"


def check_modules(backbone: nn.Module, report: BackboneReport) -> None:
    """Say what wrappers and batch normalisation layers mean."""
    if any(isinstance(module, nn.DataParallel) for module in backbone.modules()):
        report.problems.append(
            "DataParallel is not supported: wrap its .module, and use DistributedDataParallel around the wrapper"
        )
    for name, module in backbone.named_modules():
        kind, where = type(module).__name__, repr(name) if name else "the backbone"
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            report.warnings.append(f"{where} is a {kind}: wrap the bare network, and put {kind} around the wrapper")
        elif isinstance(module, torch.jit.ScriptModule):
            report.warnings.append(f"{where} is a ScriptModule, whose parts cannot be captured: pass the module")
            break
        elif kind == "OptimizedModule":
            report.warnings.append(f"{where} is compiled; capturing outputs of its parts compiles some of them again")
    if count := len(batch_norms(backbone)):
        report.warnings.append(
            f"{count} batch normalisation layer(s): their running statistics follow the fused pass only"
        )


def check_batch(probe: Probe, report: BackboneReport, *, one_mask: bool) -> bool:
    """Find out how the samples of a batch relate, and say what that means; size the probe.

    Returns:
        Whether one batch can hold samples with different masks; not asked for with ``one_mask``, with which students
        run on the whole batch.
    """
    found = report.batch = _batch_behaviour(probe)
    if report.noisy:
        report.warnings.append(
            f"two runs in evaluation mode differ by {found.noise:.1e}: dropout or sampling that is always "
            f"on. Teacher and students see different noise"
        )
    if found.single_failure:
        report.problems.append(
            f"{found.single_failure}, while a batch of two runs. Students run on the rows of a batch that have their "
            f"modality, often on one: is the mask used as an index (an integer mask, or .long() of it, picks "
            f"rows instead of masking), or is the batch axis squeezed?"
        )
    if found.coupling is not None and found.coupling > EFFECT:
        coupled = (
            f"the samples of a batch are not independent: the prediction of one changes by {found.coupling:.1e} "
            f"when the content of its neighbour changes"
        )
        if any(layer.running_mean is None for layer in batch_norms(probe.backbone)):
            report.warnings.append("batch normalisation without running statistics couples samples in evaluation too")
        elif one_mask:
            report.warnings.append(
                f"{coupled}. With one mask for the batch, as per_sample_masks=False says, students run on the whole "
                f"batch and see what the teacher saw"
            )
        else:
            report.problems.append(
                f"{coupled} (a softmax or a mean over the batch axis?). Students run on some rows of the batch and "
                f"would not see what the teacher saw. Make the samples independent in the backbone, or train with one "
                f"mask for the batch (a batch of one has one) and say so with per_sample_masks=False"
            )
    reason = found.failure
    if found.mixed_masks is not None and found.mixed_masks > equality_tolerance(torch.float32):
        reason = (
            f"samples with different masks get predictions that differ by {found.mixed_masks:.1e} from those in "
            f"batches of one mask (one mask for the whole batch, or only its first row read?)"
        )
    if reason:
        report.warnings.append(f"one batch cannot hold different masks: {reason}")
    return not reason


def _batch_behaviour(probe: Probe) -> BatchBehaviour:
    """Try a batch of two, other neighbours, a batch of one, and different masks in one batch.

    Every comparison is between batches of one size from one random state, so that dropout that is always on
    draws the same numbers on both sides.
    """
    found = BatchBehaviour()
    if probe.batch == 1:
        probe.resize(2)
        found.failure = _failure(probe, "a batch of two")
        if found.failure:
            probe.resize(1)
    base = probe.predict()
    found.noise = relative_difference(probe.predict(seed=1), base)
    if probe.batch == 1:
        return found
    # Every row: what is read off the first one and used for all does not change with the others.
    changed = [probe.predict(probe.neighbours(row))[row] for row in range(probe.batch)]
    found.coupling = max(relative_difference(other, base[row]) for row, other in enumerate(changed))
    probe.resize(1)
    found.single_failure = _failure(probe, "a batch of one")
    probe.resize(2)
    table = different_masks(probe.batch, len(probe.modalities))
    try:
        together = probe.predict(keep=table)
        apart = [probe.predict(keep=mask.expand_as(table))[row] for row, mask in enumerate(table)]
    except PassionError as error:
        found.failure = f"different masks in one batch raise {reason_of(error)}"
        return found
    found.mixed_masks = max(relative_difference(together[row], other) for row, other in enumerate(apart))
    return found


def _failure(probe: Probe, what: str) -> str:
    try:
        probe.predict()
    except PassionError as error:
        return f"{what} raises {reason_of(error)}"
    return ""


def different_masks(batch: int, count: int) -> torch.Tensor:
    """Return bool (B, M) in which every row misses another modality."""
    missing = (torch.arange(batch) + 1) % count
    return torch.arange(count) != missing[:, None]


def mask_meaning(probe: Probe) -> str:
    """Return ``"present"`` or ``"missing"``: what a 1 in the mask says.

    Under a mask of ones the content must matter if a 1 says "present"; if it does not, but matters under a
    mask of zeros, a 1 says "missing". When this does not decide it, what the probe assumes is returned.
    """
    before = probe.convention
    assumed, other = ("present", "missing") if before.mask_meaning == "present" else ("missing", "present")
    if isinstance(before.mask_format, MaskCodec) or before.mask_argument is None or _content_matters(probe):
        return assumed
    probe.set_convention(replace(before, mask_meaning=other))
    meaning = other if _content_matters(probe) else assumed
    probe.set_convention(before)
    return meaning


def _content_matters(probe: Probe) -> bool:
    try:
        base = probe.predict()
        change = probe.change(base, *range(len(probe.modalities)))
    except PassionError:
        return False
    return bool(torch.isfinite(base).all()) and change > EFFECT


def _mask_behaviour(probe: Probe) -> MaskBehaviour:
    """Show one modality after the other by the mask alone, and change content to see what reaches the prediction."""
    count = len(probe.modalities)
    found = MaskBehaviour()
    full = probe.predict()
    for k in range(count):
        keep = probe.presence(k)
        try:
            base = probe.predict(keep=keep)
            own = probe.change(base, k, keep=keep)
            leak = probe.change(base, *(m for m in range(count) if m != k), keep=keep)
            if not torch.isfinite(base).all():
                own = leak = float("nan")
            found.effect.append(relative_difference(base, full))
            found.own.append(own)
            found.leak.append(leak)
            if own <= EFFECT < leak:
                found.columns[k] = tuple(m for m in range(count) if probe.change(base, m, keep=keep) > EFFECT)
        except PassionError as error:
            found.failure = f"a mask with only {probe.modalities[k]!r} present raises {reason_of(error)}"
            break
    return found


def check_mask(probe: Probe, report: BackboneReport, *, inverted: bool, try_bool: bool) -> None:
    """Find out which columns of the mask show which modality, and say what that means.

    Args:
        probe: the backbone, in a sandbox.
        report: to be written to.
        inverted: :func:`mask_meaning` is the opposite of what the spec says.
        try_bool: where the mask has no effect, find out whether a bool mask in its place has.
    """
    found = report.mask = _mask_behaviour(probe)
    names, order = report.modalities, found.permutation()
    if found.failure:
        report.warnings.append(found.failure)
    elif not found.has_effect and try_bool and _bool_mask_has_effect(probe):
        report.problems.append(
            f"the example mask is of type {probe.convention.mask_format} and hides nothing, while a torch.bool mask "
            f"does: the backbone uses it as an index. Pass mask.bool()"
        )
    elif not found.has_effect:
        report.warnings.append(
            f"the mask has no effect on the prediction, only a blank input hides a modality. {_BLANKED}"
        )
    elif found.columns and inverted:
        report.problems.append(
            "the mask works the other way round: what it marks as present is hidden. Set mask_meaning= to the "
            "other value"
        )
    elif order is not None:
        switched = "; ".join(f"mask column {k} switches {names[m]!r}" for k, m in enumerate(order))
        cure = f"Pass mask_columns={tuple(names[m] for m in order)!r}"
        if probe.convention.forward_fn is not None:
            cure = "Put the columns in order in forward_fn="
        report.problems.append(
            f"the columns of the mask do not have the order of the images: {switched}. {cure}, or give modalities and "
            f"images in the order of the mask"
        )
    elif found.columns:
        report.problems += [
            f"mask column {k} is expected to show {names[k]!r}, but the content that then reaches the prediction is "
            f"that of {quoted([names[m] for m in shown]) or 'nothing'}. Say in mask_columns= which modality each "
            f"column switches"
            for k, shown in found.columns.items()
        ]
    elif (worst := max(found.leak)) > EFFECT:
        report.warnings.append(
            f"content of masked modalities leaks into the prediction (by {worst:.1e} with only "
            f"{names[found.leak.index(worst)]!r} present): the mask alone does not hide it. {_BLANKED}"
        )


def _bool_mask_has_effect(probe: Probe) -> bool:
    before = probe.convention
    probe.set_convention(replace(before, mask_format="bool"))
    found = _mask_behaviour(probe)
    probe.set_convention(before)
    return found.has_effect and not found.failure

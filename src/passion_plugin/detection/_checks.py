"""What a backbone does with its mask and its batch, by experiment, and what that means for the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from passion_plugin.backbone import MaskCodec
from passion_plugin.detection._probe import Probe, relative_difference
from passion_plugin.detection._report import EFFECT, BackboneReport, BatchBehaviour, MaskBehaviour, ModuleSummary
from passion_plugin.errors import short

__all__ = [
    "equality_tolerance",
    "mask_behaviour",
    "mask_meaning",
    "probe_batching",
    "report_batch",
    "report_buffers",
    "report_idle_mask",
    "report_layers",
    "report_mask",
]


def equality_tolerance(tensor: Tensor) -> float:
    """Return the relative difference up to which two ways to compute a tensor count as equal."""
    return max(1e-3, 16 * torch.finfo(tensor.dtype).eps)


def probe_batching(probe: Probe) -> BatchBehaviour:
    """Find out whether a batch of two runs, mixes its samples, and may have different masks; size the probe.

    Every comparison is between batches of one size from one random state, so that dropout that is always on
    draws the same numbers on both sides.
    """
    found = BatchBehaviour()
    if probe.batch == 1:
        probe.resize(2)
        try:
            probe.predict(probe.images(), probe.presence())
        except Exception as error:
            found.reason = f"a batch of two raises {short(error)}"
            probe.resize(1)
    everything = probe.presence()
    base = probe.predict(probe.images(), everything)
    found.repeatable = relative_difference(probe.predict(probe.images(), everything, seed=1), base)
    if probe.batch == 1:
        return found
    # Every row: what is read off the first one and used for all does not change with the others.
    changed = [probe.predict(probe.neighbours(row), everything)[row] for row in range(probe.batch)]
    found.mixing = max(relative_difference(other, base[row]) for row, other in enumerate(changed))
    try:
        probe.predict(probe.images(), everything, rows=torch.tensor([0]))
    except Exception as error:
        found.single = f"a batch of one raises {short(error)}"
    try:
        found.mixed = _mixed_difference(probe)
    except Exception as error:
        found.reason = f"different masks in one batch raise {short(error)}"
    return found


def _mixed_difference(probe: Probe) -> float:
    count = len(probe.modalities)
    table = torch.ones(probe.batch, count, dtype=torch.bool)
    for row in range(probe.batch):
        table[row, (row + 1) % count] = False
    together = probe.predict(probe.images(), table)
    differences = []
    for row in range(probe.batch):
        apart = probe.predict(probe.images(), table[row].expand_as(table))
        differences.append(relative_difference(together[row], apart[row]))
    return max(differences)


def mask_meaning(probe: Probe) -> str:
    """Return ``"present"`` or ``"missing"``: what a 1 in the mask says.

    Under a mask of ones the content must matter if a 1 says "present"; if it does not, but matters under a
    mask of zeros, a 1 says "missing". When this does not decide it, what the probe assumes is returned.
    """
    before = probe.convention
    assumed, other = ("present", "missing") if before.mask_meaning == "present" else ("missing", "present")
    if isinstance(before.mask_format, MaskCodec) or before.mask_argument is None or _content_matters(probe):
        return assumed
    try:
        probe.set_convention(replace(before, mask_meaning=other))
        return other if _content_matters(probe) else assumed
    finally:
        probe.set_convention(before)


def _content_matters(probe: Probe) -> bool:
    try:
        base = probe.predict(probe.images(), probe.presence())
        changed = probe.predict(probe.images(*range(len(probe.modalities))), probe.presence())
    except Exception:
        return False
    return bool(torch.isfinite(base).all()) and relative_difference(changed, base) > EFFECT


def mask_behaviour(probe: Probe) -> MaskBehaviour:
    """Let one modality after the other through by the mask alone, and change content to see what is shown."""
    count = len(probe.modalities)
    found = MaskBehaviour()
    full = probe.predict(probe.images(), probe.presence())
    for k in range(count):
        keep = probe.presence(k)
        others = [m for m in range(count) if m != k]
        try:
            base = probe.predict(probe.images(), keep)
            own = relative_difference(probe.predict(probe.images(k), keep), base)
            leak = relative_difference(probe.predict(probe.images(*others), keep), base)
            if not torch.isfinite(base).all():
                own = leak = float("nan")
            found.effect.append(relative_difference(base, full))
            found.own.append(own)
            found.leak.append(leak)
            if own <= EFFECT < leak:
                changes = [relative_difference(probe.predict(probe.images(m), keep), base) for m in range(count)]
                found.columns[k] = tuple(m for m in range(count) if changes[m] > EFFECT)
        except Exception as error:
            found.failure = f"a mask with only {probe.modalities[k]!r} present raises {short(error)}"
            break
    return found


_BLANKED = "Students get a blanked input; keep missing channels blank in your data too"


def report_layers(report: BackboneReport, layers: ModuleSummary) -> None:
    """Write down what the parts of a network mean."""
    if layers.parallel:
        report.problem(layers.parallel)
    for remark in layers.wrappers:
        report.warn(remark)
    if layers.batch_statistics:
        report.warn(
            f"{layers.batch_statistics} batch normalisation layer(s): their running statistics follow the fused "
            f"pass only, and students cannot be stacked"
        )


def report_batch(
    report: BackboneReport, found: BatchBehaviour, layers: ModuleSummary, *, one_mask: bool = False
) -> bool:
    """Write down what the relation of the samples in a batch means.

    Args:
        report: to be written to.
        found: the experiment.
        layers: of the network.
        one_mask: the user has said that all samples of a batch have one mask: students run on the whole batch.

    Returns:
        Whether one batch can hold samples with different masks.
    """
    if found.repeatable > EFFECT:
        report.warn(
            f"two runs in evaluation mode differ by {found.repeatable:.1e}: dropout or sampling that is always "
            f"on. Teacher and students see different noise"
        )
    if found.single:
        report.problem(
            f"{found.single}, while a batch of two runs. Students run on the rows of a batch that have their "
            f"modality, often on one: is the mask used as an index (an integer mask, or .long() of it, picks "
            f"rows instead of masking), or is the batch axis squeezed?"
        )
    if found.mixing is not None and found.mixing > EFFECT:
        if layers.no_running:
            report.warn("batch normalisation without running statistics couples samples in evaluation too")
        elif one_mask:
            report.warn(
                f"the samples of a batch are not independent: the prediction of one changes by {found.mixing:.1e} "
                f"when the content of its neighbour changes. With one mask for the batch, as per_sample_masks=False says, "
                f"students run on the whole batch and see what the teacher saw"
            )
        else:
            report.problem(
                f"the samples of a batch are not independent: the prediction of one changes by "
                f"{found.mixing:.1e} when the content of its neighbour changes (a softmax or a mean over the batch "
                f"axis?). Students run on some rows of the batch and would not see what the teacher saw. Make the "
                f"samples independent in the backbone, or train with one mask for the batch (a batch of one has "
                f"one) and say so with per_sample_masks=False"
            )
    if found.mixed is None:
        report.warn(f"one batch cannot hold different masks: {found.reason}")
        return False
    different = found.mixed > equality_tolerance(torch.empty(0))
    if different:
        report.warn(
            f"one batch cannot hold different masks: samples with different masks get predictions that differ by "
            f"{found.mixed:.1e} from those in batches of one mask (one mask for the whole batch, or only its first "
            f"row read?)"
        )
    return not different


def report_buffers(report: BackboneReport, moved: Sequence[str]) -> None:
    """Write down what it means that the backward of a student changes buffers."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in moved))
    if layers:
        more = f" and {len(layers) - 4} more" if len(layers) > 4 else ""
        report.warn(
            f"buffers of {', '.join(map(repr, layers[:4]))}{more} (running statistics?) change in the backward of "
            f"students too: activation checkpointing runs these layers again there. Single modalities then move the "
            f"statistics that are used at test time. Keep these layers out of what is checkpointed, or use "
            f"normalisation without running statistics",
            aloud=True,
        )


def report_mask(report: BackboneReport, found: MaskBehaviour, meaning: str, *, through_call: bool) -> None:
    """Write down what it means which columns of the mask let which modality through.

    Args:
        report: to be written to.
        found: the experiment.
        meaning: ``"present"`` or ``"missing"``, what the experiment showed a 1 to say, in terms of the spec:
            ``"missing"`` when the spec has it the wrong way round.
        through_call: the backbone is run by the user's own function.
    """
    names, order = report.modalities, found.permutation()
    if found.failure:
        report.warn(found.failure)
    elif found.columns and meaning == "missing":
        report.problem(
            "the mask works the other way round: what it marks as present is hidden. Set mask_meaning= to the "
            "other value"
        )
    elif order is not None:
        columns = tuple(names[m] for m in order)
        switched = "; ".join(f"mask column {k} switches {names[m]!r}" for k, m in enumerate(order))
        cure = "Put the columns in order in forward_fn=" if through_call else f"Pass mask_columns={columns!r}"
        report.problem(
            f"the columns of the mask do not have the order of the images: {switched}. {cure}, or give modalities "
            f"and images in the order of the mask"
        )
    elif found.columns:
        for k, shown in found.columns.items():
            listed = ", ".join(repr(names[m]) for m in shown) or "nothing"
            report.problem(
                f"mask column {k} is expected to let {names[k]!r} through, but the content that then reaches the "
                f"prediction is that of {listed}. Say in mask_columns= which modality each column switches"
            )
    elif found.leaks:
        worst = max(range(len(found.leak)), key=lambda m: found.leak[m])
        report.warn(
            f"content of masked modalities leaks into the prediction (by {found.leak[worst]:.1e} with only "
            f"{names[worst]!r} present): the mask alone does not hide it. {_BLANKED}"
        )


def report_idle_mask(report: BackboneReport, kind: str, *, bool_helps: bool) -> None:
    """Write down what a mask without any effect means.

    Args:
        report: to be written to.
        kind: format of the mask.
        bool_helps: a bool mask in its place has an effect.
    """
    if bool_helps:
        report.problem(
            f"the example mask is of type {kind} and hides nothing, while a torch.bool mask does: the backbone "
            f"uses it as an index. Pass mask.bool()"
        )
    else:
        report.warn(f"the mask has no effect on the prediction, only a blank input hides a modality. {_BLANKED}")

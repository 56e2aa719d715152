"""What the answers about batch, mask and layers mean for wrapping a backbone, in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from passion_plugin.backbone.anatomy import Anatomy
from passion_plugin.backbone.checks import EFFECT, BatchBehaviour, MaskBehaviour, equality_tolerance
from passion_plugin.backbone.findings import Report
from passion_plugin.backbone.ladder import References

__all__ = ["judge_batch", "judge_buffers", "judge_idle_mask", "judge_layers", "judge_mask", "reasons_against_one_alone"]

_BLANKED = "Students get a blanked input; keep missing channels blank in your data too"


def judge_layers(report: Report, layers: Anatomy) -> None:
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


def judge_batch(report: Report, found: BatchBehaviour, layers: Anatomy, *, one_mask: bool = False) -> bool:
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
                f"when the content of its neighbour changes. With one mask for the batch, as mixed_masks=False says, "
                f"students run on the whole batch and see what the teacher saw"
            )
        else:
            report.problem(
                f"the samples of a batch are not independent: the prediction of one changes by "
                f"{found.mixing:.1e} when the content of its neighbour changes (a softmax or a mean over the batch "
                f"axis?). Students run on some rows of the batch and would not see what the teacher saw. Make the "
                f"samples independent in the backbone, or train with one mask for the batch (a batch of one has "
                f"one) and say so with mixed_masks=False"
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


def judge_buffers(report: Report, moved: Sequence[str]) -> None:
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


def judge_mask(report: Report, found: MaskBehaviour, meaning: str, *, through_call: bool) -> None:
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
        cure = "Put the columns in order in call=" if through_call else f"Pass mask_columns={columns!r}"
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


def judge_idle_mask(report: Report, kind: str, *, bool_helps: bool) -> None:
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


def reasons_against_one_alone(truth: References) -> list[str]:
    """Say why a single modality cannot be let through; nothing when it can."""
    reasons = [f"only {name!r}: {text}" for name, text in truth.failures.items()]
    reasons += [f"only {name!r}: not finite" for name, finite in truth.finite.items() if not finite]
    reasons += [
        f"only {name!r}: its content does not reach the prediction"
        for name, own in truth.own.items()
        if own <= EFFECT and truth.finite[name]
    ]
    return reasons

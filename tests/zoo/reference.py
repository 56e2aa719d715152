"""What the library should find, computed the slow way: every student is a run of the bare backbone.

Nothing here knows of replay, of rows, or of the engine. A student sees a blanked copy of the images and a
one-hot mask; a plain forward hook listens at the classifier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from passion_plugin.losses import pixel_distillation, prototype_distillation

from .entry import Arguments, ZooEntry

__all__ = [
    "Terms",
    "bare",
    "clone_arguments",
    "encoder_parameters",
    "first_difference",
    "run",
    "slow_gradients",
    "slow_terms",
    "without_noise",
]


@dataclass(frozen=True)
class Terms:
    """Terms (B, M), zero where there is no student."""

    pixel: Tensor
    prototype: Tensor
    distance: Tensor
    active: Tensor


def bare(entry: ZooEntry, like: nn.Module) -> nn.Module:
    """A fresh backbone with the state of ``like``, in train mode."""
    backbone = entry.backbone()
    backbone.load_state_dict(like.state_dict())
    return backbone


def without_noise(backbone: nn.Module) -> nn.Module:
    """Set every dropout rate to zero, so that passes can be compared."""
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if "always" in module.__dict__:
            module.always = 0.0
    return backbone


def clone_arguments(arguments: Arguments) -> Arguments:
    """Copies of all tensors and containers: some backbones write into what they are given."""
    args, kwargs = arguments
    return tree_map(clone, args), tree_map(clone, kwargs)


def clone(value: Any) -> Any:
    """Copy of a tensor; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def run(model: nn.Module, arguments: Arguments, **extra: Any) -> Any:
    """Call ``model`` from a fixed random state on copies of the arguments."""
    torch.manual_seed(7)
    args, kwargs = clone_arguments(arguments)
    return model(*args, **kwargs, **extra)


def first_difference(one: Any, other: Any) -> str:
    """Empty when two nested outputs are equal bit for bit and container for container, else what differs."""
    leaves, structure = tree_flatten(one)
    other_leaves, other_structure = tree_flatten(other)
    if structure != other_structure:
        return f"structure {structure} against {other_structure}"
    for index, (left, right) in enumerate(zip(leaves, other_leaves, strict=True)):
        if isinstance(left, Tensor):
            if left.dtype != right.dtype or not torch.equal(left, right):
                return f"tensor {index}: {left.dtype} {left.shape} against {right.dtype} {right.shape}"
        elif left != right:
            return f"leaf {index}: {left!r} against {right!r}"
    return ""


def slow_terms(entry: ZooEntry, like: nn.Module, temperature: float) -> Terms:
    """Pixel, prototype and distance terms, from one run of the bare backbone per student.

    Args:
        entry: ground truth.
        like: backbone with the weights to use; left as it is.
        temperature: of the pixel distillation.
    """
    teacher, after = slow_teacher(entry, like)
    presence = entry.table()
    labels = at_resolution(entry.labels(), teacher[1], entry.outputs)
    pixel, prototype, distance = (torch.zeros(presence.shape, dtype=teacher[1].dtype) for _ in range(3))
    for modality in range(len(entry.modalities)):
        for group, places in slow_groups(entry, modality):
            student = listen(entry, with_state(entry, like, after), entry.only(modality, group))
            for place in places:
                row = int(group[place])
                features, logits = (tensor[place : place + 1].detach() for tensor in student)
                teacher_features, teacher_logits = (tensor[row : row + 1] for tensor in teacher)
                pixel[row, modality] = pixel_distillation(
                    logits, teacher_logits, temperature, outputs=entry.outputs
                )
                prototype[row, modality], distance[row, modality] = prototype_distillation(
                    features, teacher_features, labels[row : row + 1], entry.num_classes
                )
    return Terms(pixel, prototype, distance, active_students(entry))


def slow_gradients(
    entry: ZooEntry, like: nn.Module, temperature: float, weights: list[float]
) -> dict[str, Tensor]:
    """Gradient of the weighted mean of the pixel terms with respect to every parameter, by name.

    A student of one modality moves the encoder of that modality and whatever is shared, never the encoder of
    another: what a blanked image would send there is left out.

    Args:
        entry: ground truth.
        like: backbone with the weights to use; left as it is.
        temperature: of the pixel distillation.
        weights: of the modalities.
    """
    (_, teacher), after = slow_teacher(entry, like)
    total: dict[str, Tensor] = {}
    for modality, weight in enumerate(weights):
        for group, places in slow_groups(entry, modality):
            model = with_state(entry, like, after)
            _, logits = listen(entry, model, entry.only(modality, group))
            rows = group[places]
            terms = pixel_distillation(logits[places], teacher[rows], temperature, outputs=entry.outputs)
            (weight * terms.sum() / len(teacher)).backward()
            own = {id(p) for p in encoder_parameters(entry, model, modality)}
            others = [m for m in range(len(entry.modalities)) if m != modality]
            foreign = {id(p) for m in others for p in encoder_parameters(entry, model, m)} - own
            for name, parameter in model.named_parameters():
                if parameter.grad is not None and id(parameter) not in foreign:
                    total[name] = total.get(name, 0) + parameter.grad
    return total


def slow_teacher(entry: ZooEntry, like: nn.Module) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Features and logits of the fused pass without gradient, and the state that it leaves."""
    model = without_noise(bare(entry, like))
    features, logits = listen(entry, model, entry.arguments())
    return (features.detach(), logits.detach()), model.state_dict()


def slow_groups(entry: ZooEntry, modality: int) -> list[tuple[Tensor, Tensor]]:
    """Rows to run together, and the places in them that are students."""
    active = active_students(entry)[:, modality]
    rows = active.nonzero().flatten()
    if len(rows) == 0:
        return []
    everyone = torch.arange(len(active))
    groups = {"single": list(rows.split(1)), "rows": [rows], "batch": [everyone]}[entry.reference]
    return [(group, active[group].nonzero().flatten()) for group in groups]


def active_students(entry: ZooEntry) -> Tensor:
    """Bool (B, M): the sample has the modality and at least one other."""
    presence = entry.table()
    return presence & (presence.sum(dim=1, keepdim=True) > 1)


def with_state(entry: ZooEntry, like: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """A fresh backbone without noise in a given state."""
    model = without_noise(bare(entry, like))
    model.load_state_dict(state)
    return model


def encoder_parameters(entry: ZooEntry, backbone: nn.Module, modality: int) -> list[nn.Parameter]:
    """Parameters of the private path of one modality."""
    modules = [backbone.get_submodule(path) for path in entry.encoder_paths(modality)]
    return [parameter for module in modules for parameter in module.parameters()]


def listen(entry: ZooEntry, backbone: nn.Module, arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Features and logits (B, C or K, *spatial) at the classifier."""
    inner = getattr(backbone, "_orig_mod", backbone)  # hooks do not fire inside a compiled module
    caught: list[tuple[Tensor, Tensor]] = []
    classifier = inner.get_submodule(entry.classifier.removeprefix("_orig_mod."))
    handle = classifier.register_forward_hook(lambda _, inputs, output: caught.append((inputs[0], output)))
    run(inner, arguments)
    handle.remove()
    features, logits = caught[0]
    if isinstance(classifier, nn.Linear):
        features, logits = features.movedim(-1, 1), logits.movedim(-1, 1)
    return features, logits


def at_resolution(labels: Tensor, logits: Tensor, outputs: str) -> Tensor:
    """Labels brought to the resolution of ``logits`` by picking the nearest voxel."""
    size = logits.shape[2:]
    if labels.shape[-len(size) :] == size:
        return labels
    if outputs == "sigmoid":
        return F.interpolate(labels.float(), size=size).bool()
    return F.interpolate(labels.unsqueeze(1).float(), size=size).squeeze(1).long()

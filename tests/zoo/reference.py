"""What the library should find, computed the slow way: every student is a run of the bare backbone.

Nothing here knows of replay, of rows, or of the engine. A student sees a blanked copy of the images and a
one-hot mask; a plain forward hook listens at the classifier.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_map

from passion_plugin.losses import pixel_distillation, prototype_distillation

from .entry import ZOO, Arguments, ZooEntry

__all__ = [
    "SlowStep",
    "bare",
    "clone_arguments",
    "encoder_parameters",
    "fingerprint",
    "first_difference",
    "prepared",
    "run",
    "slow_step",
    "without_noise",
]


HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


@dataclass(frozen=True)
class SlowStep:
    """Terms (B, M), zero where there is no student; gradient of the weighted mean of the pixel terms."""

    pixel: Tensor
    prototype: Tensor
    distance: Tensor
    active: Tensor
    gradients: dict[str, Tensor]


def prepared(entry: ZooEntry) -> nn.Module:
    """A fresh backbone whose lazy parameters have their values, always the same ones."""
    backbone = entry.backbone()
    if any(is_lazy(parameter) for parameter in backbone.parameters()):
        run(backbone, entry.arguments())
        return bare(entry, backbone)
    return backbone


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
    torch.default_generator.manual_seed(7)  # torch.manual_seed walks the stack for a CUDA not yet started
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


def fingerprint(backbone: nn.Module) -> dict[str, Any]:
    """Whatever a wrapper could leave behind: attributes, hooks, replaced forwards, other modules or keys."""
    traces: dict[str, Any] = {"keys": list(backbone.state_dict()), "class": type(backbone)}
    for name, module in backbone.named_modules(remove_duplicate=False):
        traces[f"{name} attributes"] = sorted(vars(module))
        traces[f"{name} forward"] = module.__dict__.get("forward")
        traces[f"{name} hooks"] = {hook: list(getattr(module, hook) or ()) for hook in HOOKS}
        traces[f"{name} mode"] = module.training
    for name, parameter in backbone.named_parameters():
        traces[f"{name} gradient hooks"] = len(parameter._backward_hooks or {})
        traces[f"{name} accumulation hooks"] = len(getattr(parameter, "_post_accumulate_grad_hooks", None) or {})
    return traces


@functools.cache
def slow_step(name: str, temperature: float) -> SlowStep:
    """Terms and gradients of one step, from one run of the bare backbone per student.

    A student of one modality moves the encoder of that modality and whatever is shared, never the encoder of
    another: what a blanked image would send there is left out.

    Args:
        name: of the entry; weights are those of a fresh backbone.
        temperature: of the pixel distillation.
    """
    entry = ZOO[name]
    model = without_noise(prepared(entry))
    features, logits = (tensor.detach() for tensor in listen(entry, model, entry.arguments()))
    after = copy.deepcopy(model.state_dict())
    presence, labels = entry.table(), at_resolution(entry.labels(), features, entry.outputs)
    weights = 1 / entry.training_table().double().mean(dim=0)
    pixel, prototype, distance = (torch.zeros(presence.shape, dtype=logits.dtype) for _ in range(3))
    gradients: dict[str, Tensor] = {}
    for modality, weight in enumerate(weights.tolist()):
        for group, places in slow_groups(entry, modality):
            rows = group[places]
            model.load_state_dict(after)
            model.zero_grad()
            student_features, student_logits = listen(entry, model, entry.only(modality, group))
            terms = pixel_distillation(student_logits[places], logits[rows], temperature, outputs=entry.outputs)
            (weight * terms.sum() / len(presence)).backward()
            pixel[rows, modality] = terms.detach()
            prototype[rows, modality], distance[rows, modality] = prototype_distillation(
                student_features[places].detach(), features[rows], labels[rows], entry.num_classes
            )
            own = {id(p) for p in encoder_parameters(entry, model, modality)}
            others = [m for m in range(len(entry.modalities)) if m != modality]
            foreign = {id(p) for m in others for p in encoder_parameters(entry, model, m)} - own
            for name, parameter in model.named_parameters():
                if parameter.grad is not None and id(parameter) not in foreign:
                    gradients[name] = gradients.get(name, torch.zeros(())) + parameter.grad
    return SlowStep(pixel, prototype, distance, active_students(entry), gradients)


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


def at_resolution(labels: Tensor, features: Tensor, outputs: str) -> Tensor:
    """Labels brought to the resolution of ``features`` by picking the nearest voxel."""
    size = features.shape[2:]
    if labels.shape[-len(size) :] == size:
        return labels
    if outputs == "sigmoid":
        return F.interpolate(labels.float(), size=size).bool()
    return F.interpolate(labels.unsqueeze(1).float(), size=size).squeeze(1).long()

"""What can be read off a network without running it."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = ["Anatomy", "anatomy", "batch_layers", "dropout_layers"]

_PARALLEL = "DataParallel is not supported: wrap its .module, and use DistributedDataParallel around the wrapper"
_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Anatomy:
    """Static properties.

    Attributes:
        normalisation: number of layers by class name.
        batch_statistics: batch normalisation layers, whose statistics couple the samples in training.
        no_running: those of them that use batch statistics in evaluation too.
        dropout: number of dropout layers with a rate above zero.
        frozen: names of parameters that do not require gradient.
        shared: groups of names of one parameter.
        in_place: modules that work in place.
        parallel: remark on a DataParallel, empty when there is none.
        wrappers: remarks on compiled, scripted and distributed modules.
    """

    normalisation: dict[str, int]
    batch_statistics: int
    no_running: int
    dropout: int
    frozen: tuple[str, ...]
    shared: tuple[tuple[str, ...], ...]
    in_place: tuple[str, ...]
    parallel: str
    wrappers: tuple[str, ...]


def anatomy(backbone: nn.Module) -> Anatomy:
    """Count and name what a student pass could disturb."""
    modules = dict(backbone.named_modules())
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in backbone.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    batch = batch_layers(backbone)
    norms = [type(module).__name__ for module in modules.values() if isinstance(module, _NORMS)]
    return Anatomy(
        normalisation=dict(Counter(norms)),
        batch_statistics=len(batch),
        no_running=sum(layer.running_mean is None for layer in batch),
        dropout=sum(layer.p > 0 for layer in dropout_layers(backbone)),
        frozen=tuple(name for name, parameter in backbone.named_parameters() if not parameter.requires_grad),
        shared=tuple(tuple(group) for group in names.values() if len(group) > 1),
        in_place=tuple(name for name, module in modules.items() if vars(module).get("inplace") is True),
        parallel=_PARALLEL if any(isinstance(module, nn.DataParallel) for module in modules.values()) else "",
        wrappers=tuple(_wrappers(modules)),
    )


def batch_layers(backbone: nn.Module) -> list[nn.Module]:
    """Return the layers that give a sample something else in training when other samples are not there."""
    return [module for module in backbone.modules() if isinstance(module, _BatchNorm)]


def dropout_layers(backbone: nn.Module) -> list[_DropoutNd]:
    """Return the layers of torch that draw random numbers in training."""
    return [module for module in backbone.modules() if isinstance(module, _DropoutNd)]


def _wrappers(modules: dict[str, nn.Module]) -> list[str]:
    remarks = []
    for name, module in modules.items():
        kind, where = type(module).__name__, repr(name) if name else "the backbone"
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            remarks.append(f"{where} is a {kind}: wrap the bare network, and put {kind} around the wrapper")
        elif isinstance(module, torch.jit.ScriptModule):
            remarks.append(f"{where} is a ScriptModule, whose parts cannot be listened to: pass the module")
            break
        elif kind == "OptimizedModule":
            remarks.append(f"{where} is compiled; listening to its parts will compile some of them again")
    return remarks

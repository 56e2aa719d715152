"""Importing a model from a checkout of its repository, reduced in memory only."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["images", "labels", "load", "on_cpu"]


def load(folder: Path, name: str, **constants: Any) -> ModuleType:
    """Import a module, and afterwards forget it and its siblings, which are called ``layers`` or ``utils`` everywhere.

    Args:
        folder: what the module's own imports are relative to.
        name: dotted name from there.
        **constants: global names of the module to set after the import, to make the network smaller.

    Returns:
        The module; what it imported stays reachable through it.

    Raises:
        FileNotFoundError: there is no such file.
        AttributeError: the module has no such constant, so that the recipe does not fit this commit.
    """
    file = folder / f"{name.replace('.', '/')}.py"
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: is this a checkout of the repository that the recipe names?")
    # A sibling called `utils` must not be found among the modules of somebody else.
    siblings = {entry.stem for entry in folder.iterdir()}
    hidden = {key: module for key, module in sys.modules.items() if key.partition(".")[0] in siblings}
    for key in hidden:
        del sys.modules[key]
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = writes
        for key in [key for key in sys.modules if key.partition(".")[0] in siblings]:
            del sys.modules[key]
        sys.modules.update(hidden)
    for constant, value in constants.items():
        getattr(module, constant)
        setattr(module, constant, value)
    return module


def on_cpu() -> None:
    """Let ``tensor.cuda()`` in the code of a model do nothing in this process."""
    Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign,assignment]


def images(size: int, *, modalities: int = 4, batch: int = 2, ndim: int = 3) -> Tensor:
    """Noise of unit variance, float32 (batch, modalities, size, …)."""
    return torch.randn(batch, modalities, *[size] * ndim, generator=torch.Generator().manual_seed(0))


def labels(size: int, *, classes: int = 4, batch: int = 2, ndim: int = 3) -> Tensor:
    """Random labels, int64 (batch, size, …)."""
    return torch.randint(classes, (batch, *[size] * ndim), generator=torch.Generator().manual_seed(1))

"""The add-on state as a file, written whole or not at all, and read without running anything that is in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from passion_plugin import addon_tensors
from passion_plugin.errors import ConfigError
from passion_plugin.find import find_engine

__all__ = ["load_addon", "read_addon", "save_addon"]

_SUFFIX = ".safetensors"


def save_addon(model: Any, path: str | os.PathLike[str]) -> None:
    """Write the add-on state of a model: everything that is ours and nothing of the backbone.

    The file appears complete or not at all: it is written beside ``path`` and renamed.

    Args:
        model: the wrapper, what :meth:`Passion.attach` returned, or a module around them (DistributedDataParallel, a
            compiled module, a LightningModule, …); see :func:`~passion_plugin.find.find_engine`.
        path: ends in ``.safetensors`` for that format (extra ``safetensors``), in anything else for ``torch.save``.

    Raises:
        UsageError: there is no engine in ``model``, or there are several, or its heads are sharded.
        ConfigError: a rule of your own keeps something that safetensors cannot hold.
        ImportError: safetensors is not installed.
    """
    state, path = find_engine(model).state_dict(), Path(path)
    write: Callable[[Any, Path], object] = addon_tensors.write if path.suffix == _SUFFIX else torch.save
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(state, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_addon(model: Any, path: str | os.PathLike[str]) -> None:
    """Restore what :func:`save_addon` wrote; a file that does not fit changes nothing.

    Args:
        model: as for :func:`save_addon`; with the modalities, the strategy and the settings of the one that was saved.
        path: of the file, with the ending it was saved under.

    Raises:
        UsageError: there is no engine in ``model``, or there are several, or its heads are sharded.
        ConfigError: listing why the file cannot be read or its content does not fit.
        OSError: there is no such file, or it may not be read.
        ImportError: safetensors is not installed.
    """
    find_engine(model).load_state_dict(read_addon(path))


def read_addon(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return the state in a file, unchecked but for the format of the file; nothing in it is run.

    Args:
        path: of the file, with the ending it was saved under.

    Returns:
        What ``load_addon_state_dict`` takes.

    Raises:
        ConfigError: it cannot be read.
        OSError: there is no such file, or it may not be read.
        ImportError: safetensors is not installed.
    """
    path = Path(path)
    flat = path.suffix == _SUFFIX
    # Whether it can be opened at all is for the operating system to say.
    path.open("rb").close()
    try:
        state = addon_tensors.read(path) if flat else torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    # A file may be broken in any way, and its reader stumble over it anywhere.
    except Exception as error:
        kind = "safetensors" if flat else "torch.save"
        raise ConfigError(
            f"{path} cannot be read as an add-on state in the format of {kind} ({type(error).__name__}: "
            f"{str(error)[:200]}). It may be cut off, of another kind, or hold more than tensors, numbers and names, "
            "which is never run"
        ) from error
    if not isinstance(state, Mapping):
        raise ConfigError(f"{path} holds a {type(state).__name__}, not an add-on state as save_addon() writes it")
    return state

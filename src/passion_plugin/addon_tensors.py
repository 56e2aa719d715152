"""The add-on state in the safetensors format: tensors by path, and everything else as JSON in the header.

A tensor is named by the keys that lead to it, joined as in RFC 6901 (JSON pointer): ``preference/beta``; a slash in a
key is written ``~1``, a tilde ``~0``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from passion_plugin.errors import ConfigError
from passion_plugin.optional import require

__all__ = ["read", "write"]

_ENTRY = "passion_plugin"
# A state has a few names and numbers. JSON takes far more memory than text, and its reader has no limit of its own.
_LARGEST_HEADER = 1 << 22


def write(state: Mapping[str, Any], path: Path) -> None:
    """Write a state.

    Args:
        state: mappings with text keys, of tensors, numbers, texts, None and lists of those.
        path: of the file.

    Raises:
        ConfigError: naming what is none of these.
        ImportError: safetensors is not installed.
    """
    safetensors = _require("safetensors.torch")
    tensors: dict[str, Tensor] = {}
    rest = _without_tensors(state, "", tensors)
    safetensors.save_file(tensors, str(path), metadata={_ENTRY: json.dumps(rest)})


def read(path: Path) -> Any:
    """Return what :func:`write` wrote, or raise an error of any kind.

    Args:
        path: of the file.

    Raises:
        ImportError: safetensors is not installed.
    """
    safetensors = _require("safetensors")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _LARGEST_HEADER:
        raise ConfigError(f"its header has {length} bytes, at most {_LARGEST_HEADER} are read")
    with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
        state = json.loads((file.metadata() or {})[_ENTRY])
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            *parents, last = [key.replace("~1", "/").replace("~0", "~") for key in name.split("/")]
            place = state
            for key in parents:
                place = place[key]
            if last in place:
                raise ConfigError(f"{name!r} is in it twice")
            place[last] = file.get_tensor(name)
    return state


def _without_tensors(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return what JSON can hold of a state, and add its tensors."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        rest = {}
        for key, inner in value.items():
            name = key.replace("~", "~0").replace("/", "~1")
            name = f"{path}/{name}" if path else name
            if isinstance(inner, Tensor):
                # A copy: safetensors refuses tensors that share memory or lie in it with gaps.
                tensors[name] = inner.detach().clone().contiguous()
            else:
                rest[key] = _without_tensors(inner, name, tensors)
        return rest
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_without_tensors(inner, path, tensors) for inner in value]
    raise ConfigError(f"safetensors cannot hold {path!r}, a {type(value).__name__}: use a name that ends in .pt")


def _require(module: str) -> Any:
    return require(module, extra="safetensors", purpose="an add-on state that ends in .safetensors")

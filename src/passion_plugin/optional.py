"""Imports of optional packages, at the moment they are used."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["require"]


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import ``module`` or say which extra of this package brings it.

    Args:
        module: dotted name of the module.
        extra: name of the extra that installs it.
        purpose: what needs it, the start of the message.

    Returns:
        The module.

    Raises:
        ImportError: when it is not installed, with the exact pip line.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{purpose} needs {package}, which could not be imported ({error}). "
            f'Install it with: pip install "passion-plugin[{extra}]"'
        ) from error

"""A TensorBoard writer for loggers that take a dict."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from passion_plugin.errors import require

__all__ = ["TensorBoardLog"]


class TensorBoardLog:
    """One scalar per entry; for :func:`~passion_plugin.integrations.logging.log_metrics` and what builds on it.

    Args:
        writer: a folder, or an existing ``SummaryWriter`` (or anything with ``add_scalar``).

    Raises:
        ImportError: tensorboard is not installed (the ``tensorboard`` extra).
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        if isinstance(writer, (str, os.PathLike)):
            # First, for its name: torch.utils.tensorboard only says that there is no such module.
            require("tensorboard", extra="tensorboard", purpose="TensorBoardLog")
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(os.fspath(writer))

    def __call__(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one scalar per entry."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is pending and close the files."""
        self.writer.close()

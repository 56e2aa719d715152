"""`model.passion.metrics()` to any logger that takes a dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from passion_plugin.errors import ConfigError
from passion_plugin.training import find_engine

__all__ = ["Log", "MetricsLogger", "log_metrics"]

Log: TypeAlias = Callable[..., Any]
"""``log(metrics)`` or ``log(metrics, step=step)``: ``wandb.log``, ``mlflow.log_metrics``, ``fabric.log_dict``,
``accelerator.log``, ``log_metrics`` of a Lightning logger, or a function of your own."""


def log_metrics(model: Any, log: Log, step: int | None = None, *, prefix: str = "passion/") -> dict[str, float]:
    """Hand ``model.passion.metrics()`` to a logger. The device is waited for.

    Args:
        model: see :func:`~passion_plugin.find.find_engine`.
        log: called as ``log(metrics, step=step)``, or ``log(metrics)`` without a step; not at all while there is
            nothing to log.
        step: number of the step, for loggers that take one.
        prefix: put before each name of :meth:`PassionEngine.metrics <passion_plugin.PassionEngine.metrics>`.

    Returns:
        What was logged.

    Raises:
        UsageError: the model has no engine, or several.
    """
    metrics = {f"{prefix}{name}": value for name, value in find_engine(model).metrics().items()}
    if metrics and step is None:
        log(metrics)
    elif metrics:
        log(metrics, step=step)
    return metrics


class MetricsLogger:
    """The same every so many steps; in between, the device is not waited for.

    Args:
        log: see :func:`log_metrics`.
        every: log at steps that are multiples of this.
        prefix: put before each name.

    Raises:
        ConfigError: ``every`` is less than 1.

    Example:
        >>> logger = MetricsLogger(print, every=50)  # MetricsLogger(wandb.log, every=50)
        >>> logger(model, step)  # doctest: +SKIP
    """

    def __init__(self, log: Log, *, every: int = 1, prefix: str = "passion/") -> None:
        if every < 1:
            raise ConfigError(f"MetricsLogger: every={every!r}: pass a number of steps, 1 or more")
        self.log, self.every, self.prefix = log, every, prefix

    def __call__(self, model: Any, step: int) -> None:
        """Log the metrics of the model if it is time to."""
        if step % self.every == 0:
            log_metrics(model, self.log, step, prefix=self.prefix)

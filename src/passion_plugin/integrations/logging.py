"""Metrics of the engine for any logger that takes a dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from passion_plugin.errors import ConfigError
from passion_plugin.training import find_engine

__all__ = ["MetricsLogger", "log_metrics"]


def log_metrics(
    model: Any, log: Callable[..., Any], step: int | None = None, *, prefix: str = "passion/"
) -> dict[str, float]:
    """Pass ``model.passion.metrics()`` to a logger. This waits for the device.

    Args:
        model: see :func:`~passion_plugin.training.find_engine`.
        log: ``wandb.log``, ``mlflow.log_metrics``, ``fabric.log_dict``, ``accelerator.log``, ``log_metrics`` of a
            Lightning logger, or a function of your own. Called as ``log(metrics, step=step)``, or ``log(metrics)``
            without a step; not called while there are no metrics.
        step: number of the step, for loggers that take one.
        prefix: put before each name of :meth:`metrics() <passion_plugin.training.PassionEngine.metrics>`.

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
    """Call :func:`log_metrics` every so many steps, as ``logger(model, step)``; other steps do not wait for the device.

    Args:
        log: see :func:`log_metrics`.
        every: log at steps that are multiples of this.
        prefix: put before each name.

    Raises:
        ConfigError: ``every`` is less than 1.
    """

    def __init__(self, log: Callable[..., Any], *, every: int = 1, prefix: str = "passion/") -> None:
        if every < 1:
            raise ConfigError(f"MetricsLogger: every={every!r}: pass a number of steps, 1 or more")
        self.log, self.every, self.prefix = log, every, prefix

    def __call__(self, model: Any, step: int) -> None:
        """Log the metrics of the model if ``step`` is a multiple of ``every``."""
        if step % self.every == 0:
            log_metrics(model, self.log, step, prefix=self.prefix)

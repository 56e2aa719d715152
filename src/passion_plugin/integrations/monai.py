"""A handler for MONAI's ``SupervisedTrainer`` and other ignite engines."""

from __future__ import annotations

from typing import Any

from passion_plugin.errors import UsageError, require
from passion_plugin.integrations.logging import MetricsLogger
from passion_plugin.training import find_engine

__all__ = ["PassionHandler"]


class PassionHandler:
    """``end_epoch()`` at the end of each epoch of a trainer, and logging.

    The loss comes from :class:`~passion_plugin.integrations.loss.PassionLoss`, the mask from ``prepare_batch``; the
    trainer stays as it is. Put this handler before those that save checkpoints or print ``engine.state.metrics``.

    Args:
        model: see :func:`~passion_plugin.training.find_engine`.
        logger: called after each iteration with the engine and the number of the iteration.
        prefix: put before the names in ``engine.state.metrics``, where the metrics are after each epoch.

    Raises:
        UsageError: the model has no engine, or several; attached to an evaluator.
        ImportError: MONAI or ignite is not installed (the ``monai`` extra).
    """

    def __init__(self, model: Any, *, logger: MetricsLogger | None = None, prefix: str = "passion/") -> None:
        self.passion = find_engine(model)
        self.logger, self.prefix = logger, prefix
        self._events = require("ignite.engine", extra="monai", purpose="PassionHandler").Events
        self._evaluator = require("monai.engines", extra="monai", purpose="PassionHandler").Evaluator

    def attach(self, engine: Any) -> None:
        """Register with a trainer, an ``ignite.engine.Engine`` such as ``SupervisedTrainer``."""
        if isinstance(engine, self._evaluator):
            raise UsageError(
                f"PassionHandler ends training epochs: attach it to the trainer, not to a {type(engine).__name__}"
            )
        engine.add_event_handler(self._events.ITERATION_COMPLETED, self.iteration_completed)
        engine.add_event_handler(self._events.EPOCH_COMPLETED, self.epoch_completed)

    def iteration_completed(self, engine: Any) -> None:
        """Log the step."""
        if self.logger is not None:
            self.logger(self.passion, engine.state.iteration)

    def epoch_completed(self, engine: Any) -> None:
        """End the epoch, and write the metrics to ``engine.state.metrics``, where other handlers look for them."""
        self.passion.end_epoch()
        others = {name: value for name, value in engine.state.metrics.items() if not name.startswith(self.prefix)}
        ours = {f"{self.prefix}{name}": value for name, value in self.passion.metrics().items()}
        engine.state.metrics = {**others, **ours}

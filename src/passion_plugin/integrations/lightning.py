"""A Lightning callback: the end of the epoch, logging, and the state of the engine in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from passion_plugin.errors import require
from passion_plugin.integrations.logging import log_metrics
from passion_plugin.training import find_engine, get_passion_state_dict, set_passion_state_dict

__all__ = ["PassionCallback"]

Callback: Any = require("lightning.pytorch", extra="lightning", purpose="PassionCallback").Callback


class PassionCallback(Callback):
    """Everything but the loss: that is one line of your ``training_step``.

    * ``end_epoch()`` once per training epoch, before checkpoints of that epoch are saved; never in sanity checks,
      validation or test;
    * :meth:`metrics() <passion_plugin.training.PassionEngine.metrics>` every ``Trainer(log_every_n_steps=...)``
      optimizer steps to the loggers, and at the end of the epoch through ``log_dict``, so that other callbacks can
      monitor them. The steps are Lightning's ``global_step``, which counts those of all optimizers;
    * the state of the engine in the checkpoint, and back from there with ``ckpt_path=``: a wrapper in the
      LightningModule is in its ``state_dict``, an attached engine is saved by this callback.

    Args:
        model: see :func:`~passion_plugin.training.find_engine`; None finds the engine in the LightningModule when
            ``fit`` starts. With several, use one callback for each.
        prefix: put before each name; different for each of several callbacks.

    Raises:
        UsageError: there is no wrapper or there are several; without ``model`` when ``fit`` starts.
    """

    def __init__(self, model: Any = None, *, prefix: str = "passion/") -> None:
        super().__init__()
        self.prefix = prefix
        self._given = None if model is None else find_engine(model)
        self._engine: Any = self._given
        self._in_module = False
        self._open_epoch: int | None = None
        self._restored: Mapping[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Name of this callback in a checkpoint."""
        key: str = self._generate_state_key(prefix=self.prefix)
        return key

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the engine."""
        self._engine = self._given or find_engine(pl_module)
        self._in_module = any(module is self._engine for module in pl_module.modules())

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore the state; here, because a checkpoint may be read before the engine is known."""
        if self._restored is not None:
            set_passion_state_dict(self._engine, self._restored)
            self._restored = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note which epoch is measured."""
        if self._open_epoch not in (None, trainer.current_epoch):
            # Resumed from a checkpoint of the last batch: Lightning goes on without ending that epoch.
            self._engine.end_epoch()
        self._open_epoch = trainer.current_epoch

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Log the last micro-batch, under the number that Lightning gives this step."""
        every = trainer.log_every_n_steps  # 0: Lightning logs no steps.
        if every and trainer.loggers and (trainer.global_step + 1) % every == 0:
            for logger in trainer.loggers:
                log_metrics(self._engine, logger.log_metrics, trainer.global_step, prefix=self.prefix)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """End the epoch, and log its metrics."""
        if self._open_epoch is None:
            # Nothing was trained since the last end: a run that resumes calls this hook once more.
            return
        self._engine.end_epoch()
        self._open_epoch = None
        log_metrics(self._engine, pl_module.log_dict, prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """Return the running epoch, and the state of an engine that the LightningModule does not save."""
        if self._engine is None:
            return {}
        state = {} if self._in_module else {"passion": get_passion_state_dict(self._engine)}
        return {"open_epoch": self._open_epoch, **state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned; the engine is restored when training starts."""
        self._open_epoch, self._restored = state_dict.get("open_epoch"), state_dict.get("passion")

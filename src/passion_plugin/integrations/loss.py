"""The distillation as part of a loss function, for trainers that call ``loss(prediction, target)`` themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from passion_plugin.training import find_engine

__all__ = ["PassionLoss"]


class PassionLoss(nn.Module):
    """The user's loss plus ``passion_loss``, for trainers that own the loop.

    In ``eval()`` and without gradients there is nothing to distil and the result is the user's loss alone; the same
    object can serve in validation.

    Args:
        loss: the user's own, ``loss(prediction, target)`` to a tensor of any shape.
        model: see :func:`~passion_plugin.training.find_engine`. It does not become a part of this module.

    Raises:
        UsageError: the model has no engine, or several.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor], model: Any) -> None:
        super().__init__()
        self.loss = loss
        engine = find_engine(model)
        # In a tuple: nn.Module would register them, and the parameters of a model are not those of its loss as well.
        self._parts = (engine, engine.backbone if model is engine else model)

    def forward(self, prediction: Any, target: Any) -> Tensor:
        """Return the user's loss plus that of the last forward.

        Args:
            prediction: what the model returned: scores (B, K, *spatial), or a list or tuple that begins with them.
            target: what the user's loss takes: integer labels (B, *spatial) or (B, 1, *spatial), one-hot or region
                masks (B, K, *spatial), or, for deep supervision, a list that begins with one of these.

        Raises:
            UsageError: in training, the model was not called since the last loss.
            InputError: the target has the wrong shape, dtype or content.
        """
        loss = self.loss(prediction, target)
        engine, model = self._parts
        if not engine.should_distil(model.training):
            return loss
        # Of deep supervision or several outputs the first: the finest resolution, the main output.
        scores, labels = (value[0] if isinstance(value, list | tuple) else value for value in (prediction, target))
        if isinstance(scores, Tensor) and labels.ndim == scores.ndim and labels.shape[1] == 1 < scores.shape[1]:
            labels = labels[:, 0]
        return loss + engine.loss(labels)

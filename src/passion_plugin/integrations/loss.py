"""The distillation as part of a loss function, for trainers that call ``loss(prediction, target)`` themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from passion_plugin.training import find_engine

__all__ = ["PassionLoss"]


class PassionLoss(nn.Module):
    """The user's loss plus ``passion_loss``: where a trainer owns the loop, the loss is the place to add it.

    In ``eval()`` and without gradients there is nothing to distil and the result is the user's loss alone; the same
    object can serve in validation.

    Args:
        loss: the user's own, ``loss(prediction, target)`` to a tensor of any shape.
        model: see :func:`~passion_plugin.find.find_engine`. It does not become a part of this module.

    Raises:
        UsageError: the model has no engine, or several.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor], model: Any) -> None:
        super().__init__()
        self.loss = loss
        self.passion = find_engine(model)
        # In a tuple, so that the parameters of the model are not those of its loss as well.
        self._model = (model if isinstance(model, nn.Module) else self.passion.backbone,)

    def forward(self, prediction: Any, target: Any) -> Tensor:
        """Return the user's loss plus that of the last forward.

        Args:
            prediction: what the model returned: scores (B, K, *spatial), or a list or tuple that begins with them.
            target: what the user's loss takes: whole-number labels (B, *spatial) or (B, 1, *spatial), one-hot or
                region masks (B, K, *spatial), or, for deep supervision, a list that begins with one of these.

        Raises:
            UsageError: in training, the model was not called since the last loss.
            InputError: the target has the wrong shape, dtype or content.
        """
        loss = self.loss(prediction, target)
        if not self.passion.should_distil(self._model[0].training):
            return loss
        scores, labels = _finest(prediction), _finest(target)
        if isinstance(scores, Tensor) and labels.ndim == scores.ndim and labels.shape[1] == 1 < scores.shape[1]:
            labels = labels[:, 0]
        return loss + self.passion.loss(labels)


def _finest(value: Any) -> Any:
    """The first entry of a list or tuple: the finest resolution of deep supervision, the main output of several."""
    return value[0] if isinstance(value, (list, tuple)) else value

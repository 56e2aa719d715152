"""How a model is asked for scores: in one call, or window by window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from passion_plugin.errors import InputError, require

__all__ = ["Predict", "call_model", "sliding_window_predict"]

Predict: TypeAlias = Callable[[Any, Any, Tensor], Tensor]
"""``predict(model, x, mask)`` -> scores (B, K, *spatial); ``mask`` is bool (B, M), True = present."""

_SCORE_KEYS = ("logits", "out", "prediction", "pred", "seg")


def call_model(model: Any, x: Any, mask: Tensor) -> Tensor:
    """Call ``model(x, mask)`` and find the scores in what it returns.

    Args:
        model: any callable.
        x: its input.
        mask: bool (B, M).

    Returns:
        The output itself; the first entry of a tuple or list; of a dict its only tensor or the first of
        ``"logits"``, ``"out"``, ``"prediction"``, ``"pred"``, ``"seg"``.

    Raises:
        InputError: the output is something else; ``predict=`` is then the way.
    """
    output = model(x, mask)
    if isinstance(output, Mapping):
        tensors = {key: value for key, value in output.items() if isinstance(value, Tensor)}
        named = [tensors[key] for key in _SCORE_KEYS if key in tensors]
        output = named[0] if named else next(iter(tensors.values())) if len(tensors) == 1 else output
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        keys = f" with keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
        raise InputError(
            f"the model returned a {type(output).__name__}{keys}, and which part is the scores is unclear. "
            "Pass predict=lambda model, x, mask: ... that returns them as (B, K, *spatial)."
        )
    return output


def sliding_window_predict(
    roi_size: int | Sequence[int],
    *,
    sw_batch_size: int = 4,
    overlap: float = 0.5,
    blend: Literal["constant", "gaussian"] = "constant",
    predict: Predict = call_model,
) -> Predict:
    """Make a ``predict`` that runs MONAI's sliding-window inference.

    Windows of several samples meet in one window batch; each is sent with the mask row of the sample it was
    cut from. Scores of overlapping windows are averaged before argmax or sigmoid.

    Args:
        roi_size: size of a window, one number or one per spatial axis.
        sw_batch_size: windows per call of the model.
        overlap: overlap of neighbouring windows, as a fraction of the window, in [0, 1).
        blend: ``"constant"`` weights all voxels of a window alike, ``"gaussian"`` its centre more.
        predict: how one batch of windows is run.

    Returns:
        A function for ``evaluate_subsets(..., predict=...)``; its ``x`` must be a tensor (B, M, *spatial).

    Raises:
        ImportError: MONAI is not installed.
    """
    sliding_window = require("monai.inferers", extra="monai", purpose="sliding_window_predict").sliding_window_inference

    def predict_by_windows(model: Any, x: Any, mask: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise InputError(f"sliding_window_predict needs a tensor (B, M, *spatial), not a {type(x).__name__}.")

        def run(windows: Tensor, coordinates: Sequence[Sequence[slice]]) -> Tensor:
            # The first slice of a window's coordinates picks its sample: the order of windows is MONAI's.
            rows = torch.tensor([window[0].start for window in coordinates], device=mask.device)
            scores = predict(model, windows, mask[rows])
            # MONAI weights the scores in place; a model may have returned a view of its input.
            return scores.to(x.dtype, copy=True)

        scores: Tensor = sliding_window(x, roi_size, sw_batch_size, run, overlap=overlap, mode=blend, with_coord=True)
        return scores

    return predict_by_windows

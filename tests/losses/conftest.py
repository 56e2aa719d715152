"""Fixtures of the tests of operators and kernels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        allocate = getattr(owner, name)

        def filled(*args: object, _allocate: Any = allocate, **kwargs: object) -> Tensor:
            tensor = _allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(owner, name, filled)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each Triton kernel is launched during the test."""
    from passion_plugin.losses.kernels import _pixel, _pixel_upsampled, _prototype, _segmentation

    counts: Counter[str] = Counter()
    for module in (_pixel, _pixel_upsampled, _prototype, _segmentation):
        launch = module.launch

        def counted(
            kernel: Any, *rest: Any, _launch: Any = launch, _name: str = module.__name__, **settings: Any
        ) -> None:
            counts[f"{_name.rpartition('.')[2]}.{kernel.__name__}"] += 1
            _launch(kernel, *rest, **settings)

        monkeypatch.setattr(module, "launch", counted)
    return counts

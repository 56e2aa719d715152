"""Slow weights that follow the trained ones at a distance (Reptile), the averaging of the authors' follow-up HGA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from passion_plugin.errors import ConfigError, raise_problems
from passion_plugin.plain_values import is_number, is_whole

__all__ = ["SlowWeights"]


class SlowWeights:
    r"""Average the weights over bursts of training steps (Reptile; Nichol et al. 2018, arXiv:1803.02999).

    After every ``every`` steps of the optimizer, with :math:`\theta` the weights it has reached,

    .. math:: \varphi \leftarrow \varphi + r\,(\theta - \varphi), \qquad \theta \leftarrow \varphi .

    When each step trains on another combination of modalities (:class:`~passion_plugin.missing.EvenSubsets`), a burst
    over all of them ends in weights that no single combination has pulled away. Buffers and frozen parameters are
    left alone, and so is the state of the optimizer.

    Args:
        model: whose trainable parameters are averaged, in place.
        rate: r, in (0, 1]; 1 changes nothing.
        every: steps in a burst.

    Raises:
        ConfigError: listing every number that makes no sense.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> slow = SlowWeights(model, rate=0.25, every=2)
        >>> for _ in range(2):
        ...     with torch.no_grad():
        ...         model.weight += 2
        ...     _ = slow.step()
        >>> model.weight.item()  # 0 + 0.25 * (4 - 0)
        1.0
    """

    def __init__(self, model: nn.Module, *, rate: float = 0.5, every: int = 15) -> None:
        problems = []
        if not is_number(rate, above=0, most=1):
            problems.append(f"rate must be in (0, 1], got {rate!r}")
        if not is_whole(every, least=1):
            problems.append(f"every must be an integer, 1 or more, got {every!r}")
        raise_problems(problems, what="SlowWeights")
        self.rate, self.every, self.steps = float(rate), int(every), 0
        self._fast = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._slow = {name: p.detach().clone() for name, p in self._fast.items()}

    @torch.no_grad()
    def step(self) -> bool:
        """Count a step; to be called after each ``optimizer.step()``.

        Returns:
            Whether the weights were averaged.
        """
        self.steps += 1
        if self.steps % self.every:
            return False
        for name, fast in self._fast.items():
            slow = self._slow[name] = self._slow[name].to(fast.device)
            slow.lerp_(fast, self.rate)
            fast.copy_(slow)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the slow weights and the position in the burst, on the CPU."""
        return {"steps": self.steps, "slow": {name: tensor.to("cpu", copy=True) for name, tensor in self._slow.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ConfigError: it belongs to another model.
        """
        slow: Mapping[str, Tensor] = state["slow"]
        problems = [f"no weights for {name!r}" for name in self._slow if name not in slow]
        problems += [
            f"{name!r} has shape {tuple(tensor.shape)}, here it is {tuple(self._slow[name].shape)}"
            if name in self._slow
            else f"unknown parameter {name!r}"
            for name, tensor in slow.items()
            if name not in self._slow or tensor.shape != self._slow[name].shape
        ]
        raise_problems(problems, what="state of SlowWeights", error=ConfigError)
        self.steps = int(state["steps"])
        self._slow = {name: slow[name].to(fast, copy=True) for name, fast in self._fast.items()}

"""Average weights over bursts of steps (Reptile), as the follow-up of PASSION's authors, HGA, does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from passion_plugin._validate import is_int, is_number
from passion_plugin.errors import ConfigError, raise_problems
from passion_plugin.training import cpu_copies, state_problems


class SlowWeights:
    r"""Average the weights over bursts of training steps (Reptile; Nichol et al. 2018, arXiv:1803.02999).

    After every ``every`` steps of the optimizer, with :math:`\theta` the weights it has reached,

    .. math:: \varphi \leftarrow \varphi + r\,(\theta - \varphi), \qquad \theta \leftarrow \varphi .

    When each step trains on another combination of modalities (:class:`~passion_plugin.data.EvenSubsets`), a burst
    over all of them ends in weights that no single combination has pulled away. Buffers, frozen parameters and the
    state of the optimizer stay as they are. :math:`\varphi` starts as a copy of the weights that the model has now.

    Args:
        model: whose trainable parameters are averaged, in place.
        rate: r, in (0, 1]; 1 changes nothing.
        every: steps in a burst.

    Raises:
        ConfigError: a number that makes no sense.

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
        if not is_number(rate, above=0, most=1):
            raise ConfigError(f"SlowWeights: rate must be in (0, 1], got {rate!r}")
        if not is_int(every, least=1):
            raise ConfigError(f"SlowWeights: every must be an integer, 1 or more, got {every!r}")
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
        """Return the slow weights, the position in the burst and both numbers, on the CPU."""
        return {"rate": self.rate, "every": self.every, "steps": self.steps, "slow": cpu_copies(self._slow)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ConfigError: it is no such state, or one of another model or with other numbers; nothing has been changed.
        """
        raise_problems(state_problems(self.state_dict(), state), what="state of SlowWeights")
        raise_problems(state_problems(self._slow, state["slow"]), what="state of SlowWeights, its weights")
        options = {"rate": self.rate, "every": self.every}
        changed = [f"{key} was {state[key]!r} and is {now!r} now" for key, now in options.items() if state[key] != now]
        raise_problems(changed, what="state of SlowWeights")
        self.steps = state["steps"]
        self._slow = {name: state["slow"][name].to(fast, copy=True) for name, fast in self._fast.items()}

"""Autograd hooks that scale gradients, modality by modality.

Tensor hooks only: full backward hooks on modules raise when an in-place ReLU follows, and 3-D networks are full
of those. A hook on a tensor of one step dies with the graph of that step, so nothing has to be cleaned up;
hooks on parameters are removed and set anew at every step, so that a deep copy never writes to its original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from passion_plugin.errors import UsageError, raise_problems


class _Scale:
    """Multiplies a gradient by a constant; with ``noise`` adds noise as large as its entries are spread."""

    # Tells torch that a parameter may be pickled without a warning although this hook is left behind.
    __torch_unserializable__ = True

    def __init__(self, coefficient: Tensor, *, noise: bool = False) -> None:
        self.coefficient = coefficient
        self.noise = noise
        self.acted = False

    def __call__(self, gradient: Tensor) -> Tensor:
        self.acted = True
        scaled = gradient * self.coefficient.to(gradient)
        if self.noise and gradient.numel() > 1:
            scaled = scaled + torch.randn_like(gradient) * gradient.std()
        return scaled


def scale_gradient(term: Tensor, coefficient: Tensor) -> Tensor:
    r"""Let ``term`` pass forward unchanged and scale the gradient that flows back through it.

    For a loss :math:`L(t)` the gradient becomes :math:`c\,\partial L/\partial t`, which is what a loss weight
    :math:`c` on the term would give; only the value that is logged stays free of it.

    Args:
        term: any tensor. A hook is left on it when it requires gradient.
        coefficient: anything that broadcasts to the shape of ``term``; no gradient.

    Returns:
        ``term`` itself.

    Example:
        >>> import torch
        >>> weight = torch.ones(2, requires_grad=True)
        >>> scale_gradient(weight * 3, torch.tensor([1.0, 0.5])).sum().backward()
        >>> weight.grad
        tensor([3.0000, 1.5000])
    """
    if term.requires_grad:
        term.register_hook(_Scale(coefficient.detach()))
    return term


class EncoderGradientScaling:
    """Scales everything that reaches the parameters of each encoder, from every loss (OGM-GE's rule)."""

    def __init__(self) -> None:
        self._handles: list[tuple[_Scale, Any]] = []

    def install(
        self,
        encoders: Mapping[str, Sequence[nn.Module]],
        coefficients: Mapping[str, Tensor],
        *,
        noise: bool = False,
    ) -> None:
        """Replace all hooks by new ones, for the modalities that have a coefficient, a scalar each.

        ``noise`` adds Gaussian noise with the standard deviation of the gradient before it was scaled.
        """
        self.remove()
        for modality, coefficient in coefficients.items():
            hook = _Scale(coefficient.detach(), noise=noise)
            parameters = {id(p): p for module in encoders[modality] for p in module.parameters() if p.requires_grad}
            # Only sharded tensors have placements. Their gradient is put there without a trip through autograd.
            if any(hasattr(parameter, "placements") for parameter in parameters.values()):
                raise UsageError(
                    f"the parameters of the encoder of {modality!r} are sharded by fully_shard, where gradients of "
                    f"encoders cannot be scaled: use DistributedDataParallel, modulation='distillation', or another "
                    f"strategy"
                )
            for parameter in parameters.values():
                _remove_others(parameter)
                self._handles.append((hook, parameter.register_hook(hook)))

    def check(self) -> None:
        """Raise, once, when somebody else took hooks away before they acted; the others are removed then."""
        if any(not hook.acted and handle.id not in (handle.hooks_dict_ref() or ()) for hook, handle in self._handles):
            self.remove()
            raise UsageError(
                "the hooks that scale the gradients of the encoders were taken off their parameters before they acted: "
                "something clears the hooks of all tensors, or replaced parameters, between forward and backward. Do "
                "that before forward or after backward"
            )

    def remove(self) -> None:
        """Take all hooks away."""
        for _, handle in self._handles:
            handle.remove()
        self._handles = []


def _remove_others(parameter: Tensor) -> None:
    """Remove the hooks of an engine that this backbone had before: it would be scaled twice."""
    hooks = parameter._backward_hooks or {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Scale)]:
        del hooks[key]


def check_untied_encoders(
    encoders: Mapping[str, Sequence[nn.Module]],
    *,
    what: str = "modulation='encoder' needs encoders of their own (or use 'distillation')",
) -> None:
    """Refuse encoders that share parameters: each would be scaled once for every owner."""
    owners: dict[int, str] = {}
    pairs: dict[tuple[str, str], None] = {}
    for modality, modules in encoders.items():
        for module in modules:
            for parameter in module.parameters():
                other = owners.setdefault(id(parameter), modality)
                if other != modality:
                    pairs[(other, modality)] = None
    problems = [f"{a!r} and {b!r} share parameters, which would be scaled twice" for a, b in pairs]
    raise_problems(problems, what=what)

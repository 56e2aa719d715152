"""Skip the encoders of missing modalities: those rows get zeros for features, nothing is run."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from passion_plugin.backbone._patching import Handler
from passion_plugin.errors import BackboneError

_MOST_LAYOUTS = 256


@dataclass(frozen=True)
class _TensorMeta:
    """What it takes to make a tensor of zeros."""

    size: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _TensorMeta:
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def zeros(self) -> Tensor:
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)


Layouts = dict[tuple[Any, ...], tuple[list[Any], TreeSpec]]
"""Shapes of what encoders return, by encoder and shapes of its arguments; handlers of :func:`skipping` fill it."""


def skipping(
    encoders: Mapping[str, Sequence[nn.Module]],
    modalities: Sequence[str],
    presence: Tensor,
    layouts: Layouts,
    *,
    by_rows: bool,
) -> dict[nn.Module, Handler]:
    """Return handlers under which an encoder does not run where its modality is missing.

    Right for a backbone that masks features after encoding, so that those of a missing modality have no
    effect. Parameters of an encoder that does not run at all get a zero gradient, as they would if it ran and
    its features were masked: optimizers treat None differently, and DistributedDataParallel would wait.

    Args:
        encoders: modules of each modality.
        modalities: M names, in the order of the columns of ``presence``.
        presence: bool (B, M) on the CPU.
        layouts: of this backbone; kept from step to step.
        by_rows: run an encoder only on the rows that have its modality. This saves more, but convolutions over
            fewer rows round differently. Otherwise only an encoder without any row is left out, and the result is
            the same bit for bit.
    """
    batch = len(presence)
    handlers: dict[nn.Module, Handler] = {}
    for column, modality in enumerate(modalities):
        rows = presence[:, column].nonzero().flatten()
        if len(rows) == batch:
            continue
        for place, module in enumerate(encoders[modality]):
            if not len(rows):
                handlers[module] = functools.partial(_return_zeros, module, (modality, place), layouts)
            elif by_rows:
                handlers[module] = functools.partial(_run_rows, modality, rows, batch)
    return handlers


def zero_with_graph(tensors: Sequence[Tensor]) -> Tensor:
    """Return the scalar 0 with a gradient of zero, which 0 * sum would not have where something is infinite.

    Example:
        >>> import math
        >>> weight = torch.tensor([1.0, math.inf], requires_grad=True)
        >>> zero_with_graph([weight]).backward()
        >>> weight.grad
        tensor([0., 0.])
    """
    first = tensors[0]
    zero: Tensor = _Zeros.apply([_TensorMeta(torch.Size(), first.dtype, first.device)], *tensors)[0]
    return zero


class _Zeros(torch.autograd.Function):
    """Zeros of some shapes that pass as a function of other tensors, whose gradient is zero rather than None."""

    @staticmethod
    def forward(ctx: Any, shapes: Sequence[_TensorMeta], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.tensors = [_TensorMeta.of(tensor) for tensor in tensors]
        outputs = tuple(shape.zeros() for shape in shapes)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.tensors, ctx.needs_input_grad[1:], strict=True)
        return (None, *(shape.zeros() if needs_gradient else None for shape, needs_gradient in needed))


def _run_rows(modality: str, rows: Tensor, batch: int, forward: Handler, *args: Any, **kwargs: Any) -> Any:
    def pick(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != batch:
            return leaf
        return leaf.index_select(0, rows.to(leaf.device))

    def spread(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.ndim == 0 or leaf.shape[0] != len(rows):
            raise BackboneError(
                f"an output of shape {tuple(leaf.shape)} of the encoder of {modality!r} has no batch in front; "
                f"set PassionConfig(skip_missing_encoders=False)"
            )
        return leaf.new_zeros(batch, *leaf.shape[1:]).index_copy(0, rows.to(leaf.device), leaf)

    args, kwargs = tree_map(pick, (args, kwargs))
    return tree_map(spread, forward(*args, **kwargs))


def _return_zeros(
    module: nn.Module, name: tuple[str, int], layouts: Layouts, forward: Handler, *args: Any, **kwargs: Any
) -> Any:
    key = (name, *_signature((args, kwargs)))
    if key not in layouts:
        if len(layouts) >= _MOST_LAYOUTS:
            layouts.clear()
        with torch.no_grad():
            leaves, tree = tree_flatten(forward(*args, **kwargs))
        layouts[key] = [_TensorMeta.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree
    leaves, tree = layouts[key]
    shapes = [leaf for leaf in leaves if isinstance(leaf, _TensorMeta)]
    zeros = iter(_Zeros.apply(shapes, *module.parameters()))
    return tree_unflatten([next(zeros) if isinstance(leaf, _TensorMeta) else leaf for leaf in leaves], tree)


def _signature(arguments: Any) -> tuple[Any, ...]:
    """What decides over the shapes that an encoder returns: tensors, flags, counts and words, but no other numbers.

    A temperature or a rate that changes at every step would otherwise run the encoder at every step.
    """
    leaves = [
        _TensorMeta.of(leaf) if isinstance(leaf, Tensor) else leaf if isinstance(leaf, (bool, int, str)) else type(leaf)
        for leaf in tree_flatten(arguments)[0]
    ]
    devices = {leaf.device.type for leaf in leaves if isinstance(leaf, _TensorMeta)}
    autocast = [
        torch.get_autocast_dtype(device)
        for device in sorted(devices)
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    ]
    return (*leaves, *autocast)

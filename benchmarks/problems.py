"""A backbone, how to talk to it, and the batches that every candidate trains on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import shells
from passion_plugin.backbone import BackboneSpec
from passion_plugin.backbone._adapter import BackboneAdapter
from passion_plugin.backbone._calls import BackboneCall
from passion_plugin.data import draw_presence
from passion_plugin.wrapper import PassionWrapper

__all__ = ["Batch", "Problem", "pose", "predict"]

Factory = Callable[[], Any]


class Batch(NamedTuple):
    """Images (B, M, *spatial), zero where absent; mask (B, M) bool; labels (B, *spatial)."""

    x: Tensor
    mask: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Problem:
    """A backbone in training mode, how to talk to it, and what to train it on.

    Attributes:
        backbone: never trained itself; every candidate gets a copy.
        spec: given by the factory, or detected.
        rates: missing rate by modality name.
        batches: one for each draw of what is missing.
    """

    backbone: nn.Module
    spec: BackboneSpec
    rates: Mapping[str, float]
    batches: Sequence[Batch]

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names, in the order of the columns."""
        return tuple(self.rates)


def pose(
    factory: Factory, shape: Sequence[int], rates: Mapping[str, float], *, draws: int, device: torch.device
) -> Problem:
    """Build a backbone and its batches.

    Args:
        factory: returns a module to be called as ``module(x, mask)``, or a pair of that and its BackboneSpec.
        shape: (B, M, *spatial) of the images.
        rates: missing rate by modality name. Over all draws they are met exactly.
        draws: number of batches.
        device: where to train.
    """
    torch.manual_seed(0)
    made = factory()
    backbone, spec = made if isinstance(made, tuple) else (made, None)
    backbone = backbone.to(device).train()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tuple(shape), generator=generator).to(device)
    everything = torch.ones(tuple(shape[:2]), dtype=torch.bool, device=device)
    wrapper = PassionWrapper(
        copy.deepcopy(backbone), tuple(rates), missing_rates=rates, spec=spec, example_input=x, example_mask=everything
    )
    assert wrapper.passion.adapter is not None
    spec = wrapper.passion.adapter.spec
    if spec.students == "heads":
        raise SystemExit("the students of this backbone are heads of their own, for which there is no naive version")
    with torch.no_grad():
        classes = predict(BackboneAdapter(backbone, spec, tuple(rates)), x, everything)[1][0].shape[1]
    labels = shells(tuple(shape[2:]), classes).expand(shape[0], *shape[2:]).to(device)
    presence = draw_presence(draws * shape[0], rates, seed=0).presence
    masks = torch.tensor(presence, device=device).split(shape[0])
    batches = [Batch(torch.where(mask.view(*mask.shape, *[1] * (x.ndim - 2)), x, 0), mask, labels) for mask in masks]
    return Problem(backbone, spec, rates, batches)


def predict(adapter: BackboneAdapter, x: Tensor, keep: Tensor) -> tuple[Any, list[Tensor]]:
    """Run the whole backbone with only ``keep`` (B, M) let through, and listen.

    Returns:
        What the backbone returns; and logits, features and coarse logits.
    """
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for index, module in enumerate([adapter.classifier, *adapter.deep_supervision]):
            assert module is not None

            def keep_both(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, index: int = index) -> None:
                seen[index] = (args[0], output)

            stack.enter_context(module.register_forward_hook(keep_both))
        raw = adapter.run_masked(BackboneCall((x, keep), {}), keep)
    features, logits = seen[0]
    return raw, [logits, features, *(seen[index][1] for index in range(1, len(seen)))]

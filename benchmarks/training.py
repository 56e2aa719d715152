"""A training step of a backbone: plain, with naive PASSION, and with ours."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from benchmarks import naive
from benchmarks.measure import ParityError, relative_error
from benchmarks.problems import Batch, Problem, predict
from passion_plugin.backbone._adapter import BackboneAdapter
from passion_plugin.config import PassionConfig
from passion_plugin.wrapper import PassionWrapper

__all__ = ["CANDIDATES", "CONFIGS", "Candidate", "build", "check_parity"]

CONFIGS: dict[str, PassionConfig] = {
    "ours": PassionConfig(),
    "ours, no skipping": PassionConfig(skip_missing_encoders=False),
    "ours, low memory": PassionConfig(memory="low"),
}
"""Configurations that are measured, by the name of the candidate."""

CANDIDATES = ("plain", "naive", *CONFIGS)
"""Everything that is measured, in the order of the tables."""

# Single precision, and convolutions over other rows sum in another order. Term by term, because a term as small
# as that of the prototypes would not show in the sum.
_TOLERANCE = 1e-3
_TERMS = ("pixel", "prototype", "distance", "unimodal")


def criterion(raw: Any, labels: Tensor) -> Tensor:
    """The user's own loss: cross-entropy plus Dice of every map in the output, as fast as PyTorch allows."""
    maps = [leaf for leaf in tree_leaves(raw) if isinstance(leaf, Tensor) and leaf.ndim == labels.ndim + 1]
    total = labels.new_zeros((), dtype=torch.float32)
    for logits in maps:
        target = labels
        if target.shape[1:] != logits.shape[2:]:
            target = F.interpolate(labels[:, None].float(), size=logits.shape[2:], mode="nearest")[:, 0].long()
        axes = tuple(range(2, logits.ndim))
        p = logits.softmax(1)
        one_hot = torch.zeros_like(p).scatter_(1, target[:, None], 1)
        dice = 2 * (p * one_hot).sum(axes) / (p.sum(axes) + one_hot.sum(axes) + 1e-7)
        total = total + F.cross_entropy(logits, target) + 1 - dice.mean()
    return total


class Candidate:
    """Plain training, and the base of the others: a copy of the backbone with an optimizer.

    The learning rate is 0: the optimizer does its work, and all candidates stay where they can be compared.
    """

    def __init__(self, problem: Problem) -> None:
        self.backbone = copy.deepcopy(problem.backbone)
        self.model = self.backbone
        self.optimizer = torch.optim.AdamW(self.backbone.parameters(), lr=0.0, amsgrad=True)

    def forward(self, batch: Batch) -> tuple[Any, Tensor | None]:
        """Return what the backbone returns, and what is added to the user's loss."""
        return self.model(batch.x, batch.mask), None

    def step(self, batch: Batch) -> None:
        """Train on a batch."""
        raw, addition = self.forward(batch)
        loss = criterion(raw, batch.labels)
        if addition is not None:
            loss = loss + addition
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self, batch: Batch) -> Any:
        """Predict in ``eval()`` mode; leaves it switched on."""
        if self.model.training:
            self.model.eval()
        with torch.no_grad():
            return self.model(batch.x, batch.mask)

    def persistent_bytes(self) -> int:
        """Size of parameters, buffers and the state of the optimizer."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = [*self.backbone.parameters(), *self.backbone.buffers(), *states]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


class Naive(Candidate):
    """All M students by full passes of the backbone, present or not, and the naive losses."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.adapter = BackboneAdapter(self.backbone, problem.spec, problem.modalities)
        self.rates = tuple(problem.rates.values())

    def forward(self, batch: Batch) -> tuple[Any, Tensor | None]:
        """Return what the backbone returns, and the objective."""
        raw, teacher = predict(self.adapter, batch.x, batch.mask)
        students = []
        for m in range(len(self.rates)):
            alone = torch.zeros_like(batch.mask)
            alone[:, m] = True
            students.append(predict(self.adapter, batch.x, alone)[1])
        config = PassionConfig()
        self.terms = naive.terms(teacher, students, batch.labels, config)
        return raw, naive.objective(self.terms, batch.mask, self.rates, config)


class Ours(Candidate):
    """The wrapper."""

    model: PassionWrapper

    def __init__(self, problem: Problem, config: PassionConfig) -> None:
        super().__init__(problem)
        self.model = PassionWrapper(
            self.backbone, problem.modalities, missing_rates=problem.rates, spec=problem.spec, config=config
        )

    def forward(self, batch: Batch) -> tuple[Any, Tensor | None]:
        """Return what the backbone returns, and ``passion_loss``."""
        raw = self.model(batch.x, batch.mask)
        return raw, self.model.passion_loss(batch.labels)


def build(name: str, problem: Problem) -> Candidate:
    """Return ``plain``, ``naive`` or one of :data:`CONFIGS`."""
    if name in CONFIGS:
        return Ours(problem, CONFIGS[name])
    return {"plain": Candidate, "naive": Naive}[name](problem)


def check_parity(problem: Problem, names: Sequence[str]) -> None:
    """Compare terms, and the gradient of what is added to the loss, with naive PASSION. Dropout is off for that.

    Raises:
        ParityError: naming candidate and error.
    """
    quiet = replace(problem, backbone=copy.deepcopy(problem.backbone))
    for module in quiet.backbone.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    # One modality alone distils nothing; with all of them nothing is left out.
    batch = max(problem.batches, key=lambda batch: int((batch.mask.sum(1) > 1).sum() * 2 - batch.mask.all(1).sum()))
    active = batch.mask & (batch.mask.sum(1, keepdim=True) > 1)
    by_hand = Naive(quiet)
    expected = {"gradient": _gradient(by_hand, batch), **{name: by_hand.terms[name][active] for name in _TERMS}}
    for name in names:
        ours = Ours(quiet, CONFIGS[name])
        found = {"gradient": _gradient(ours, batch)}
        terms = ours.model.passion.loss_terms()
        found |= {term: getattr(terms, term)[active] for term in _TERMS}
        for what, reference in expected.items():
            error = relative_error(found[what], reference)
            if not error <= _TOLERANCE:
                raise ParityError(
                    f"{name!r} differs from naive PASSION: {what} is off by {error:.2g}, allowed is {_TOLERANCE:g}. "
                    "Batch normalisation over several samples, or dropout by a function, does that: use a batch of "
                    "one, or switch dropout off. Nothing is reported"
                )


def _gradient(candidate: Candidate, batch: Batch) -> Tensor:
    _, addition = candidate.forward(batch)
    assert addition is not None
    addition.backward()
    return torch.cat(
        [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
            for parameter in candidate.backbone.parameters()
        ]
    )

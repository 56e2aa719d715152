"""Which output of a backbone is its prediction, and what a pass gives to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from passion_plugin.errors import BackboneError

PREDICTION_KEYS = ("logits", "out", "seg", "pred", "prediction", "output")
"""Where a network that returns a dictionary is expected to keep its prediction."""


def prediction_of(raw: Any) -> Tensor:
    """Return the fused prediction out of whatever a backbone returned.

    The first tensor (B, K, *spatial) in it; in a dictionary, the entry called like a prediction, if any.
    """
    maps = maps_in(_main_part(raw))
    if maps:
        return maps[0]
    labels = [leaf for leaf in tree_leaves(raw) if isinstance(leaf, Tensor) and leaf.ndim >= 3]
    if labels:
        raise BackboneError(
            f"the backbone returns {labels[0].dtype} {tuple(labels[0].shape)}: labels, not logits or probabilities. "
            f"Let it return what its last layer gives."
        )
    raise BackboneError(
        f"the backbone returns {type(raw).__name__} without a tensor (batch, classes, *spatial) in it: is "
        f"it a segmentation network?"
    )


def rival_predictions(raw: Any) -> list[str]:
    """Return the entries of a dictionary between which nothing but their order decides, if there are several.

    Where several are tensors of the finest resolution, only these: features and styles are no predictions.
    """
    part = _main_part(raw)
    if not isinstance(part, Mapping):
        return []
    found = {str(key): maps_in(value) for key, value in part.items() if maps_in(value)}
    finest = max((leaf[0, 0].numel() for maps in found.values() for leaf in maps), default=0)
    tensors = [str(key) for key, value in part.items() if isinstance(value, Tensor) and str(key) in found]
    likely = [name for name in tensors if found[name][0][0, 0].numel() == finest]
    names = likely if len(likely) > 1 else list(found)
    return names if len(names) > 1 else []


def _main_part(raw: Any) -> Any:
    """Descend to the first part with maps in it, and to the entry of a dictionary that is called a prediction."""
    if isinstance(raw, Mapping):
        parts = [raw[key] for key in PREDICTION_KEYS if key in raw]
    else:
        parts = list(raw) if isinstance(raw, (tuple, list)) else []
    return next((_main_part(part) for part in parts if maps_in(part)), raw)


def maps_in(raw: Any) -> list[Tensor]:
    """Return every floating-point tensor of at least three dimensions in what a backbone returned."""
    return [
        leaf for leaf in tree_leaves(raw) if isinstance(leaf, Tensor) and leaf.ndim >= 3 and leaf.is_floating_point()
    ]


@dataclass(frozen=True)
class Prediction:
    """What a pass gives to compare.

    Attributes:
        logits: (B, K, *spatial), what leaves the classifier.
        features: (B, C, *spatial), what enters it.
        coarse: coarse logits (B, K, *coarser), finest first.
    """

    logits: Tensor
    features: Tensor
    coarse: tuple[Tensor, ...] = ()

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the logits, the features and the coarse logits, in this order."""
        return (self.logits, self.features, *self.coarse)

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Prediction:
        """Build one from what :meth:`tensors` returned."""
        return cls(tensors[0], tensors[1], tuple(tensors[2:]))

    def detached(self) -> Prediction:
        """Return it without gradient."""
        return self.of([tensor.detach() for tensor in self.tensors()])

    def rows(self, index: Tensor) -> Prediction:
        """Return some samples only, given in ascending order."""
        if len(index) == len(self.logits):
            return self
        return self.of([tensor.index_select(0, index.to(tensor.device)) for tensor in self.tensors()])

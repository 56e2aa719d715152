"""One batch of scores to rows of metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from passion_plugin.errors import ConfigError, raise_problems, require
from passion_plugin.evaluation._metrics import dice_scores, hd95_scores
from passion_plugin.evaluation._rows import STATUS, Convention, Row
from passion_plugin.evaluation._targets import Targets

__all__ = ["Scorer"]


@dataclass(frozen=True)
class Scorer:
    """Masks to rows: which metrics, and what they give where a mask is empty."""

    targets: Targets
    empty: Literal["skip", "one"]
    hd95: bool
    hd95_empty: Literal["zero", "skip"]
    hd95_penalty: float

    def __post_init__(self) -> None:
        problems = []
        if self.empty not in ("skip", "one"):
            problems.append(f"empty is {self.empty!r}; it must be 'skip' or 'one'.")
        if self.hd95_empty not in ("zero", "skip"):
            problems.append(f"hd95_empty is {self.hd95_empty!r}; it must be 'zero' or 'skip'.")
        if not 0 <= self.hd95_penalty < float("inf"):
            problems.append(f"hd95_penalty is {self.hd95_penalty}; it must be a distance.")
        raise_problems(problems, what="evaluate_subsets", error=ConfigError)
        if self.hd95:
            for module in ("scipy", "monai.metrics"):
                require(module, extra="monai", purpose="hd95=True")

    def conventions(self, unit: str) -> dict[str, Convention]:
        """Metric -> how it is computed; ``unit`` is that of the distances."""
        conventions = {"dice": Convention("fraction", None if self.empty == "skip" else 1.0, 0.0)}
        if self.hd95:
            both = 0.0 if self.hd95_empty == "zero" else None
            conventions["hd95"] = Convention(unit, both, self.hd95_penalty)
        return conventions

    def rows(
        self,
        scores: Tensor,
        label: Tensor,
        ids: Sequence[str],
        subset: str,
        spacing: Sequence[Sequence[float]] | None,
    ) -> dict[str, list[Row]]:
        """Score one batch for one subset.

        Args:
            scores: (b, K, *spatial).
            label: (b, ...), see :meth:`Targets.true`.
            ids: b sample ids.
            subset: its name.
            spacing: voxel sizes in mm per sample and axis, or None.

        Returns:
            Sample id -> its rows, ordered by metric and target.
        """
        predicted = self.targets.predicted(scores)
        true = self.targets.true(label, scores.shape[1], scores.shape[2:])
        values = {"dice": dice_scores(predicted, true, empty=self.empty)}
        if self.hd95:
            values["hd95"] = torch.cat([
                hd95_scores(
                    predicted[[b]], true[[b]],
                    spacing=None if spacing is None else spacing[b],
                    empty=self.hd95_empty, penalty=self.hd95_penalty,
                )
                for b in range(len(ids))
            ])  # fmt: skip
        empties = (2 - predicted.flatten(2).any(-1).int() - true.flatten(2).any(-1).int()).tolist()
        names = self.targets.names(scores.shape[1])
        return {
            sample: [
                Row(subset, sample, name, metric, None if math.isnan(value) else value, STATUS[empty])
                for metric, table in values.items()
                for name, value, empty in zip(names, table[b].tolist(), empties[b], strict=True)
            ]
            for b, sample in enumerate(ids)
        }

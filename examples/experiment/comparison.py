"""Finished cells as tables and pictures look at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from examples.experiment.cells import Cell
from examples.experiment.recipes import parse_recipe
from examples.experiment.stats import Scores, Select
from examples.experiment.store import Store, Study
from examples.experiment.views import DRAWINGS
from passion_plugin.missing import all_subsets, subset_name
from passion_plugin.strategies import strategy_names

__all__ = ["Comparison", "rarest"]


@dataclass(frozen=True)
class Comparison:
    """What tables and pictures are made from.

    Attributes:
        study: what all trainings share.
        records: finished cells.
        focus: the strategy that is compared with the others.
    """

    study: Study
    records: Sequence[Mapping[str, Any]]
    focus: str = "passion"
    _scores: dict[str, Scores] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, store: Store, focus: str = "passion") -> Comparison:
        """Read a folder; without ``focus`` in it the last strategy takes its place."""
        comparison = cls(store.study(), store.records(), focus)
        names = comparison.strategies
        return comparison if focus in names or not names else cls(comparison.study, comparison.records, names[-1])

    @cached_property
    def cells(self) -> list[Cell]:
        """All finished cells."""
        return [Cell(**record["cell"]) for record in self.records]

    @cached_property
    def strategies(self) -> list[str]:
        """Names, plain ones first."""
        return sorted({cell.strategy for cell in self.cells}, key=_rank)

    @cached_property
    def groups(self) -> list[tuple[str, int]]:
        """Networks and batch sizes."""
        return sorted({(cell.backbone, cell.batch_size) for cell in self.cells}, key=lambda g: (g[0] != "uhemis", *g))

    @property
    def subsets(self) -> list[str]:
        """Names of the subsets of modalities."""
        return [subset_name(subset) for subset in all_subsets(self.study.modalities)]

    @property
    def baseline(self) -> str:
        """``"plain"``, or the first strategy where it was not run."""
        return self.strategies[0]

    @property
    def others(self) -> list[str]:
        """All but the focus."""
        return [name for name in self.strategies if name != self.focus]

    def scores(self, metric: str = "dice") -> Scores:
        """All scores of one metric."""
        if metric not in self._scores:
            self._scores[metric] = Scores(self.records, metric)
        return self._scores[metric]

    def within(self, group: tuple[str, int], select: Select | None = None, *, target: str | None = None) -> Select:
        """Restrict a selection to one network and batch size, and to one target or those that the study is about."""
        targets = {target} if target else set(self.study.primary or self.study.regions)
        return lambda cell, subset, name: (
            (cell.backbone, cell.batch_size) == group
            and name in targets
            and (select is None or select(cell, subset, name))
        )

    @property
    def apart(self) -> list[str]:
        """Targets to be shown by themselves; none where the mean is that of a single one already."""
        return [name for name in self.study.regions if name != self.about]

    @property
    def about(self) -> str:
        """The targets whose mean is meant where none is named."""
        return ", ".join(self.study.primary or self.study.regions)

    def label(self, group: tuple[str, int]) -> str:
        """Network, with the batch size where there are several."""
        several = len({size for _, size in self.groups}) > 1
        return f"{group[0]}, batch {group[1]}" if several else group[0]


def rarest(cell: Cell, subset: str, target: str) -> bool:
    """Selects the modality alone that is missing most often."""
    return subset == max(cell.rates, key=lambda name: cell.rates[name])


def _rank(name: str) -> tuple[Any, ...]:
    recipe = parse_recipe(name)
    drawings = list(DRAWINGS)
    rule = recipe.rule != "plain", strategy_names().index(recipe.rule)
    return *rule, drawings.index(recipe.drawing), recipe.slow, str(recipe.overrides)

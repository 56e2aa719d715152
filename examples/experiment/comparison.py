"""Finished cells as tables and pictures look at them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from examples.experiment.cells import Cell
from examples.experiment.recipes import parse_recipe
from examples.experiment.stats import Scores, Select, by_patient
from examples.experiment.store import Store, Study
from examples.experiment.views import DRAWINGS
from passion_plugin.baselines import strategy_names
from passion_plugin.data import all_subsets, subset_name
from passion_plugin.errors import ConfigError, suggest

__all__ = ["Comparison", "complete_set", "rarest"]


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
    _scores: dict[tuple[str, bool], Scores] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, store: Store, focus: str | None = None) -> Comparison:
        """Read a folder.

        Args:
            store: the folder.
            focus: the strategy that is compared with the others; None: ``"passion"``, or the last where that was not
                run.

        Raises:
            ConfigError: the folder holds no experiment, or ``focus`` was not run there.
        """
        comparison = cls(store.study(), store.records())
        names = comparison.strategies
        if focus is None:
            focus = "passion" if "passion" in names or not names else names[-1]
        elif focus not in names:
            raise ConfigError(f"{store.folder} has no strategy {focus!r}.{suggest(focus, names)}")
        return replace(comparison, focus=focus)

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

    def best_other(self, group: tuple[str, int]) -> str | None:
        """The rule other than PASSION that the focus gains least on, of those that were run as often as any."""
        rules = [name for name in self.others if not parse_recipe(name).rule.startswith("passion")]
        found = {name: by_patient(self.scores().difference(self.focus, name, self.within(group))) for name in rules}
        most = max((gain.runs for gain in found.values()), default=0)
        candidates = [name for name, gain in found.items() if gain.runs == most and gain.units]
        return min(candidates, key=lambda name: found[name].mean, default=None)

    def fully_run(self, group: tuple[str, int]) -> list[str]:
        """The strategies that were run as often as any; levels of the others are those of other patients or seeds."""
        runs = Counter(cell.strategy for cell in self.cells if (cell.backbone, cell.batch_size) == group)
        return [name for name in self.strategies if runs[name] == max(runs.values())]

    @property
    def variations(self) -> list[str]:
        """The rule of the focus with other hyper-parameters or another drawing; none of plain training."""
        rule = parse_recipe(self.focus).rule
        return [name for name in self.others if parse_recipe(name).rule == rule != "plain"]

    def shown(self, group: tuple[str, int]) -> list[str]:
        """Strategies but for variations that were run less often; those have a table of their own."""
        hidden = set(self.variations) - set(self.fully_run(group))
        return [name for name in self.strategies if name not in hidden]

    def scores(self, metric: str = "dice", *, found_only: bool = False) -> Scores:
        """All scores of one metric; ``found_only`` leaves out those that an empty mask decided."""
        key = metric, found_only
        if key not in self._scores:
            self._scores[key] = Scores(self.records, *key)
        return self._scores[key]

    @property
    def primary(self) -> list[str]:
        """The targets whose mean is meant where none is named."""
        return list(self.study.primary or self.study.regions)

    def within(self, group: tuple[str, int], select: Select | None = None, *, target: str | None = None) -> Select:
        """Restrict a selection to one network and batch size, and to one target or the primary ones."""
        targets = {target} if target else set(self.primary)
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
        """Names of the primary targets."""
        return ", ".join(self.primary)

    def label(self, group: tuple[str, int]) -> str:
        """Network, with the batch size where there are several."""
        several = len({size for _, size in self.groups}) > 1
        return f"{group[0]}, batch {group[1]}" if several else group[0]


def rarest(cell: Cell, subset: str, target: str) -> bool:
    """Selects the modality alone that is missing most often; each of them where several are."""
    return cell.rates.get(subset) == max(cell.rates.values())


def complete_set(cell: Cell, subset: str, target: str) -> bool:
    """Selects all modalities together."""
    return subset == subset_name(cell.rates)


def _rank(name: str) -> tuple[Any, ...]:
    recipe = parse_recipe(name)
    drawings = list(DRAWINGS)
    rule = recipe.rule != "plain", strategy_names().index(recipe.rule)
    return *rule, drawings.index(recipe.drawing), recipe.slow, str(recipe.overrides)
